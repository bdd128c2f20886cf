"""AMBER, discriminative part: whether what is not so is denied (Wang et al. 2023, arXiv 2311.07397)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from behavior.answer_files import matched, read_answers
from behavior.parsing import named_parser
from behavior.result import Answer, BehaviorResult
from concepts.loaders.amber import described
from concepts.reading.records import read_records
from groundscope.core.errors import DataError
from groundscope.core.statistics import Estimate, estimate

if TYPE_CHECKING:
    import pandas as pd

DIMENSIONS: Mapping[str, str] = MappingProxyType(
    {"object": "existence", "attribute": "attribute", "relation": "relation"}
)
"""Level of a question to the benchmark's word for it."""
FIGURES = ("accuracy", "precision", "recall", "f1")


@dataclass(frozen=True)
class AmberScores:
    """AMBER's figures, ``no`` being the positive answer, with 95 % intervals clustered by image.

    An answer that is neither yes nor no is wrong, and no prediction of no. A figure that is 0 / 0 is NaN. F1 is the
    harmonic mean itself; the release adds 0.0001 to its denominator.
    """

    n: int
    accuracy: Estimate
    precision: Estimate
    """Truly no among those answered no."""
    recall: Estimate
    """Answered no among those that are truly no."""
    f1: Estimate
    unparsed: int
    """Answers that are neither yes nor no."""


@dataclass(frozen=True)
class AmberResult:
    """Scores over all, by dimension, and by kind of attribute."""

    parts: Mapping[str, AmberScores]
    """``all``; ``existence``, ``attribute``, ``relation``; ``state``, ``number``, ``action``: those that were asked."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))

    def frame(self) -> pd.DataFrame:
        """Return one row a part: ``n``, ``unparsed``, and each figure with ``<figure>_low`` and ``<figure>_high``."""
        import pandas as pd

        rows = []
        for part, scores in self.parts.items():
            row: dict[str, object] = {"part": part, "n": scores.n, "unparsed": scores.unparsed}
            for name in FIGURES:
                figure: Estimate = getattr(scores, name)
                row |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
            rows.append(row)
        return pd.DataFrame(rows)


def score(answers: BehaviorResult) -> AmberResult:
    """Score answers to AMBER's yes-no questions, as `concepts.loaders.amber` asks them; descriptions are passed over.

    Raises
    ------
    DataError
        Where there is no yes-no question.
    """
    rows = [a for a in answers.answers if set(a.candidates) == {"yes", "no"}]
    if not rows:
        msg = "there are no answers to yes-no questions to score"
        raise DataError(msg)
    parts: dict[str, list[Answer]] = {"all": rows}
    for level, dimension in DIMENSIONS.items():
        parts[dimension] = [a for a in rows if a.level == level]
    for kind in ("state", "number", "action"):
        parts[kind] = [a for a in rows if a.kind == kind]
    return AmberResult({name: _scores(part) for name, part in parts.items() if part})


def score_files(
    annotations: Path | str, responses: Path | str, queries: Path | str | None = None, parser: str = "amber_release"
) -> AmberResult:
    """Score a response file that was made anywhere; neither model nor images are needed.

    Parameters
    ----------
    annotations
        The benchmark's: a list whose entry number ``id`` (from 1) has ``type`` and ``truth``.
    responses
        ``[{id, response}]``, of all or some of the yes-no questions; descriptions are passed over.
    queries
        ``[{id, image, query}]``: where given, intervals are clustered by its images; else each question counts as an
        image of its own, and intervals are too narrow.
    parser
        How responses are read, one of `behavior.parsing.PARSERS`.

    Raises
    ------
    DataError
        Naming file and record: what cannot be read, an id without an annotation or answered twice, an unknown type, a
        truth that is neither yes nor no.
    ConfigError
        For an unknown parser.
    """
    from behavior.result import Cost

    rule = named_parser(parser)
    truths = list(read_records(Path(annotations)))
    given = read_answers(responses)
    every = {str(number): str(number) for number in range(1, len(truths) + 1)}
    found = matched(given, {a.id: a.id for a in given if a.id in every} if given[0].id else every, responses)
    images = {}
    if queries is not None:
        images = {r.identifier("id"): r.text("image") for r in read_records(Path(queries))}
    rows: list[Answer] = []
    for number, answer in found.items():
        level, kind, truth = described(truths[int(number) - 1])
        if kind == "caption":
            continue
        said = rule(answer.text)
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
                given=said,
                correct=said == truth,
                text=answer.text,
            )
        )
    return score(BehaviorResult(tuple(rows), Cost(None, None, len(rows))))


def _scores(rows: Sequence[Answer]) -> AmberScores:
    groups = [a.group for a in rows]
    said = [a.given == "no" for a in rows]
    true = [a.answer == "no" for a in rows]
    hits = [s and t for s, t in zip(said, true, strict=True)]
    return AmberScores(
        n=len(rows),
        accuracy=estimate([bool(a.correct) for a in rows], groups),
        precision=estimate(hits, groups, said),
        recall=estimate(hits, groups, true),
        f1=estimate([2 * h for h in hits], groups, [s + t for s, t in zip(said, true, strict=True)]),
        unparsed=sum(a.given is None for a in rows),
    )
