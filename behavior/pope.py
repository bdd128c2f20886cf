"""POPE: does the model say that things are in the image which are not? (Li et al. 2023, arXiv 2305.10355)."""

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

# `import behavior` imports this module, so numpy and what needs it wait until something is asked or scored.
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
    """Scores by split, and the answers they come from."""

    splits: Mapping[str, PopeScores]
    answers: BehaviorResult

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", MappingProxyType(dict(self.splits)))

    def frame(self) -> pd.DataFrame:
        """Return one row a split: ``n``, ``unparsed``, and each figure with ``<figure>_low`` and ``<figure>_high``."""
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
    batch_size: int = 32,
    *,
    generate: bool = False,
    parser: str | None = None,
    max_new_tokens: int = 40,
    progress: bool = True,
) -> PopeResult:
    """Ask a model the existence questions of a dataset and score its answers by split.

    By default the answer is read from the logit margin between yes and no, which needs no parser; `generate` lets the
    model write, as the benchmark's release does, and `parser` says how that is read (``pope_release`` as the release
    does; by default as `behavior.answer`). The other parameters and the
    errors are those of `behavior.answer`.

    Raises
    ------
    DataError
        Where the dataset has no yes-no question of kind ``existence``.
    """
    from behavior.answering import answer

    asked = data.filter(lambda e: e.kind == "existence" and {"yes", "no"} == set(e.candidates))
    if not len(asked):
        msg = f"dataset '{data.name}' has no yes-no questions of kind 'existence': POPE asks only those"
        raise DataError(msg)
    answers = answer(
        model,
        asked,
        batch_size,
        generate=generate,
        parser=parser,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    splits = dict.fromkeys(a.split for a in answers.answers)
    return PopeResult({split: score_result(answers.where(split=split)) for split in splits}, answers)


def score_result(answers: BehaviorResult) -> PopeScores:
    """Score answers to yes-no questions that were already read."""
    rows = answers.answers
    parser = str(answers.provenance.get("parser"))
    released = parser == "pope_release"
    unparsed = sum(a.given is None or (released and a.text is not None and yes_no(a.text) is None) for a in rows)
    return scores_of([a.given for a in rows], [a.answer for a in rows], [a.group for a in rows], unparsed, parser)


def score(
    answers: Sequence[str],
    labels: Sequence[str],
    parser: str = DEFAULT_PARSER,
    groups: Sequence[str] | None = None,
) -> PopeScores:
    """Score answers that were made anywhere; no model is needed.

    Parameters
    ----------
    answers
        The texts that answer the questions.
    labels
        ``yes`` or ``no``: the truth of each.
    parser
        How answers are read, one of `behavior.parsing.PARSERS`. By default a text that says neither yes nor no is
        unparsed and wrong; ``pope_release`` takes it for yes, as the release does.
    groups
        The image of each question, for the intervals; without them each question counts as an image of its own.

    Raises
    ------
    DataError
        For unequal lengths, no answers, or a label that is neither yes nor no.
    ConfigError
        For an unknown parser.
    """
    rule = named_parser(parser)
    if not len(answers) == len(labels) == len(labels if groups is None else groups):
        given = "" if groups is None else f" and {len(groups)} groups"
        msg = f"{len(answers)} answers for {len(labels)} labels{given}: each question needs one of each"
        raise DataError(msg)
    if not answers:
        msg = "there are no answers to score"
        raise DataError(msg)
    for number, label in enumerate(labels):
        if label not in {"yes", "no"}:
            msg = f"label {number} is '{label}', neither 'yes' nor 'no'"
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
    parser: str = DEFAULT_PARSER,
    *,
    labels: Path | str | Sequence[Path | str] | None = None,
    answer_field: str | None = None,
    id_field: str | None = None,
) -> PopeScores:
    """Score an answer file that was made anywhere against a question file; neither model nor images are needed.

    Parameters
    ----------
    questions
        A question file in a layout that `concepts.loaders.pope` reads. Where its ``category`` names several splits, the
        figures are over all lines, and by split in ``splits``; a row of several splits counts in each, and as often
        over all, as in VLMEvalKit.
    answers
        An answer file as for `behavior.answer_files.read_answers`, joined by id: ``<split>/<id>``, or the id alone, with
        the record's ``category`` where ids occur in several splits. Without ids, the answers are in the order of the
        questions, as in the benchmark's own evaluation. An answer that has its question must have the same one.
    parser
        How answers are read, one of `behavior.parsing.PARSERS`. By default a text that says neither yes nor no is
        unparsed and wrong; ``pope_release`` takes it for yes, as the release does.
    labels
        Label files for questions without labels, as for `concepts.loaders.pope`.
    answer_field, id_field
        As for `behavior.answer_files.read_answers`.

    Raises
    ------
    DataError
        Naming file and record, where a file cannot be read, can be read in two ways, or they do not belong together.
    ConfigError
        For an unknown parser.
    """
    from behavior.pope_files import join_answers

    named_parser(parser)
    rows = join_answers(questions, answers, labels, answer_field, id_field)

    def part(split: str | None = None) -> PopeScores:
        chosen = [row for row in rows if split in (None, row.split)]
        return score([r.text for r in chosen], [r.label for r in chosen], parser, [r.image for r in chosen])

    splits = list(dict.fromkeys(row.split for row in rows))
    return replace(part(), splits={split: part(split) for split in splits} if len(splits) > 1 else {})


# -- making questions ------------------------------------------------------------------------------------------------


