"""A model's answers, question by question, and rates computed from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from behavior.parsing import YES_NO
from concepts.reading.record import is_text
from groundscope.core import artifacts
from groundscope.core.document_digest import KEY, document_digest
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.files import write_whole
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import Estimate, estimate

if TYPE_CHECKING:
    import pandas as pd

FORMAT, VERSION = "groundscope.behavior", 2
_LAST_WITHOUT_DIGEST = 1
BY = ("split", "level", "kind", "group", "question", "answer")
"""Columns that a table of rates can be split by."""


@dataclass(frozen=True)
class Answer:
    """One question with the model's answer.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("q1", "image 1", "neutral", "object", "existence", "Is there an apple?", "yes", ("yes", "no"))
    >>> answer = gs.Answer(*about, given="no", correct=False)
    >>> answer.answer, answer.given
    ('yes', 'no')
    """

    id: str
    group: str
    """The image or scene; intervals are clustered by it."""
    split: str
    level: str
    kind: str
    question: str
    answer: str
    """The true answer."""
    candidates: tuple[str, ...]
    """Possible answers; empty for free text."""
    given: str | None
    """The candidate that the model chose; None for free text, and if its text matches no candidate."""
    correct: bool | None
    """Whether the model chose the true answer; None for free text, which has no single true answer."""
    margin: float | None = None
    """Log-score of the true answer minus that of the best other candidate, in nats; None if not measured."""
    probabilities: tuple[float, ...] = ()
    """Probability that the answer begins like each candidate; the remainder to 1 belongs to other words."""
    prior_answer: str | None = None
    """The most likely answer without the image, by the dataset's prior."""
    text: str | None = None
    """The text that the model generated, if it generated any."""


@dataclass(frozen=True)
class Cost:
    """Computational cost of the answers.

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.Cost(seconds=2.0, forwards=5, answers=20).seconds_per_answer
    0.1
    """

    seconds: float | None
    """Wall time from the first encoding to the last answer; None for answers from a file without times, and for answers
    that shared forward passes with other conditions."""
    forwards: int | None
    """Number of forward passes of batches; each generated token is one. None for answers from a file, and for answers
    that shared forward passes with other conditions."""
    answers: int

    @property
    def seconds_per_answer(self) -> float | None:
        """Wall time per answer in seconds; None if unknown."""
        return None if self.seconds is None else self.seconds / self.answers

    @property
    def forwards_per_answer(self) -> float | None:
        """Forward passes per answer, below 1 if a batch answers several questions; None if unknown."""
        return None if self.forwards is None else self.forwards / self.answers


def _accuracy(row: Answer) -> bool | None:
    return row.correct


def _yes_ratio(row: Answer) -> bool | None:
    return row.given == "yes" if set(row.candidates) == YES_NO else None


def _false_positive_rate(row: Answer) -> bool | None:
    return _yes_ratio(row) if row.answer == "no" else None


def _wrong_by_prior(row: Answer) -> bool | None:
    if row.split != "conflict" or row.correct is None or row.prior_answer is None:
        return None
    return not row.correct and row.given == row.prior_answer


RATES: Mapping[str, Callable[[Answer], bool | None]] = MappingProxyType(
    {
        "accuracy": _accuracy,
        "yes_ratio": _yes_ratio,
        "false_positive_rate": _false_positive_rate,
        "wrong_by_prior": _wrong_by_prior,
    }
)
"""Rate to its function of an answer: True, False, or None for an answer that is excluded."""


def rate_of(name: str) -> Callable[[Answer], bool | None]:
    """Return an entry of `RATES`; raises `ConfigError` for an unknown name."""
    if name not in RATES:
        msg = f"unknown rate '{name}'; choose from {', '.join(RATES)}"
        raise ConfigError(msg)
    return RATES[name]


