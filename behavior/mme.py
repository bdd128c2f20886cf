"""Score MME: each subtask by accuracy over questions plus accuracy over images (Fu et al. 2023, arXiv 2306.13394)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from behavior.parsing import named_parser
from behavior.result import Answer, BehaviorResult
from concepts.concept import LEVELS, Level
from concepts.loaders.mme import COGNITION, LEVEL_OF, answer_of, subtask_files
from concepts.reading.tables import read_tab_separated
from groundscope.core.errors import DataError
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import Estimate, estimate
from groundscope.core.text import format_count

if TYPE_CHECKING:
    import pandas as pd

HALLUCINATION: Mapping[str, Level] = MappingProxyType(
    {name: LEVEL_OF[name] for name in ("existence", "count", "position", "color")}
)
"""The hallucination subtasks and their levels."""


@dataclass(frozen=True)
class SubtaskScores:
    """Scores of one subtask, with 95 % intervals clustered by image.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("image 1", "neutral", "object", "existence")
    >>> right = gs.Answer("q1", *about, "Is there a cat?", "yes", ("yes", "no"), given="yes", correct=True)
    >>> wrong = gs.Answer("q2", *about, "Is there a dog?", "no", ("yes", "no"), given="yes", correct=False)
    >>> answers = gs.BehaviorResult((right, wrong), gs.Cost(None, None, 2))
    >>> scores = gs.behavior.mme.score(answers).subtasks["existence"]
    >>> scores.accuracy.value, scores.accuracy_plus.value, scores.score.value
    (0.5, 0.0, 50.0)
    """

    n: int
    """Number of questions, two per image."""
    accuracy: Estimate
    """Share of questions answered correctly."""
    accuracy_plus: Estimate
    """Share of images with both questions answered correctly."""
    score: Estimate
    """100 (accuracy + accuracy_plus), 0 to 200."""
    unparsed: int
    """Answers that are neither yes nor no; they count as wrong."""


@dataclass(frozen=True)
class MmeScores:
    """MME's scores by subtask, and their sums.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("neutral", "object", "count", "Are there two cats?", "yes", ("yes", "no"))
    >>> rows = [gs.Answer(f"q{i}", "image 1", *about, given="yes", correct=True) for i in range(2)]
    >>> scores = gs.behavior.mme.score(gs.BehaviorResult(tuple(rows), gs.Cost(None, None, 2)))
    >>> scores.perception, scores.cognition, scores.levels
    (200.0, 0, {'object': 200.0})
    """

    subtasks: Mapping[str, SubtaskScores]

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "subtasks", MappingProxyType(dict(self.subtasks)))

    @property
    def perception(self) -> float:
        """Sum of the scores of the available perception subtasks; at most 2,000."""
        return sum(s.score.value for name, s in self.subtasks.items() if name not in COGNITION)

    @property
    def cognition(self) -> float:
        """Sum of the scores of the available cognition subtasks; at most 800."""
        return sum(s.score.value for name, s in self.subtasks.items() if name in COGNITION)

    @property
    def levels(self) -> Mapping[str, float]:
        """Sum of the available scores of existence and count (object), color (attribute), position (relation)."""
        level_of = {name: level for name, level in HALLUCINATION.items() if name in self.subtasks}
        return {
            level: sum(self.subtasks[name].score.value for name, its_level in level_of.items() if its_level == level)
            for level in LEVELS
            if level in level_of.values()
        }

    def frame(self) -> pd.DataFrame:
        """Return one row per subtask: ``n``, ``unparsed``, and each figure with ``<figure>_low`` and ``<figure>_high``."""
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
    """Score answers to MME questions, as loaded by `concepts.loaders.mme`: the kind of a question is its subtask.

    Raises
    ------
    DataError
        For other questions, and for an image without exactly two questions.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("neutral", "attribute", "color", "Is the cat black?", "yes", ("yes", "no"))
    >>> rows = [gs.Answer(f"q{i}", "image 1", *about, given="yes", correct=True) for i in range(2)]
    >>> answers = gs.BehaviorResult(tuple(rows), gs.Cost(None, None, 2))
    >>> gs.behavior.mme.score(answers).subtasks["color"].score.value
    200.0
    """
    return _scores({name: _pair_by_image(name, part) for name, part in _split_by_subtask(answers.answers).items()})


def score_files(answers: Path | str, *, parser: str = "mme") -> MmeScores:
    r"""Score answer files from any source; neither model nor images are needed.

    As in the release, two consecutive lines are the two questions about an image; here, consecutive lines about different
    images are an error. The parser ``mme`` is the rule of the release, with the errors that `behavior.parsing.mme` lists.

    Parameters
    ----------
    answers
        A file of one subtask, or a folder of such files: lines ``image \t question \t true answer \t response`` in a file
        named after the subtask. This is the layout of the benchmark's own evaluation; tabs and line breaks in a response
        must be replaced by spaces.
    parser
        Name of the parser of answers, one of `behavior.parsing.PARSERS`.

    Raises
    ------
    DataError
        Names the file and line: for other columns, an unknown subtask, a true answer that is neither yes nor no, two
        consecutive lines about different images, or an odd number of lines.
    ConfigError
        For an unknown parser.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from behavior import mme
    >>> path = Path(tempfile.mkdtemp()) / "existence.txt"
    >>> rows = [("1.jpg", "Is there a cat?", "Yes", "Yes"), ("1.jpg", "Is there a dog?", "No", "Yes")]
    >>> _ = path.write_text("\n".join("\t".join(row) for row in rows))
    >>> mme.score_files(path).subtasks["existence"].score.value
    50.0
    """
    parse = named_parser(parser)
    subtasks: dict[str, list[tuple[Answer, Answer]]] = {}
    for subtask, file in subtask_files(Path(answers)).items():
        rows: list[Answer] = []
        places: list[str] = []
        for number, record in enumerate(read_tab_separated(file, ("image", "question", "answer", "response")), 1):
            true_answer, parsed = answer_of(record), parse(record.values["response"])
            places.append(record.where)
            rows.append(
                Answer(
                    id=f"{subtask}/{number}",
                    group=record.text("image"),
                    split="neutral",
                    level=LEVEL_OF.get(subtask, "object"),
                    kind=subtask,
                    question=record.text("question"),
                    answer=true_answer,
                    candidates=("yes", "no"),
                    given=parsed,
                    correct=parsed == true_answer,
                    text=record.values["response"],
                )
            )
        if rows:
            subtasks[subtask] = _pair_lines(subtask, rows, places)
    return _scores(subtasks)


def _pair_lines(subtask: str, rows: list[Answer], places: list[str]) -> list[tuple[Answer, Answer]]:
    """Pair consecutive lines, as the release does."""
    if len(rows) % 2:
        msg = (
            f"subtask '{subtask}', image '{rows[-1].group}': 1 question, but MME asks two questions per image, in "
            "consecutive lines"
        )
        raise DataError(msg)
    for first, second, place in zip(rows[::2], rows[1::2], places[1::2], strict=True):
        if first.group != second.group:
            msg = (
                f"{place}: image '{second.group}', but the previous line is about '{first.group}'; put the two questions "
                "about an image in consecutive lines, as in the release"
            )
            raise DataError(msg)
    return list(zip(rows[::2], rows[1::2], strict=True))


def _split_by_subtask(rows: Iterable[Answer]) -> dict[str, list[Answer]]:
    subtasks: dict[str, list[Answer]] = {}
    for row in rows:
        if row.kind not in LEVEL_OF and row.kind not in COGNITION:
            msg = f"question '{row.id}' is of kind '{row.kind}', which is not a subtask of MME"
            raise DataError(msg)
        subtasks.setdefault(row.kind, []).append(row)
    return subtasks


def _pair_by_image(subtask: str, rows: Iterable[Answer]) -> list[tuple[Answer, Answer]]:
    """Pair the questions about each image, in any order."""
    images: dict[str, list[Answer]] = {}
    for row in rows:
        images.setdefault(row.group, []).append(row)
    for image, questions in images.items():
        if len(questions) != 2:
            msg = (
                f"subtask '{subtask}', image '{image}': {format_count(len(questions), 'question')}, but MME asks two "
                "questions per image; remove or complete them"
            )
            raise DataError(msg)
    return [(first, second) for first, second in images.values()]


def _scores(subtasks: Mapping[str, list[tuple[Answer, Answer]]]) -> MmeScores:
    if not subtasks:
        msg = "no answers to score"
        raise DataError(msg)
    return MmeScores({name: _subtask(pairs) for name, pairs in subtasks.items()})


def _subtask(pairs: Sequence[tuple[Answer, Answer]]) -> SubtaskScores:
    rows = [row for pair in pairs for row in pair]
    correct = [(bool(first.correct), bool(second.correct)) for first, second in pairs]
    groups = [first.group for first, _ in pairs]
    # 100 (acc + acc+) is 200 times the mean over images of (share of correct answers + both correct) / 2.
    mean_score = estimate([(sum(both) / 2 + all(both)) / 2 for both in correct], groups)
    return SubtaskScores(
        n=len(rows),
        accuracy=estimate([bool(r.correct) for r in rows], [r.group for r in rows]),
        accuracy_plus=estimate([all(both) for both in correct], groups),
        score=Estimate(
            200 * mean_score.value, 200 * mean_score.low, 200 * mean_score.high, mean_score.n, mean_score.few_groups
        ),
        unparsed=sum(r.given is None for r in rows),
    )