def build(
    images: Mapping[str, Sequence[str]], seed: int = 0, per_image: int = 3, n_images: int | None = None
) -> dict[str, tuple[Question, ...]]:
    """Make POPE's three splits from what is in each image, by the rule of its release (RUCAIBox/POPE, ``utils.py``).

    Of images with at least `per_image` different objects, the first `per_image` are asked about (yes), and after each
    comes an object that is neither in the image, under its own name or a synonym (`concepts.nouns.Present`), nor was asked
    about it before (no). A plural is asked with "Are there":

    ``random``
        any object of the sampled images, all equally likely;
    ``popular``
        the one in most of the sampled images;
    ``adversarial``
        the one that most often shares a sampled image with the object just asked about.

    Equal counts are decided by which was met first, in the order of images and of their objects. Where popular or
    adversarial find none, it is drawn as in ``random``.

    Parameters
    ----------
    images
        Image path to its objects, in the order they are to be asked about; one named twice counts once.
    seed
        Decides which images are sampled and what ``random`` draws.
    per_image
        How many pairs of questions an image gets.
    n_images
        How many images to sample; all that have enough objects by default.

    Returns
    -------
    dict
        For each split its questions as a POPE file has them, ``question_id`` counted from 1.

    Raises
    ------
    ConfigError
        For fewer than 1 question or image.
    DataError
        Where there are not enough images, an object has no name, or nothing is left that could be asked about.
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
    able = [name for name, objects in distinct.items() if len(objects) >= per_image]
    wanted = len(able) if n_images is None else n_images
    if not able or wanted > len(able):
        msg = f"{wanted or 1} images with at least {per_image} different objects are needed, there are {len(able)}"
        raise DataError(msg)
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = range(len(able)) if n_images is None else rng.choice(len(able), size=wanted, replace=False)
    sampled = {able[int(i)]: distinct[able[int(i)]] for i in drawn}
    frequency = Counter(noun for objects in sampled.values() for noun in objects)
    together: dict[str, Counter[str]] = {noun: Counter() for noun in frequency}
    for objects in sampled.values():
        for noun in objects:
            together[noun].update(other for other in objects if other != noun)
    # `most_common` keeps the order in which equal ones were met.
    popular = [noun for noun, _ in frequency.most_common()]
    partners = {noun: [other for other, _ in counts.most_common()] for noun, counts in together.items()}
    orders: dict[str, Callable[[str], list[str]]] = {
        "random": lambda _: [],
        "popular": lambda _: popular,
        "adversarial": lambda noun: partners[noun],
    }
    return {
        split: tuple(_questions(sampled, list(frequency), order, per_image, rng)) for split, order in orders.items()
    }


def questions_about(
    data: ConceptDataset, seed: int = 0, per_image: int = 3, n_images: int | None = None
) -> ConceptDataset:
    """Make POPE's three splits about the images of a dataset, from the objects that its examples have.

    Any annotated data will do: scenes, and what `concepts.loaders` reads of COCO, GQA, Visual Genome or CLEVR. The
    parameters and errors are those of `build`; an image is a group of `data`, its objects in their order.

    Returns
    -------
    ConceptDataset
        Existence questions of the splits ``random``, ``popular`` and ``adversarial``, as a file of `write_questions`
        would give them, with the objects and boxes of `data`.
    """
    from concepts.nouns import asked_noun

    first = {e.group: e for e in reversed(data.examples)}
    shown = {name: first[name] for name in dict.fromkeys(e.group for e in data)}
    built = build({name: [o.noun for o in e.objects] for name, e in shown.items()}, seed, per_image, n_images)
    examples = []
    for split, records in built.items():
        for record in records:
            example, text = shown[str(record["image"])], str(record["text"])
            noun = asked_noun(text) or ""
            truth = record["label"] == "yes"
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
                    labels={"object:named": truth, f"object:{noun}": truth},
                    subject=next((o.id for o in example.objects if o.noun == noun), None),
                    prior_answer=None,
                )
            )
    made = {"maker": "behavior.pope", "seed": seed, "per_image": per_image, "n_images": n_images, "of": data.digest}
    return ConceptDataset(f"pope-{data.name}", tuple(examples), made)


def _questions(
    sampled: Mapping[str, Sequence[str]],
    known: Sequence[str],
    order: Callable[[str], list[str]],
    per_image: int,
    rng: np.random.Generator,
) -> Iterable[Question]:
    from concepts.nouns import Present, existence_question, thing

    number = 0
    for image, objects in sampled.items():
        present, denied = Present(objects), set[str]()
        for positive in objects[:per_image]:
            free_first = (noun for noun in order(positive) if not present.includes(noun) and thing(noun) not in denied)
            negative = next(free_first, None)
            if negative is None:
                free = [noun for noun in known if not present.includes(noun) and thing(noun) not in denied]
                if not free:
                    msg = (
                        f"image '{image}': none of the {len(known)} objects is left that is not in it or already asked "
                        "about; give more images, or ask for fewer questions an image"
                    )
                    raise DataError(msg)
                negative = free[int(rng.integers(len(free)))]
            denied.add(thing(negative))
            for noun, label in ((positive, "yes"), (negative, "no")):
                number += 1
                text = existence_question(noun)
                yield {"question_id": number, "image": image, "text": text, "label": label}


def write_questions(path: Path | str, records: Iterable[Question]) -> None:
    """Write questions in POPE's file layout, a JSON object a line; `concepts.loaders.pope` reads it."""
    lines = [json.dumps(dict(record), ensure_ascii=False) + "\n" for record in records]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, "".join(lines).encode())
