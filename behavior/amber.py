"""Score AMBER's discriminative part: does the model answer no to false claims? (Wang et al. 2023, arXiv 2311.07397)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from behavior.answer_files import AskedQuestion, match_answers, read_answers
from behavior.parsing import named_parser
from behavior.result import Answer, BehaviorResult
from concepts.loaders.amber import annotations_by_id, read_annotation
from concepts.reading.records import read_json_records
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import Estimate, estimate

if TYPE_CHECKING:
    import pandas as pd

DIMENSIONS: Mapping[str, str] = MappingProxyType(
    {"object": "existence", "attribute": "attribute", "relation": "relation"}
)
"""Level of a question to the benchmark's name for it."""
FIGURES = ("accuracy", "precision", "recall", "f1")
VARIANTS = ("release", "exact")
"""``release``: the figures as the released script prints them. ``exact``: the unrounded ratios."""


@dataclass(frozen=True)
class AmberScores:
    """AMBER's figures with ``no`` as the positive class, with 95 % intervals clustered by image.

    An answer that is neither yes nor no is wrong and does not count as a predicted ``no``.

    ``release`` reproduces junyangwang0410/AMBER, ``inference.py``, commit 534babf, which prints percentages with one
    decimal, including its deviations from the definitions: .001 is added to each denominator (.003 for ``attribute``,
    which sums three kinds), so 0 / 0 becomes 0; F1 is computed from the rounded precision P and recall R as
    2PR / (P + R + .0001), with .001 for existence, and rounded again. The figures here are the printed ones divided by
    100; the intervals are those of the exact ratios. With ``exact``, 0 / 0 is NaN.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("neutral", "object", "existence", "Is there a cat?")
    >>> rows = [gs.Answer(f"q{i}", f"image {i}", *about, t, ("yes", "no"), "no", t == "no") for i, t in enumerate(["no", "yes"])]
    >>> answers = gs.BehaviorResult(tuple(rows), gs.Cost(None, None, 2))
    >>> scores = gs.behavior.amber.score(answers, variant="exact").parts["all"]
    >>> scores.precision.value, scores.recall.value
    (0.5, 1.0)
    """

    n: int
    accuracy: Estimate
    precision: Estimate
    """Share of questions whose true answer is no, among those answered no."""
    recall: Estimate
    """Share of questions answered no, among those whose true answer is no."""
    f1: Estimate
    unparsed: int
    """Answers that are neither yes nor no."""


