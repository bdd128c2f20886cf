"""AMBER's generative part: objects that descriptions invent, cover, and expect (Wang et al. 2023, arXiv 2311.07397).

Rule of junyangwang0410/AMBER, ``inference.py``, commit 534babf. What the release does:

- nouns are words that NLTK tags NN*, lemmatized by WordNet, with their case and every mention; only keys and values
  of ``relation.json`` count;
- a noun of ``safe_words.txt`` is safe and covers nothing, also where it is a true object;
- a noun equal to a true word or a related word of one is safe and covers the first such word;
- otherwise the first equal and the first similar expected word (``hallu``) are both hit, also where the noun then
  turns out to be similar to a true word, which makes it safe and covers that word; only then it is hallucinated;
- .001 is added to each denominator, and figures are printed with one decimal of a percent: ``CHAIR``, ``Cover``,
  ``Hal`` (responses with any hallucinated noun) and ``Cog`` (expected words that are hit). The figures here are the
  printed ones divided by 100.

The release's similarity is that of spaCy's ``en_core_web_lg`` above .8: pass ``similar``, and ``nouns`` for NLTK's
nouns. ``variant="vocabulary"`` needs neither: nouns are the words whose singular form, or which themselves, are in
``relation.json``, and no two different words are similar. Its figures are not comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from behavior.benchmarks.questions import BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import groups_of, score_of, share, with_value
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Scoring
from concepts.loaders.amber import GENERATIVE, annotations_by_id
from concepts.nouns import singular
from concepts.object_mentions import tokenize_words
from concepts.reading.record import is_text
from concepts.reading.records import read_json_records
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.user_files import read_json, read_text

ANNOTATIONS, RELATION, SAFE = "annotations", "relation", "safe_words"
_OFFSET = 0.001
Similar = Callable[[str, str], bool]


@dataclass(frozen=True)
class Mentions:
    """What one description names.

    Examples
    --------
    >>> from behavior.benchmarks.amber_generative import count_mentions
    >>> relation = {"sky": [], "cloud": [], "dog": ["puppy"]}
    >>> count_mentions(["puppy", "cloud"], ["dog", "sky"], ["cloud"], relation, frozenset(), lambda a, b: False)
    Mentions(nouns=2, hallucinated=1, covered=1, hit=1, true=2, expected=1)
    """

    nouns: int
    hallucinated: int
    covered: int
    hit: int
    true: int
    expected: int


def count_mentions(
    nouns: Sequence[str],
    true: Sequence[str],
    expected: Sequence[str],
    relation: Mapping[str, Sequence[str]],
    safe: frozenset[str],
    similar: Similar,
) -> Mentions:
    """Count the nouns of one description as the release does.

    Parameters
    ----------
    nouns
        Lemmas of its nouns, in order; those outside `relation` are ignored.
    true, expected
        The annotation's ``truth`` and ``hallu``.
    relation
        Word to related words.
    safe
        Words that are never hallucinated.
    similar
        Whether a noun and a word are similar.

    Raises
    ------
    DataError
        For an annotated word that is no key of `relation`.
    """
    vocabulary = {*relation, *(word for words in relation.values() for word in words)}
    true_words, true_places = _places(true, relation)
    expected_words, expected_places = _places(expected, relation)
    covered: set[int] = set()
    hit: set[int] = set()
    in_vocabulary = [noun for noun in nouns if noun in vocabulary]
    hallucinated = 0
    for noun in in_vocabulary:
        if noun in safe:
            continue
        if noun in true_words:
            covered.add(true_places[true_words.index(noun)])
            continue
        if noun in expected_words:
            hit.add(expected_places[expected_words.index(noun)])
        near = next((i for i, word in enumerate(expected_words) if similar(noun, word)), None)
        if near is not None:
            hit.add(expected_places[near])
        near = next((i for i, word in enumerate(true_words) if similar(noun, word)), None)
        if near is not None:
            covered.add(true_places[near])
            continue
        hallucinated += 1
    return Mentions(len(in_vocabulary), hallucinated, len(covered), len(hit), len(true), len(expected))


def _places(words: Sequence[str], relation: Mapping[str, Sequence[str]]) -> tuple[list[str], list[int]]:
    """Return related words, then the words, and for each the place of its annotated word."""
    unknown = next((word for word in words if word not in relation), None)
    if unknown is not None:
        msg = f"AMBER's relation file has no entry for the annotated word '{unknown}'"
        raise DataError(msg)
    related = [(other, place) for place, word in enumerate(words) for other in relation[word]]
    entries = [*related, *((word, place) for place, word in enumerate(words))]
    return [word for word, _ in entries], [place for _, place in entries]


def vocabulary_nouns(text: str, vocabulary: frozenset[str]) -> list[str]:
    """Return the words of a text that are in a vocabulary, in lower case or in the singular.

    >>> from behavior.benchmarks.amber_generative import vocabulary_nouns
    >>> vocabulary_nouns("Two Dogs under the sky.", frozenset({"dog", "sky"}))
    ['dog', 'sky']
    """
    words = [word if word in vocabulary else singular(word) for word in tokenize_words(text)]
    return [word for word in words if word in vocabulary]


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    images: dict[str, tuple[str, str]] = {}
    if QUESTIONS in files:
        images = {r.identifier("id"): (r.text("image"), r.text("query")) for r in read_json_records(files[QUESTIONS])}
    questions = []
    for number, record in annotations_by_id(files[ANNOTATIONS]).items():
        if record.text("type").strip() != GENERATIVE:
            continue
        image, text = images.get(number, ("", ""))
        questions.append(
            BenchmarkQuestion(
                number, image, text, ", ".join(record.texts("truth")), "caption", level="object", kind="caption",
                fields={"truth": record.texts("truth"), "hallu": record.texts("hallu")}, where=record.where,
            )
        )  # fmt: skip
    return questions


def _relation(path: Path) -> dict[str, list[str]]:
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(v, list) and all(map(is_text, v)) for v in content.values()):
        msg = f"{path}: expected a JSON object that maps each word to a list of related words"
        raise DataError(msg)
    return content


def _score(scoring: Scoring) -> BenchmarkScore:
    relation = _relation(scoring.files[RELATION])
    safe = frozenset(read_text(scoring.files[SAFE]).split("\n"))
    vocabulary = frozenset({*relation, *(word for words in relation.values() for word in words)})
    nouns, similar = scoring.functions.get("nouns"), scoring.functions.get("similar")
    if scoring.variant == "release" and (nouns is None or similar is None):
        lacking = "similar" if similar is None else "nouns"
        msg = (
            f"AMBER's generative part: the released rule needs the function '{lacking}'; pass functions={{'nouns': …, "
            "'similar': …}, or variant='vocabulary'"
        )
        raise ConfigError(msg)
    near = lru_cache(maxsize=None)(similar) if similar is not None else lambda _, __: False
    counts = []
    for row in scoring.rows:
        words = list(nouns(row.text)) if nouns is not None else vocabulary_nouns(row.text, vocabulary)
        fields = row.question.fields
        counts.append(count_mentions(words, fields["truth"], fields["hallu"], relation, safe, near))
    groups = groups_of(scoring.rows)
    invented = [c.hallucinated > 0 for c in counts]
    exact = {
        "CHAIR": share([c.hallucinated for c in counts], groups, [c.nouns for c in counts]),
        "Cover": share([c.covered for c in counts], groups, [c.true for c in counts]),
        "Hal": share(invented, groups),
        "Cog": share([c.hit for c in counts], groups, [c.expected for c in counts]),
    }
    printed = {
        "CHAIR": _printed(sum(c.hallucinated for c in counts), sum(c.nouns for c in counts)),
        "Cover": _printed(sum(c.covered for c in counts), sum(c.true for c in counts)),
        "Hal": round(100 - (len(counts) - sum(invented)) / (len(counts) + _OFFSET) * 100, 1) / 100,
        "Cog": _printed(sum(c.hit for c in counts), sum(c.expected for c in counts)),
    }
    figures = exact
    if scoring.variant == "release":
        figures = {name: with_value(exact[name], value) for name, value in printed.items()}
    answers = [r.row(None, correct=not wrong) for r, wrong in zip(scoring.rows, invented, strict=True)]
    without = sum(c.nouns == 0 for c in counts)
    notes = [f"{without} descriptions name no word of the relation file"] if without else []
    return score_of("amber_generative", scoring, answers, figures, notes=notes)


def _printed(above: int, below: int) -> float:
    return round(above / (below + _OFFSET) * 100, 1) / 100


AMBER_GENERATIVE = Benchmark(
    "AMBER, generative",
    "Wang et al. 2023, arXiv 2311.07397; junyangwang0410/AMBER, commit 534babf",
    ("caption",),
    ("object",),
    {
        ANNOTATIONS: "annotations.json: id, type, truth, hallu",
        RELATION: "relation.json: word to related words",
        SAFE: "safe_words.txt: one word a line",
        QUESTIONS: "query_generative.json: id, image, query; without it, intervals take each description as an image",
    },
    _read,
    _score,
    AnswerLayout(("response",), ids=("id",)),
    variants={
        "release": "nouns and similarity by injected functions, figures as printed",
        "vocabulary": "words of relation.json, and no similarity; exact ratios",
    },
    optional=(QUESTIONS,),
    functions={
        "nouns": "text -> [lemma], NLTK's nouns lemmatized by WordNet",
        "similar": "(noun, word) -> bool, spaCy en_core_web_lg similarity above .8",
    },
)
