"""A benchmark: its questions, the layout of its answer files, and its released rule; one entry of the registry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.text import nearest

if TYPE_CHECKING:
    from concepts.image_source import ImageSource
    from concepts.reading.record import Record

QUESTIONS = "questions"
"""Name of the file with a benchmark's questions."""


@dataclass(frozen=True)
class AnswerLayout:
    """Fields of the records of a benchmark's own answer files.

    Examples
    --------
    >>> from behavior.benchmarks import BENCHMARKS
    >>> BENCHMARKS["reefknot"].answers.text
    ('response',)
    """

    text: tuple[str, ...]
    """Fields that may hold the model's answer, the first present one is used."""
    ids: tuple[str, ...] = ()
    """Fields that identify the question, the first present one is used."""
    question: tuple[str, ...] = ("prompt", "question", "query")
    """Fields that may hold the question."""
    image: tuple[str, ...] = ("image", "image_id", "filename")
    """Fields that may hold the name of the image."""
    identify: Callable[[Record], str] | None = None
    """Function that makes the id of a record from several fields; it replaces `ids`."""
    text_alone: bool = False
    """Whether the release's answer files record the question and no image, so that answers without ids may be matched by
    place where the questions agree line by line."""


@dataclass(frozen=True)
class Judge:
    """How answers go to a benchmark's judge, and how its verdicts come back.

    Examples
    --------
    >>> from behavior.benchmarks import BENCHMARKS
    >>> BENCHMARKS["haelm"].judge.by_place
    False
    """

    write: Callable[[Sequence[AnsweredQuestion], Path], int]
    """Writes answers in the layout that the released judge reads; returns their number."""
    read: Callable[[Path], Sequence[tuple[str | None, Any, str]]]
    """Reads a verdict file: for each verdict the question's id (None in files without ids), the verdict, and its place."""
    by_place: bool = False
    """Whether the released verdict files have no ids; their verdicts are matched by place only on request."""


@dataclass(frozen=True)
class Scoring:
    """What the rule of a benchmark scores.

    Examples
    --------
    >>> from behavior.benchmarks.specification import Scoring
    >>> Scoring((), (), {}, "release").missing
    ()
    """

    questions: tuple[BenchmarkQuestion, ...]
    rows: tuple[AnsweredQuestion, ...]
    """Questions with an answer, in the order of the answer file."""
    files: Mapping[str, Path]
    variant: str
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Functions that the rule needs and this package does not have, by name."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of questions without an answer."""
        answered = {row.question.id for row in self.rows}
        return tuple(q.id for q in self.questions if q.id not in answered)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: an entry of `BENCHMARKS`.

    Examples
    --------
    >>> from behavior.benchmarks import BENCHMARKS
    >>> BENCHMARKS["naturalbench"].tasks, BENCHMARKS["naturalbench"].needs
    (('yes/no', 'choice'), ('questions',))
    """

    title: str
    source: str
    """Paper, and repository and commit whose rule is reproduced."""
    tasks: tuple[str, ...]
    """Kinds of task, of `TASKS`."""
    levels: tuple[str, ...]
    """Levels of its questions; empty if they have no level."""
    files: Mapping[str, str]
    """Name of a file to what it holds."""
    read: Callable[[Mapping[str, Path]], Sequence[BenchmarkQuestion]]
    """Function of the files that returns the questions."""
    score: Callable[[Scoring], BenchmarkScore]
    """The released rule and its variants."""
    answers: AnswerLayout
    variants: Mapping[str, str] = field(default_factory=lambda: {"release": "the released rule, errors included"})
    """Name of a variant to what it does; the first is the default."""
    optional: tuple[str, ...] = ()
    """Files that may be left out."""
    judge: Judge | None = None
    """None for a benchmark without a judge."""
    functions: Mapping[str, str] = field(default_factory=dict)
    """Functions that the rule needs, by name, with their signature and meaning."""
    read_answers: Callable[[Path, Mapping[str, Path]], Sequence[AnsweredQuestion]] | None = None
    """Reads answer files whose records are not joined with questions: they hold the question, or their place decides."""
    answers_hold_questions: bool = False
    """Whether answer files hold the questions and true answers, so that a file of questions is optional."""
    unjudged: tuple[str, ...] = ()
    """Variants of a benchmark with a judge that need no verdicts."""
    repeated: tuple[str, ...] = ()
    """Variants in which the last of several answers to a question counts; in all others they are an error."""
    to_ask: Callable[[Mapping[str, Path], Path], Sequence[BenchmarkQuestion]] | None = None
    """Function of the files and the folder of images that returns the questions for a model; None: those of `read`."""
    present: Callable[[BenchmarkQuestion, ImageSource], tuple[ImageSource, str]] | None = None
    """Returns image and text as the release shows them to a model, where it changes them; None: unchanged."""
    write: Callable[[Sequence[AnsweredQuestion], Path], object] | None = None
    """Writes a model's answers in the released layout; None: JSON lines with the fields of `answers`."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Files that must be given."""
        return tuple(name for name in self.files if name not in self.optional)

    @property
    def default_variant(self) -> str:
        """The variant that is used if none is named."""
        return next(iter(self.variants))

    def check_variant(self, variant: str | None) -> str:
        """Return a variant's name; raises `ConfigError` for an unknown one."""
        if variant is None:
            return self.default_variant
        if variant not in self.variants:
            msg = (
                f"{self.title}: unknown variant '{variant}'; choose from {', '.join(self.variants)}"
                f"{nearest(variant, self.variants)}"
            )
            raise ConfigError(msg)
        return variant

    def check_files(self, files: Mapping[str, Path | str | None], *, answers: bool = False) -> dict[str, Path]:
        """Return the files that are given; raises `ConfigError` for an unknown name, `DataError` for a missing file.

        With `answers`, a benchmark whose answer files hold the questions needs no file of questions.
        """
        unknown = next((name for name in files if name not in self.files), None)
        if unknown is not None:
            msg = (
                f"{self.title} has no file '{unknown}'; its files are: {', '.join(self.files) or 'none'}"
                f"{nearest(unknown, self.files)}"
            )
            raise ConfigError(msg)
        given = {name: Path(path) for name, path in files.items() if path is not None}
        held = answers and self.answers_hold_questions
        missing = next((n for n in self.needs if n not in given and not (held and n == QUESTIONS)), None)
        if missing is not None:
            msg = f"{self.title} needs the file '{missing}': {self.files[missing]}"
            raise DataError(msg)
        absent = next((path for path in given.values() if not path.exists()), None)
        if absent is not None:
            msg = f"{self.title}: file '{absent}' does not exist"
            raise DataError(msg)
        return given

    def check_functions(self, functions: Mapping[str, Callable[..., Any] | None]) -> dict[str, Callable[..., Any]]:
        """Return the functions that are given; raises `ConfigError` for one that the rule does not use."""
        given = {name: function for name, function in functions.items() if function is not None}
        unknown = next((name for name in given if name not in self.functions), None)
        if unknown is not None:
            takes = f"it takes {', '.join(self.functions)}" if self.functions else "it takes no functions"
            msg = f"{self.title} does not use a function '{unknown}'; {takes}{nearest(unknown, self.functions)}"
            raise ConfigError(msg)
        return given


def problem(entry: object) -> str | None:
    """Return why an entry is not a benchmark, or None."""
    if not isinstance(entry, Benchmark):
        return "it must be a behavior.benchmarks.Benchmark"
    if not entry.variants:
        return "it has no variant; name at least one rule"
    return None