@dataclass(frozen=True)
class AmberResult:
    """Scores over all questions, by dimension, and by kind of attribute.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("neutral", "attribute", "state", "Is the cat asleep?", "no", ("yes", "no"))
    >>> rows = [gs.Answer(f"q{i}", f"image {i}", *about, given="no", correct=True) for i in range(4)]
    >>> result = gs.behavior.amber.score(gs.BehaviorResult(tuple(rows), gs.Cost(None, None, 4)))
    >>> result.frame()["part"].tolist()
    ['all', 'attribute', 'state']
    """

    parts: Mapping[str, AmberScores]
    """Keys: ``all``; ``existence``, ``attribute``, ``relation``; ``state``, ``number``, ``action``; only parts with answers."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))

    def frame(self) -> pd.DataFrame:
        """Return one row per part: ``n``, ``unparsed``, and each figure with ``<figure>_low`` and ``<figure>_high``."""
        import pandas as pd

        rows = []
        for part, scores in self.parts.items():
            row: dict[str, object] = {"part": part, "n": scores.n, "unparsed": scores.unparsed}
            for name in FIGURES:
                figure: Estimate = getattr(scores, name)
                row |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
            rows.append(row)
        return pd.DataFrame(rows)


def score(answers: BehaviorResult, *, variant: str = "release") -> AmberResult:
    """Score answers to AMBER's yes-no questions, as loaded by `concepts.loaders.amber`; descriptions are ignored.

    Parameters
    ----------
    answers
        The answers.
    variant
        One of `VARIANTS`; see `AmberScores`.

    Raises
    ------
    DataError
        If there is no answer to a yes-no question.
    ConfigError
        For an unknown variant.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("neutral", "object", "existence", "Is there a cat?", "no", ("yes", "no"))
    >>> given = ["no", "no", "no", "yes"]
    >>> rows = [gs.Answer(f"q{i}", f"image {i}", *about, text, text == "no") for i, text in enumerate(given)]
    >>> answers = gs.BehaviorResult(tuple(rows), gs.Cost(None, None, 4))
    >>> gs.behavior.amber.score(answers, variant="exact").parts["existence"].recall.value
    0.75
    """
    if variant not in VARIANTS:
        msg = f"unknown variant '{variant}'; choose from {', '.join(VARIANTS)}"
        raise ConfigError(msg)
    rows = [a for a in answers.answers if set(a.candidates) == {"yes", "no"}]
    if not rows:
        msg = "there are no answers to yes-no questions to score"
        raise DataError(msg)
    parts: dict[str, list[Answer]] = {"all": rows}
    for level, dimension in DIMENSIONS.items():
        parts[dimension] = [a for a in rows if a.level == level]
    for kind in ("state", "number", "action"):
        parts[kind] = [a for a in rows if a.kind == kind]
    return AmberResult({name: _scores(name, part, variant) for name, part in parts.items() if part})


def score_files(
    annotations: Path | str,
    responses: Path | str,
    queries: Path | str | None = None,
    *,
    parser: str = "amber_release",
    variant: str = "release",
    answer_field: str | None = None,
) -> AmberResult:
    """Score a response file from any source; neither model nor images are needed.

    Parameters
    ----------
    annotations
        The benchmark's file: a list of ``{id, type, truth}`` in any order; without ids, entries are numbered from 1.
    responses
        ``[{id, response}]`` for all or some of the yes-no questions, in any order; descriptions are ignored. Without
        ids, one response per annotation, in the same order.
    queries
        ``[{id, image, query}]``: if present, intervals are clustered by its images; otherwise each question counts as
        an image, and intervals are too narrow.
    parser
        Name of the parser of responses, one of `behavior.parsing.PARSERS`.
    variant
        One of `VARIANTS`; see `AmberScores`.
    answer_field
        As for `behavior.answer_files.read_answers`.

    Raises
    ------
    DataError
        Names the file and record: for unreadable content, an id without an annotation, an id answered twice, an unknown
        type, or a truth that is neither yes nor no.
    ConfigError
        For an unknown parser or variant.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from behavior import amber
    >>> folder = Path(tempfile.mkdtemp())
    >>> truths = [{"id": i, "type": "discriminative-hallucination", "truth": "no"} for i in (1, 2)]
    >>> _ = (folder / "annotations.json").write_text(json.dumps(truths))
    >>> _ = (folder / "responses.json").write_text(json.dumps([{"id": 1, "response": "No"}, {"id": 2, "response": "Yes"}]))
    >>> result = amber.score_files(folder / "annotations.json", folder / "responses.json", variant="exact")
    >>> result.parts["existence"].accuracy.value
    0.5
    """
    from behavior.result import Cost

    parse = named_parser(parser)
    truths = annotations_by_id(Path(annotations))
    records = read_answers(responses, answer_field)
    ids = list(truths) if records[0].id is None else [str(a.id) for a in records if a.id in truths]
    matches = match_answers(records, [AskedQuestion(number) for number in ids], responses)
    images: dict[str, str] = {}
    if queries is not None:
        for record in read_json_records(Path(queries)):
            number = record.identifier("id")
            if number in images or number not in truths:
                what = "was already used" if number in images else "has no annotation"
                msg = f"{record.where}: field 'id': {number} {what}"
                raise DataError(msg)
            images[number] = record.text("image")
    rows: list[Answer] = []
    for number, answer in matches.items():
        level, kind, truth = read_annotation(truths[number])
        if kind == "caption":
            continue
        if queries is not None and number not in images:
            msg = f"{queries}: no query with id '{number}', which {answer.where} answers"
            raise DataError(msg)
        parsed = parse(answer.text)
        rows.append(
            Answer(
                id=number,
                group=images.get(number, number),
                split="neutral",
                level=level,
                kind=kind,
                question="",
                answer=truth,
                candidates=("yes", "no"),
                given=parsed,
                correct=parsed == truth,
                text=answer.text,
            )
        )
    return score(BehaviorResult(tuple(rows), Cost(None, None, len(rows))), variant=variant)


def _scores(part: str, rows: Sequence[Answer], variant: str) -> AmberScores:
    groups = [a.group for a in rows]
    predicted_no = [a.given == "no" for a in rows]
    true_no = [a.answer == "no" for a in rows]
    hits = [s and t for s, t in zip(predicted_no, true_no, strict=True)]
    exact = AmberScores(
        n=len(rows),
        accuracy=estimate([bool(a.correct) for a in rows], groups),
        precision=estimate(hits, groups, predicted_no),
        recall=estimate(hits, groups, true_no),
        f1=estimate([2 * h for h in hits], groups, [s + t for s, t in zip(predicted_no, true_no, strict=True)]),
        unparsed=sum(a.given is None for a in rows),
    )
    if variant == "exact":
        return exact
    # The release initializes each denominator with .001 and sums the denominators of the three kinds of attributes.
    offset = 0.003 if part == "attribute" else 0.001

    def rounded_ratio(numerator: float, denominator: float) -> float:
        return round(numerator / denominator * 100, 1) / 100

    precision = rounded_ratio(sum(hits), sum(predicted_no) + offset)
    recall = rounded_ratio(sum(hits), sum(true_no) + offset)
    harmonic = rounded_ratio(2 * precision * recall, precision + recall + (0.001 if part == "existence" else 0.0001))
    accuracy = rounded_ratio(sum(bool(a.correct) for a in rows), len(rows) + offset)
    values = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": harmonic}
    return replace(exact, **{name: _with_value(getattr(exact, name), value) for name, value in values.items()})


def _with_value(exact: Estimate, value: float) -> Estimate:
    """Return an estimate with the rounded value and the exact figure's interval, widened to contain the value."""
    return Estimate(value, min(exact.low, value), max(exact.high, value), exact.n, exact.few_groups)
