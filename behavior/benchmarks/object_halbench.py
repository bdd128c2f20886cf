"""Object HalBench: objects that descriptions invent (Rohrbach et al. 2018 with the protocol of RLHF-V, arXiv 2312.00849).

Rule of RLHF-V/RLHF-V, ``eval/eval_gpt_obj_halbench.py``, commit 3d35a91: a judge lists the objects that an answer
names (``extract_objs``), and each list is compared with COCO's objects. What the release does:

- an answer of three words or fewer names no object, whatever the judge lists;
- each listed object becomes the word pairs of COCO that its lemmas contain, otherwise its runs of nouns; an object
  counts once for each different word, so *sofa* and *couch* are two;
- with *toilet*, *seat* is no object;
- ``CHAIRs_refine`` is over the answers that name any COCO object, ``CHAIRs`` over all; recall counts classes.

The release lemmatizes and tags with spaCy: pass ``analyze``, a function from a text to (lemma, tag) pairs.
``variant="rule"`` does without: lemmas are singular forms (`concepts.nouns.singular`), and every word is a noun.
Verdict files of the release's own output (``sentences`` with ``mscoco_generated_words`` and ``mscoco_gt_words``) need
neither.

The true objects are a file of ours, because the release computes them from COCO's annotations and captions of 123,000
images: ``{image_id: [objects]}``, COCO's categories or their synonyms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from behavior.benchmarks import record_files
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import groups_of, raw_mean, score_of, share
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Judge, Scoring
from behavior.chair import COCO_PHRASES, COCO_SYNONYMS, read_synonyms
from concepts.loaders.table import read_rows
from concepts.nouns import singular
from concepts.reading.record import Record, abbreviate, is_text
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.user_files import read_json

OBJECTS, SYNONYMS = "objects", "synonyms"
SHORT = 3
"""Answers of at most this many words name no object."""
_NOUNS = frozenset({"NN", "NNS", "NNP", "NNPS"})
Analyze = Callable[[str], Sequence[tuple[str, str]]]
"""Function from a text to its tokens, each a lemma and a Penn Treebank tag."""


def analyze_simply(text: str) -> list[tuple[str, str]]:
    """Return the words of a text in the singular, each as a noun except a leading article.

    >>> from behavior.benchmarks.object_halbench import analyze_simply
    >>> analyze_simply("a Wine glasses")
    [('a', 'DT'), ('wine', 'NN'), ('glass', 'NN')]
    """
    words = [singular(word) for word in text.lower().split()]
    return [(word, "DT" if word in {"a", "an", "the"} else "NN") for word in words]


def listed_objects(texts: Sequence[str], pairs: Mapping[str, str], analyze: Analyze) -> list[str]:
    """Return the different objects of a judge's list, as the release derives them.

    Parameters
    ----------
    texts
        The judge's objects.
    pairs
        Word pair to the word it counts as.
    analyze
        Function from a text to its lemmas and tags.

    Examples
    --------
    >>> from behavior.benchmarks.object_halbench import analyze_simply, listed_objects
    >>> listed_objects(["teddy bears", "red cup"], {"teddy bear": "teddy bear"}, analyze_simply)
    ['teddy bear', 'red cup']
    """
    objects: list[str] = []
    for text in texts:
        tokens = list(analyze(f"a {text}"))
        lemmas = [lemma for lemma, _ in tokens]
        found, place = [], 0
        while place < len(lemmas):
            pair = pairs.get(" ".join(lemmas[place : place + 2]))
            if pair is not None:
                found.append(pair)
            place += 1 if pair is None else 2
        objects += found or _noun_runs(tokens)
    return list(dict.fromkeys(objects))


def _noun_runs(tokens: Sequence[tuple[str, str]]) -> list[str]:
    runs: list[str] = []
    run: list[str] = []
    for lemma, tag in [*tokens, ("", "")]:
        if tag in _NOUNS:
            run.append(lemma)
        elif run:
            runs.append(" ".join(run))
            run = []
    return runs


@dataclass(frozen=True)
class _Named:
    """The COCO objects that one answer names: a class for each word, and the true classes of its image."""

    classes: tuple[str, ...]
    true: frozenset[str]

    @property
    def invented(self) -> int:
        return sum(name not in self.true for name in self.classes)


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    counts: dict[str, int] = {}

    def make(_: int, record: Record) -> BenchmarkQuestion:
        image = record.identifier("image_id")
        counts[image] = counts.get(image, 0) + 1
        number = image if counts[image] == 1 else f"{image}#{counts[image]}"
        return BenchmarkQuestion(
            number,
            image,
            record.text("question", "prompt"),
            "",
            "caption",
            level="object",
            kind="caption",
            where=record.where,
        )

    return record_files.read_questions(files[QUESTIONS], make)


def _write_requests(rows: Sequence[AnsweredQuestion], path: Path) -> int:
    return record_files.write_lines(
        path,
        (
            {"id": r.question.id, "image_id": r.question.image, "question": r.question.text, "answer": r.text}
            for r in rows
        ),
    )


def _read_verdicts(path: Path) -> list[tuple[str | None, Any, str]]:
    content = read_json(path) if path.suffix.lower() == ".json" else None
    if isinstance(content, dict):
        sentences = content.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            msg = f"{path}: expected a list 'sentences', as in the release's results"
            raise DataError(msg)
        return [_sentence(s, f"{path}: sentence {n}") for n, s in enumerate(sentences, 1)]
    result: list[tuple[str | None, Any, str]] = []
    for record in read_rows(path):
        objects = record.field("extract_objs")
        if not isinstance(objects, list) or not all(is_text(o) for o in objects):
            msg = f"{record.where}: field 'extract_objs' must hold a list of texts, not {abbreviate(objects)}"
            raise DataError(msg)
        result.append((record.identifier("id", "image_id"), list(objects), record.where))
    return result


def _sentence(value: Any, where: str) -> tuple[str, _Named, str]:
    try:
        pairs = [(str(word), str(node)) for word, node in value["mscoco_generated_words"]]
        true = frozenset(str(name) for name in value["mscoco_gt_words"])
        return str(value["image_id"]), _Named(tuple(node for _, node in pairs), true), where
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{where}: needs image_id, mscoco_generated_words (pairs) and mscoco_gt_words"
        raise DataError(msg) from error


def _true_objects(path: Path) -> dict[str, list[str]]:
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(v, list) and all(map(is_text, v)) for v in content.values()):
        msg = f"{path}: expected an object of lists, image id to the objects in the image"
        raise DataError(msg)
    return content


def _score(scoring: Scoring) -> BenchmarkScore:
    released = all(isinstance(r.verdict, _Named) for r in scoring.rows)
    named = [r.verdict for r in scoring.rows] if released else _named(scoring)
    rows, groups = scoring.rows, groups_of(scoring.rows)
    invented = [n.invented for n in named]
    counts = [len(n.classes) for n in named]
    hits = [len({c for c in n.classes if c in n.true}) for n in named]
    some = [count > 0 for count in counts]
    any_invented = [count > 0 for count in invented]
    figures = {
        "CHAIRs": share(any_invented, groups),
        "CHAIRs_refine": share(any_invented, groups, some),
        "CHAIRi": share(invented, groups, counts),
        "recall": share(hits, groups, [len(n.true) for n in named]),
        "words": raw_mean([len(r.text.strip().split(" ")) for r in rows], groups),
    }
    answers = [r.row(None, correct=not wrong) for r, wrong in zip(rows, any_invented, strict=True)]
    notes = [f"{sum(some)} of {len(some)} answers name a COCO object"]
    return score_of("object_halbench", scoring, answers, figures, notes=notes)


def _named(scoring: Scoring) -> list[_Named]:
    analyze = scoring.functions.get("analyze")
    if analyze is None and scoring.variant == "release":
        msg = (
            "Object HalBench: the released rule needs lemmas and tags; pass functions={'analyze': …} (text to (lemma, tag) "
            "pairs), or variant='rule'"
        )
        raise ConfigError(msg)
    if OBJECTS not in scoring.files:
        msg = "Object HalBench needs the file 'objects' for lists of extracted objects: image id to the objects in the image"
        raise DataError(msg)
    synonyms = read_synonyms(scoring.files[SYNONYMS]) if SYNONYMS in scoring.files else dict(COCO_SYNONYMS)
    synonyms = {word.strip(): noun.strip() for word, noun in synonyms.items()}
    pairs = {word: word for word in synonyms if " " in word}
    pairs |= {
        pair: word for pair, word in COCO_PHRASES.items() if pair != word or pair in {"home plate", "train track"}
    }
    true = _true_objects(scoring.files[OBJECTS])
    result = []
    for row in scoring.rows:
        if row.question.image not in true:
            msg = f"{scoring.files[OBJECTS]}: no objects of image '{row.question.image}'"
            raise DataError(msg)
        short = len(row.text.strip().split()) <= SHORT
        words = [] if short else listed_objects(row.verdict, pairs, analyze or analyze_simply)
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        classes = tuple(synonyms[word] for word in words if word in synonyms)
        nouns = true[row.question.image]
        result.append(_Named(classes, frozenset(synonyms.get(noun, noun) for noun in nouns)))
    return result


OBJECT_HALBENCH = Benchmark(
    "Object HalBench",
    "Yu et al. 2023 (RLHF-V), arXiv 2312.00849; RLHF-V/RLHF-V, commit 3d35a91",
    ("caption",),
    ("object",),
    {
        QUESTIONS: "obj_halbench_300_with_image.jsonl: image_id, question",
        OBJECTS: "a JSON object: image id to the COCO objects in the image; not needed with the release's result files",
        SYNONYMS: "synonyms_refine.txt of the release; without it, behavior.chair.COCO_SYNONYMS",
    },
    _read,
    _score,
    AnswerLayout(("answer", "text"), ids=("id", "image_id"), image=("image_id",)),
    variants={
        "release": "lemmas and tags by the function `analyze`, or the release's own results",
        "rule": "singular forms, and every word a noun",
    },
    optional=(OBJECTS, SYNONYMS),
    judge=Judge(_write_requests, _read_verdicts),
    functions={"analyze": "text -> [(lemma, Penn Treebank tag)], as spaCy's en_core_web_trf gives them"},
)
