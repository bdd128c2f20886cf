"""Questions and answers of a benchmark, and what its rule returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from groundscope.core.short_repr import short_repr

if TYPE_CHECKING:
    import pandas as pd

    from behavior.result import Answer, BehaviorResult
    from groundscope.core.statistics import Estimate

TASKS = ("yes/no", "choice", "short answer", "caption", "judged")
"""Kinds of task: a yes or no, one of several options, a word or phrase that is compared with the truth, a description of the
image, and a text that a judge rates."""


@dataclass(frozen=True)
class ImageCell:
    """The place of an image that a question file holds itself.

    Examples
    --------
    >>> from pathlib import Path
    >>> from behavior.benchmarks.questions import ImageCell
    >>> ImageCell(Path("questions.parquet"), 0, "image", "0.png").name
    '0.png'
    """

    file: Path
    row: int
    """Number of the record in the file, from 0."""
    column: str
    name: str
    """Name of the image in the file; if it has none, the start of the SHA-256 of its content: equal for equal images."""


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One question of a benchmark.

    Examples
    --------
    >>> from behavior.benchmarks import BenchmarkQuestion
    >>> question = BenchmarkQuestion("1", "a.jpg", "Is there a dog?", "yes", "yes/no", level="object")
    >>> question.group
    'a.jpg'
    """

    id: str
    image: str
    """Name of the image; empty for a question without an image."""
    text: str
    answer: str
    """The true answer or reference; empty if the release has no answer."""
    task: str
    """One of `TASKS`."""
    level: str = ""
    """``object``, ``attribute``, ``relation``, or empty for a question without a level."""
    kind: str = ""
    split: str = "neutral"
    candidates: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    """Other ids that answer files may use."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the benchmark that its rule uses."""
    where: str = ""
    """File and record, for messages."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The record of the question file, for answer files that repeat it; without long cells, such as images."""
    image_cell: ImageCell | None = None
    """Where the question file holds the image itself; None if it only names it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", MappingProxyType(dict(self.fields)))
        object.__setattr__(self, "record", MappingProxyType(dict(self.record)))

    @property
    def group(self) -> str:
        """What intervals are clustered by: the image, or the question if it has none."""
        return self.image or (self.image_cell.name if self.image_cell else self.id)


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with a model's answer, and the verdict of a judge if there is one.

    Examples
    --------
    >>> from behavior.benchmarks import AnsweredQuestion, BenchmarkQuestion
    >>> question = BenchmarkQuestion("1", "a.jpg", "Is there a dog?", "yes", "yes/no", level="object")
    >>> AnsweredQuestion(question, "No.").row("no", correct=False).correct
    False
    """

    question: BenchmarkQuestion
    text: str
    where: str = ""
    seconds: float | None = None
    verdict: Any = None

    def row(self, given: str | None, *, correct: bool | None) -> Answer:
        """Return the answer as one of a `BehaviorResult`."""
        from behavior.result import Answer

        q = self.question
        return Answer(
            id=q.id,
            group=q.group,
            split=q.split,
            level=q.level,
            kind=q.kind,
            question=q.text,
            answer=q.answer,
            candidates=q.candidates,
            given=given,
            correct=correct,
            text=self.text,
        )


@dataclass(frozen=True)
class BenchmarkScore:
    r"""The figures of one model on one benchmark.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> rows = [
    ...     {"image_id": "1", "query_prompt": "Is the cup on the table?", "label": "yes", "type": "Yes/No",
    ...      "relation_type": "perception", "response": "Yes."},
    ...     {"image_id": "1", "query_prompt": "Is the cup under the table?", "label": "no", "type": "Yes/No",
    ...      "relation_type": "perception", "response": "Yes."},
    ... ]
    >>> path = Path(tempfile.mkdtemp()) / "answers.jsonl"
    >>> _ = path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    >>> score = gs.behavior.benchmarks.score_files("reefknot", path)
    >>> score.figures["yes_no_accuracy"].value, score.figures["pair_accuracy"].value
    (0.5, 0.0)
    """

    benchmark: str
    variant: str
    figures: Mapping[str, Estimate]
    """The figures of the release by name, as shares from 0 to 1 unless the name or docstring of the benchmark says otherwise.
    The value is that of the rule; the interval is clustered by image."""
    answers: BehaviorResult
    """The answers with ``correct`` by the rule; None for an answer that the rule does not judge as right or wrong."""
    parts: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """The figures of parts of the questions, by the name of the part."""
    tasks: Mapping[str, str] = field(default_factory=dict)
    """Id of a question to its kind of task."""
    missing: int = 0
    """Questions without an answer; they are in no figure."""
    unparsed: int = 0
    """Answers that a plain reading cannot parse, whatever the rule makes of them."""
    notes: tuple[str, ...] = ()
    """What else the rule decided or left out, in sentences."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "figures", MappingProxyType(dict(self.figures)))
        object.__setattr__(
            self, "parts", MappingProxyType({k: MappingProxyType(dict(v)) for k, v in self.parts.items()})
        )
        object.__setattr__(self, "tasks", MappingProxyType(dict(self.tasks)))

    def frame(self) -> pd.DataFrame:
        """Return one row for each figure: ``part`` (``all`` first), ``figure``, ``value``, ``low``, ``high``, ``n``."""
        import pandas as pd

        rows = [
            {"part": part, "figure": name, "value": f.value, "low": f.low, "high": f.high, "n": f.n}
            for part, figures in (("all", self.figures), *self.parts.items())
            for name, f in figures.items()
        ]
        return pd.DataFrame(rows, columns=["part", "figure", "value", "low", "high", "n"])
