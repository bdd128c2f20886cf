"""POPE: does the model claim that absent objects are in the image? (Li et al. 2023, arXiv 2305.10355)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from behavior.parsing import DEFAULT_PARSER, named_parser, yes_no
from behavior.pope_scores import PopeScores, scores_of
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.files import write_whole
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count

# `import behavior` imports this module, so numpy and modules that need it are imported in the functions.
if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from behavior.result import BehaviorResult
    from groundscope.core.statistics import Estimate
    from lvlm.model import Lvlm

SPLITS = ("random", "popular", "adversarial")
Question = Mapping[str, str | int]
"""One line of a POPE file: ``question_id``, ``image``, ``text``, ``label``."""


@dataclass(frozen=True)
class PopeResult:
    """Scores by split, and the answers they are computed from.

    Examples
    --------
    >>> import groundscope as gs
    >>> result = gs.behavior.pope(gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["popular"]))
    >>> list(result.frame().columns[:4])
    ['split', 'n', 'unparsed', 'accuracy']
    """

    splits: Mapping[str, PopeScores]
    answers: BehaviorResult

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", MappingProxyType(dict(self.splits)))

    def frame(self) -> pd.DataFrame:
        """Return one row per split: ``n``, ``unparsed``, and each figure with ``<figure>_low`` and ``<figure>_high``."""
        import pandas as pd

        rows = []
        for split, scores in self.splits.items():
            row: dict[str, object] = {"split": split, "n": scores.n, "unparsed": scores.unparsed}
            for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
                figure: Estimate = getattr(scores, name)
                row |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
            rows.append(row)
        return pd.DataFrame(rows)


def pope(
    model: Lvlm,
    data: ConceptDataset,
    *,
    generate: bool = False,
    parser: str | None = None,
    max_new_tokens: int = 40,
    batch_size: int = 32,
    progress: bool | None = None,
) -> PopeResult:
    """Ask a model the existence questions of a dataset and score its answers by split.

    By default the answer is the candidate with the higher logit, yes or no, which needs no parser. With `generate` the
    model writes its answers, as in the benchmark's release, and `parser` parses them (``pope_release`` as in the release;
    the default is that of `behavior.answer`). The other parameters and errors are those of `behavior.answer`.

    Raises
    ------
    DataError
        If the dataset has no yes-no question of kind ``existence``.

    Examples
    --------
    >>> import groundscope as gs
    >>> result = gs.behavior.pope(gs.load_lvlm("tiny"), gs.scenes.dataset(20, splits=["random", "popular"]))
    >>> {split: scores.n for split, scores in result.splits.items()}
    {'random': 10, 'popular': 10}
    """
    from behavior.answering import answer

    existence = data.filter(lambda e: e.kind == "existence" and {"yes", "no"} == set(e.candidates))
    if not len(existence):
        msg = f"dataset '{data.name}' has no yes-no questions of kind 'existence', which POPE requires"
        raise DataError(msg)
    answers = answer(
        model,
        existence,
        generate=generate,
        parser=parser,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    splits = dict.fromkeys(a.split for a in answers.answers)
    return PopeResult({split: score_result(answers.where(split=split)) for split in splits}, answers)


def score_result(answers: BehaviorResult) -> PopeScores:
    """Score answers to yes-no questions that are already parsed."""
    rows = answers.answers
    parser = str(answers.provenance.get("parser"))
    released = parser == "pope_release"
    unparsed = sum(a.given is None or (released and a.text is not None and yes_no(a.text) is None) for a in rows)
    return scores_of([a.given for a in rows], [a.answer for a in rows], [a.group for a in rows], unparsed, parser)


def score(
    answers: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    parser: str = DEFAULT_PARSER,
) -> PopeScores:
    """Score answers from any source; no model is needed.

    Parameters
    ----------
    answers
        Texts that answer the questions.
    labels
        ``yes`` or ``no``: the true answer to each question.
    groups
        The image of each question, for the intervals; by default each question counts as a separate image.
    parser
        Name of the parser of answers, one of `behavior.parsing.PARSERS`. By default a text that says neither yes nor no
        is unparsed and wrong; ``pope_release`` counts it as yes, as the release does.

    Raises
    ------
    DataError
        For unequal lengths, no answers, or a label that is neither yes nor no.
    ConfigError
        For an unknown parser.
    """
    rule = named_parser(parser)
    if not len(answers) == len(labels) == len(labels if groups is None else groups):
        and_groups = "" if groups is None else f" and {format_count(len(groups), 'group')}"
        msg = (
            f"{format_count(len(answers), 'answer')} for {format_count(len(labels), 'label')}{and_groups}; the lengths "
            "must be equal"
        )
        raise DataError(msg)
    if not answers:
        msg = "no answers to score"
        raise DataError(msg)
    for number, label in enumerate(labels):
        if label not in {"yes", "no"}:
            msg = f"label {number} is '{label}'; it must be 'yes' or 'no'"
            raise DataError(msg)
    for number, text in enumerate(answers):
        if not isinstance(text, str):
            msg = f"answer {number} must be text, not {str(text)[:60]}"
            raise DataError(msg)
    unparsed = sum((yes_no if parser == "pope_release" else rule)(text) is None for text in answers)
    return scores_of(
        [rule(text) for text in answers], labels, range(len(labels)) if groups is None else groups, unparsed, parser
    )


def score_files(
    questions: Path | str,
    answers: Path | str,
    *,
    labels: Path | str | Sequence[Path | str] | None = None,
    parser: str = DEFAULT_PARSER,
    answer_field: str | None = None,
    id_field: str | None = None,
) -> PopeScores:
    """Score an answer file from any source against a question file; neither model nor images are needed.

    Parameters
    ----------
    questions
        A question file in a layout that `concepts.loaders.pope` reads. If its ``category`` names several splits, the
        figures are over all lines, and by split in ``splits``; a row in several splits counts once for each, in ``splits``
        and over all, as in VLMEvalKit.
    answers
        An answer file as for `behavior.answer_files.read_answers`, matched by id: ``<split>/<id>``, or the id alone, with
        the record's ``category`` if ids occur in several splits. Without ids, the answers must be in the order of the
        questions, as in the benchmark's own evaluation. If an answer also records its question, it must match.
    labels
        Label files for questions without labels, as for `concepts.loaders.pope`.
    parser
        Name of the parser of answers, one of `behavior.parsing.PARSERS`. By default a text that says neither yes nor no
        is unparsed and wrong; ``pope_release`` counts it as yes, as the release does.
    answer_field, id_field
        As for `behavior.answer_files.read_answers`.

    Raises
    ------
    DataError
        Names the file and record: if a file cannot be read, has two possible readings, or the files do not match.
    ConfigError
        For an unknown parser.
    """
    from behavior.pope_answer_files import join_answers

    named_parser(parser)
    rows = join_answers(questions, answers, labels, answer_field, id_field)

    def part(split: str | None = None) -> PopeScores:
        chosen = [row for row in rows if split in (None, row.split)]
        return score([r.text for r in chosen], [r.label for r in chosen], [r.image for r in chosen], parser=parser)

    splits = list(dict.fromkeys(row.split for row in rows))
    return replace(part(), splits={split: part(split) for split in splits} if len(splits) > 1 else {})


# -- building questions ----------------------------------------------------------------------------------------------


def build(
    images: Mapping[str, Sequence[str]], *, per_image: int = 3, n_images: int | None = None, seed: int = 0
) -> dict[str, tuple[Question, ...]]:
    """Build POPE's three splits from the objects in each image, by the rule of its release (RUCAIBox/POPE, ``utils.py``).

    For each image with at least `per_image` different objects, ask about the first `per_image` objects (answer yes). After
    each, ask about an object that is not in the image, neither by its name nor by a synonym (`concepts.nouns.PresentNouns`),
    and not yet asked about for this image (answer no). Plural nouns are asked with "Are there". The absent object is:

    ``random``
        any object of the sampled images, with equal probability;
    ``popular``
        the object in most of the sampled images;
    ``adversarial``
        the object that most often occurs in the same sampled image as the preceding object.

    Ties are resolved by first occurrence, in the order of images and their objects. If popular or adversarial has no
    remaining object, it is drawn as in ``random``.

    Parameters
    ----------
    images
        Image path to its objects, in the order of the questions; duplicates count once.
    per_image
        Number of question pairs per image.
    n_images
        Number of images to sample; by default all with enough objects.
    seed
        Seed of the image sample and of ``random``.

    Returns
    -------
    dict
        Split to its questions in POPE's file layout, with ``question_id`` counted from 1.

    Raises
    ------
    ConfigError
        For fewer than 1 question or image.
    DataError
        If there are not enough images, an object has no name, or no absent object remains to ask about.
    """
    import numpy as np

    if per_image < 1 or (n_images is not None and n_images < 1):
        msg = f"per_image={per_image}, n_images={n_images}: both must be at least 1"
        raise ConfigError(msg)
    distinct = {name: tuple(dict.fromkeys(objects)) for name, objects in images.items()}
    for name, objects in distinct.items():
        if not all(noun.strip() for noun in objects):
            msg = f"image '{name}' has an object without a name"
            raise DataError(msg)
    eligible = [name for name, objects in distinct.items() if len(objects) >= per_image]
    n_sampled = len(eligible) if n_images is None else n_images
    if not eligible or n_sampled > len(eligible):
        msg = (
            f"{format_count(n_sampled or 1, 'image')} with at least {format_count(per_image, 'different object')} are "
            "needed, but only "
            f"{len(eligible)} qualify"
        )
        raise DataError(msg)
    rng = np.random.Generator(np.random.PCG64(seed))
    indices = range(len(eligible)) if n_images is None else rng.choice(len(eligible), size=n_sampled, replace=False)
    sampled = {eligible[int(i)]: distinct[eligible[int(i)]] for i in indices}
    frequency = Counter(noun for objects in sampled.values() for noun in objects)
    co_occurrence: dict[str, Counter[str]] = {noun: Counter() for noun in frequency}
    for objects in sampled.values():
        for noun in objects:
            co_occurrence[noun].update(other for other in objects if other != noun)
    # `most_common` orders equal counts by first occurrence.
    popular = [noun for noun, _ in frequency.most_common()]
    partners = {noun: [other for other, _ in counts.most_common()] for noun, counts in co_occurrence.items()}
    orders: dict[str, Callable[[str], list[str]]] = {
        "random": lambda _: [],
        "popular": lambda _: popular,
        "adversarial": lambda noun: partners[noun],
    }
    return {
        split: tuple(_questions(sampled, list(frequency), order, per_image, rng)) for split, order in orders.items()
    }


def questions_about(
    data: ConceptDataset, *, per_image: int = 3, n_images: int | None = None, seed: int = 0
) -> ConceptDataset:
    """Build POPE's three splits for the images of a dataset, from the objects of its examples.

    Works with any annotated dataset: scenes, or COCO, GQA, Visual Genome and CLEVR from `concepts.loaders`. The parameters
    and errors are those of `build`; each group of `data` is an image, with its objects in their order.

    Returns
    -------
    ConceptDataset
        Existence questions of the splits ``random``, ``popular`` and ``adversarial``, as loaded from a file of
        `write_questions`, with the objects and boxes of `data`.
    """
    from concepts.nouns import asked_noun

    first = {e.group: e for e in reversed(data.examples)}
    example_of = {name: first[name] for name in dict.fromkeys(e.group for e in data)}
    objects = {name: [o.noun for o in e.objects] for name, e in example_of.items()}
    built = build(objects, per_image=per_image, n_images=n_images, seed=seed)
    examples = []
    for split, records in built.items():
        for record in records:
            example, text = example_of[str(record["image"])], str(record["text"])
            noun = asked_noun(text) or ""
            present = record["label"] == "yes"
            examples.append(
                replace(
                    example,
                    id=f"{split}/{record['question_id']}",
                    question=text,
                    answer=str(record["label"]),
                    candidates=("yes", "no"),
                    level="object",
                    kind="existence",
                    split=split,
                    labels={"object:named": present, f"object:{noun}": present},
                    subject=next((o.id for o in example.objects if o.noun == noun), None),
                    prior_answer=None,
                )
            )
    provenance = {
        "maker": "behavior.pope",
        "seed": seed,
        "per_image": per_image,
        "n_images": n_images,
        "of": data.digest,
    }
    return ConceptDataset(f"pope-{data.name}", tuple(examples), provenance)


def _questions(
    sampled: Mapping[str, Sequence[str]],
    nouns: Sequence[str],
    candidates_for: Callable[[str], list[str]],
    per_image: int,
    rng: np.random.Generator,
) -> Iterable[Question]:
    from concepts.nouns import PresentNouns, canonical_noun, existence_question

    number = 0
    for image, objects in sampled.items():
        present, asked_absent = PresentNouns(objects), set[str]()
        for positive in objects[:per_image]:
            free_in_order = (
                noun
                for noun in candidates_for(positive)
                if not present.includes(noun) and canonical_noun(noun) not in asked_absent
            )
            negative = next(free_in_order, None)
            if negative is None:
                free = [
                    noun for noun in nouns if not present.includes(noun) and canonical_noun(noun) not in asked_absent
                ]
                if not free:
                    msg = (
                        f"image '{image}': each of the {format_count(len(nouns), 'object')} is in the image or already "
                        "asked about; give more images, or lower per_image"
                    )
                    raise DataError(msg)
                negative = free[int(rng.integers(len(free)))]
            asked_absent.add(canonical_noun(negative))
            for noun, label in ((positive, "yes"), (negative, "no")):
                number += 1
                text = existence_question(noun)
                yield {"question_id": number, "image": image, "text": text, "label": label}


def write_questions(path: Path | str, records: Iterable[Question]) -> None:
    """Write questions in POPE's file layout, one JSON object per line, which `concepts.loaders.pope` reads."""
    lines = [json.dumps(dict(record), ensure_ascii=False) + "\n" for record in records]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, "".join(lines).encode())