@dataclass(frozen=True)
class BehaviorResult:
    """The answers to a dataset's questions, in the dataset's order.

    Raises
    ------
    DataError
        If two answers have the same id.

    Examples
    --------
    >>> import groundscope as gs
    >>> about = ("neutral", "object", "existence", "Is there an apple?", "yes", ("yes", "no"))
    >>> rows = [gs.Answer(f"q{i}", f"image {i}", *about, given="yes", correct=True) for i in range(4)]
    >>> answers = gs.BehaviorResult(tuple(rows), gs.Cost(None, None, 4))
    >>> answers.rate("accuracy").value, len(answers.where(id="q2"))
    (1.0, 1)
    """

    answers: tuple[Answer, ...]
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Model and its hashes, digest of the data, and settings such as batch size and parser."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        if len({a.id for a in self.answers}) < len(self.answers):
            msg = "two answers have the same id; ids must be unique"
            raise DataError(msg)
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def unparsed(self) -> int:
        """Number of answers that match none of their question's candidates; they count as wrong."""
        return sum(a.given is None and bool(a.candidates) for a in self.answers)

    @property
    def texts(self) -> dict[str, str]:
        """Generated text by id, for the answers that have one."""
        return {a.id: a.text for a in self.answers if a.text is not None}

    def where(self, **values: object) -> BehaviorResult:
        """Return the answers whose fields equal `values`, e.g. ``where(split="conflict")``; the cost is unchanged."""
        unknown = set(values) - {f.name for f in fields(Answer)}
        if unknown:
            msg = f"unknown field '{min(unknown)}' of answers; choose from {', '.join(f.name for f in fields(Answer))}"
            raise ConfigError(msg)
        matching = tuple(a for a in self.answers if all(getattr(a, key) == value for key, value in values.items()))
        return BehaviorResult(matching, self.cost, self.provenance)

    def frame(self) -> pd.DataFrame:
        """Return one row per answer."""
        import pandas as pd

        return pd.DataFrame([_record(a) for a in self.answers], columns=[f.name for f in fields(Answer)])

    # -- rates ---------------------------------------------------------------------------------------------------

    def rate(self, name: str) -> Estimate:
        """Return one of `RATES` over all answers it applies to, with its 95 % interval clustered by group.

        See `groundscope.core.statistics.estimate` for the interval; its width is positive even if all answers are correct.
        """
        value = rate_of(name)
        counted = [(bool(v), a.group) for a in self.answers if (v := value(a)) is not None]
        return estimate([v for v, _ in counted], [g for _, g in counted])

    def rates(self, name: str, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Return one of `RATES` as a table: one row per value of `by`, columns ``n``, the rate's name, ``low``, ``high``.

        Parameters
        ----------
        name
            The rate.
        by
            One or more of `BY`; rows are in order of first appearance. None for a single row over all answers.

        Raises
        ------
        ConfigError
            For an unknown rate or column.
        """
        import pandas as pd

        value = rate_of(name)
        columns = [by] if isinstance(by, str) else list(by or ())
        unknown = [c for c in columns if c not in BY]
        if unknown:
            msg = f"answers cannot be split by '{unknown[0]}'; choose from {', '.join(BY)}"
            raise ConfigError(msg)
        parts: dict[tuple[str, ...], list[Answer]] = {} if columns else {(): []}
        for row in self.answers:
            if value(row) is not None:
                parts.setdefault(tuple(getattr(row, c) for c in columns), []).append(row)
        rows = []
        for key, part in parts.items():
            share = estimate([bool(value(a)) for a in part], [a.group for a in part])
            rows.append((*key, share.n, share.value, share.low, share.high))
        return pd.DataFrame(rows, columns=[*columns, "n", name, "low", "high"])

    def accuracy(self, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Return the share of correct answers among questions with candidates; see `rates`."""
        return self.rates("accuracy", by)

    def yes_ratio(self, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Return the share of yes among the model's answers to yes-no questions, correct or not; see `rates`."""
        return self.rates("yes_ratio", by)

    def false_positive_rate(self, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Return the share of yes among the model's answers where the true answer is no; see `rates`."""
        return self.rates("false_positive_rate", by)

    def wrong_by_prior(self, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Return the share of wrong answers that equal the prior's answer, on the split ``conflict``; see `rates`."""
        return self.rates("wrong_by_prior", by)

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write the result atomically as one JSON file, one answer per line."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "cost": asdict(self.cost),
            "provenance": dict(self.provenance),
        }
        answers = [_record(a) for a in self.answers]
        header[KEY] = document_digest({**header, "answers": answers})
        lines = ",\n".join(json.dumps(a, allow_nan=False) for a in answers)
        text = f'{json.dumps(header, allow_nan=False)[:-1]}, "answers": [\n{lines}\n]}}\n'
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text.encode())

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a file that `save` wrote.

        Raises
        ------
        DataError
            Names the file: if it is missing, damaged, of another kind, or of an unsupported version.
        """
        document = artifacts.read_document(
            Path(path),
            FORMAT,
            "behavior result",
            VERSION,
            last_without_digest=_LAST_WITHOUT_DIGEST,
            error=DataError,
            advice="answer again",
        )
        for name, kind in (("answers", list), ("cost", dict), ("provenance", dict)):
            if not isinstance(document.get(name), kind):
                what = "a list" if kind is list else "an object"
                msg = f"answers '{path}' are damaged: '{name}' must be {what}, not {_abbreviate(document.get(name))}"
                raise DataError(msg)
        rows = [_fields(values, _ANSWER, f"answer {n}", path) for n, values in enumerate(document["answers"], 1)]
        answers = tuple(_answer(row) for row in rows)
        cost = Cost(**_fields(document["cost"], _COST, "cost", path))
        try:
            return cls(answers, cost, document["provenance"])
        except DataError as error:
            msg = f"answers '{path}' are damaged: {error}"
            raise DataError(msg) from error


def _answer(values: dict[str, Any]) -> Answer:
    lists = {name: tuple(values[name]) for name in ("candidates", "probabilities")}
    return Answer(**{**values, **lists})


def _is_number(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= 1 << 53
    return isinstance(value, float) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1 << 53


_TEXT = ("text", lambda v: is_text(v))
_TEXT_OR_NULL = ("text or null", lambda v: v is None or is_text(v))
_ANSWER: Mapping[str, tuple[str, Callable[[object], bool]]] = MappingProxyType(
    {
        **dict.fromkeys(("id", "group", "split", "level", "kind", "question", "answer"), _TEXT),
        "candidates": ("a list of texts", lambda v: isinstance(v, list) and all(is_text(x) for x in v)),
        "given": _TEXT_OR_NULL,
        "correct": ("true, false or null", lambda v: v is None or isinstance(v, bool)),
        "margin": ("a number or null", lambda v: v is None or _is_number(v)),
        "probabilities": ("a list of numbers", lambda v: isinstance(v, list) and all(_is_number(x) for x in v)),
        "prior_answer": _TEXT_OR_NULL,
        "text": _TEXT_OR_NULL,
    }
)
"""Field of an answer to a description of its valid values and a test of a value."""
_COST: Mapping[str, tuple[str, Callable[[object], bool]]] = MappingProxyType(
    {
        "seconds": ("a number or null", lambda v: v is None or _is_number(v)),
        "forwards": ("a whole number or null", lambda v: v is None or _is_count(v)),
        "answers": ("a whole number", _is_count),
    }
)


def _record(answer: Answer) -> dict[str, Any]:
    """Return the fields of an answer; `dataclasses.asdict` would copy every value, which takes longer than writing them."""
    return {f.name: getattr(answer, f.name) for f in fields(answer)}


def _fields(
    values: Any, rules: Mapping[str, tuple[str, Callable[[object], bool]]], where: str, path: Path | str
) -> dict[str, Any]:
    """Return the fields of a stored object; raises `DataError` for a missing or unknown field, or a wrong type."""
    problem = None
    if not isinstance(values, dict):
        problem = f"must be an object, not {_abbreviate(values)}"
    elif missing := [name for name in rules if name not in values]:
        problem = f"has no field '{missing[0]}'"
    elif unknown := [name for name in values if name not in rules]:
        problem = f"has an unknown field '{unknown[0]}'"
    elif wrong := [name for name, (_, good) in rules.items() if not good(values[name])]:
        problem = f"field '{wrong[0]}' must hold {rules[wrong[0]][0]}, not {_abbreviate(values[wrong[0]])}"
    if problem is not None:
        msg = f"answers '{path}' are damaged: {where}: {problem}"
        raise DataError(msg)
    return values


def _abbreviate(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
