"""MME: a subtask's score is what of its questions, and of its pairs of questions, is right (Fu et al. 2023, 2306.13394)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from behavior.parsing import named_parser
from behavior.result import Answer, BehaviorResult
from concepts.loaders.mme import COGNITION, LEVEL_OF, answer_of, subtask_files
from concepts.reading.records import read_table
from concepts.schema import LEVELS, Level
from groundscope.core.errors import DataError
from groundscope.core.statistics import Estimate, estimate

if TYPE_CHECKING:
    import pandas as pd

HALLUCINATION: Mapping[str, Level] = MappingProxyType(
    {name: LEVEL_OF[name] for name in ("existence", "count", "position", "color")}
)
"""The subtasks about what is in an image and how it is, with their levels."""


@dataclass(frozen=True)
class SubtaskScores:
    """One subtask, with 95 % intervals clustered by image."""

    n: int
    """Questions; half as many images."""
    accuracy: Estimate
    """Right answers among the questions."""
    accuracy_plus: Estimate
    """Images with both questions right among the images."""
    score: Estimate
    """100 (accuracy + accuracy_plus), 0 to 200."""
    unparsed: int
    """Answers that are neither yes nor no; they count as wrong."""


@dataclass(frozen=True)
class MmeScores:
    """MME by subtask, and what follows."""

    subtasks: Mapping[str, SubtaskScores]

    def __post_init__(self) -> None:
        object.__setattr__(self, "subtasks", MappingProxyType(dict(self.subtasks)))

    @property
    def perception(self) -> float:
        """Sum of the scores of the subtasks of perception that there are; 2,000 at most."""
        return sum(s.score.value for name, s in self.subtasks.items() if name not in COGNITION)

    @property
    def cognition(self) -> float:
        """Sum of the scores of the subtasks of cognition that there are; 800 at most."""
        return sum(s.score.value for name, s in self.subtasks.items() if name in COGNITION)

    @property
    def levels(self) -> Mapping[str, float]:
        """Sum of the scores of existence and count (object), color (attribute), position (relation), where they are."""
        here = {name: level for name, level in HALLUCINATION.items() if name in self.subtasks}
        return {
            level: sum(self.subtasks[name].score.value for name, of in here.items() if of == level)
            for level in LEVELS
            if level in here.values()
        }

    def frame(self) -> pd.DataFrame:
        """Return one row a subtask: ``n``, ``unparsed``, and each figure with ``<figure>_low`` and ``<figure>_high``."""
        import pandas as pd

        rows = []
        for subtask, scores in self.subtasks.items():
            row: dict[str, object] = {"subtask": subtask, "n": scores.n, "unparsed": scores.unparsed}
            for name in ("accuracy", "accuracy_plus", "score"):
                figure: Estimate = getattr(scores, name)
                row |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
            rows.append(row)
        return pd.DataFrame(rows)


def score(answers: BehaviorResult) -> MmeScores:
    """Score answers to MME questions, as `concepts.loaders.mme` asks them: the kind of a question is its subtask.

    Raises
    ------
    DataError
        For other questions, and for an image that has not just two of them.
    """
    return _scores({name: _by_image(name, part) for name, part in _by_subtask(answers.answers).items()})


def score_files(answers: Path | str, parser: str = "mme") -> MmeScores:
    r"""Score answer files that were made anywhere; neither model nor images are needed.

    As in the release, two consecutive lines are the two questions of an image; two lines about unlike images are
    refused here. The parser ``mme`` is the rule of the release, with the slips that `behavior.parsing.mme` lists.

    Parameters
    ----------
    answers
        A file of one subtask, or a folder of them: lines ``image \t question \t true answer \t response``, the file
        named like the subtask. This is the layout of the benchmark's own evaluation; tabs and line breaks of a response
        must have been written as spaces.
    parser
        How answers are read, one of `behavior.parsing.PARSERS`.

    Raises
    ------
    DataError
        Naming file and line: other columns, an unknown subtask, a true answer that is neither yes nor no; two
        consecutive lines that are about unlike images, and a last line without another.
    ConfigError
        For an unknown parser.
    """
    rule = named_parser(parser)
    subtasks: dict[str, list[tuple[Answer, Answer]]] = {}
    for subtask, file in subtask_files(Path(answers)).items():
        rows: list[Answer] = []
        places: list[str] = []
        for number, record in enumerate(read_table(file, ("image", "question", "answer", "response")), 1):
            truth, given = answer_of(record), rule(record.values["response"])
            places.append(record.where)
            rows.append(
                Answer(
                    id=f"{subtask}/{number}",
                    group=record.text("image"),
                    split="neutral",
                    level=LEVEL_OF.get(subtask, "object"),
                    kind=subtask,
                    question=record.text("question"),
                    answer=truth,
                    candidates=("yes", "no"),
                    given=given,
                    correct=given == truth,
                    text=record.values["response"],
                )
            )
        if rows:
            subtasks[subtask] = _by_line(subtask, rows, places)
    return _scores(subtasks)


def _by_line(subtask: str, rows: list[Answer], places: list[str]) -> list[tuple[Answer, Answer]]:
    """Pair consecutive lines, as the release does."""
    if len(rows) % 2:
        msg = (
            f"subtask '{subtask}', image '{rows[-1].group}': 1 questions, but MME asks two of each image, line by line"
        )
        raise DataError(msg)
    for first, second, place in zip(rows[::2], rows[1::2], places[1::2], strict=True):
        if first.group != second.group:
            msg = (
                f"{place}: image '{second.group}', but the line before is about '{first.group}'; the release takes two "
                "consecutive lines as the questions of one image: write them so"
            )
            raise DataError(msg)
    return list(zip(rows[::2], rows[1::2], strict=True))


def _by_subtask(rows: Iterable[Answer]) -> dict[str, list[Answer]]:
    subtasks: dict[str, list[Answer]] = {}
    for row in rows:
        if row.kind not in LEVEL_OF and row.kind not in COGNITION:
            msg = f"question '{row.id}' is of kind '{row.kind}', which is no subtask of MME"
            raise DataError(msg)
        subtasks.setdefault(row.kind, []).append(row)
    return subtasks


def _by_image(subtask: str, rows: Iterable[Answer]) -> list[tuple[Answer, Answer]]:
    """Pair the questions of an image, in whatever order they are."""
    images: dict[str, list[Answer]] = {}
    for row in rows:
        images.setdefault(row.group, []).append(row)
    for image, both in images.items():
        if len(both) != 2:
            msg = f"subtask '{subtask}', image '{image}': {len(both)} questions, but MME asks two of each image"
            raise DataError(msg)
    return [(first, second) for first, second in images.values()]


def _scores(subtasks: Mapping[str, list[tuple[Answer, Answer]]]) -> MmeScores:
    if not subtasks:
        msg = "there are no answers to score"
        raise DataError(msg)
    return MmeScores({name: _subtask(pairs) for name, pairs in subtasks.items()})


def _subtask(pairs: Sequence[tuple[Answer, Answer]]) -> SubtaskScores:
    rows = [row for pair in pairs for row in pair]
    right = [(bool(first.correct), bool(second.correct)) for first, second in pairs]
    groups = [first.group for first, _ in pairs]
    # 100 (acc + acc+) is a mean over pairs of half the right answers and of both being right, which 0 to 200 scales.
    whole = estimate([(sum(both) / 2 + all(both)) / 2 for both in right], groups)
    return SubtaskScores(
        n=len(rows),
        accuracy=estimate([bool(r.correct) for r in rows], [r.group for r in rows]),
        accuracy_plus=estimate([all(both) for both in right], groups),
        score=Estimate(200 * whole.value, 200 * whole.low, 200 * whole.high, whole.n, whole.few_groups),
        unparsed=sum(r.given is None for r in rows),
    )
