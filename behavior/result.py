"""What a model answered, question by question, and the rates that follow from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from behavior.parsing import YES_NO
from concepts.reading.records import is_text
from groundscope.core.document_digest import KEY, document_digest, take_digest
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.files import write_whole
from groundscope.core.statistics import Estimate, estimate
from groundscope.core.user_files import parse_json, read_text

if TYPE_CHECKING:
    import pandas as pd

FORMAT, VERSION = "groundscope.behavior", 2
_LAST_WITHOUT_DIGEST = 1
BY = ("split", "level", "kind", "group", "question", "answer")
"""Columns that a table of rates may be split by."""


@dataclass(frozen=True)
class Answer:
    """One question with what the model answered."""

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
    """The answers it could choose from; empty for free text."""
    given: str | None
    """The candidate it chose; None for free text, and where what it wrote is none of them."""
    correct: bool | None
    """Whether that is the true answer; None for free text, which has no single one."""
    margin: float | None = None
    """Log-score of the true answer minus that of the best other candidate, in nats; None where it was not read."""
    probabilities: tuple[float, ...] = ()
    """Probability that the answer begins as each candidate does; what is missing to 1 goes to other words."""
    prior_answer: str | None = None
    """What the world's prior would say without looking."""
    text: str | None = None
    """What it wrote, where it was let to write."""


@dataclass(frozen=True)
class Cost:
    """What the answers took."""

    seconds: float | None
    """Wall time from the first encoding to the last answer; None for answers made elsewhere, unless they tell, and for
    those that shared their forwards with other conditions."""
    forwards: int | None
    """Forward passes of a batch; a generated token is one. None where the seconds are."""
    answers: int

    @property
    def seconds_per_answer(self) -> float | None:
        """Wall time of an answer in seconds; None where it is not known."""
        return None if self.seconds is None else self.seconds / self.answers

    @property
    def forwards_per_answer(self) -> float | None:
        """Forward passes of an answer, below 1 where a batch answers several; None where they are not known."""
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
"""Name of a rate to what an answer adds to it: True, False, or None where it does not count."""


def rate_of(name: str) -> Callable[[Answer], bool | None]:
    """Return an entry of `RATES`; raises `ConfigError` for one that there is not."""
    if name not in RATES:
        msg = f"no rate '{name}': there are {', '.join(RATES)}"
        raise ConfigError(msg)
    return RATES[name]


@dataclass(frozen=True)
class BehaviorResult:
    """The answers to a dataset, in its order.

    Raises
    ------
    DataError
        Where two answers have the same id.
    """

    answers: tuple[Answer, ...]
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Model and its hashes, digest of the data, and how it was asked."""

    def __post_init__(self) -> None:
        if len({a.id for a in self.answers}) < len(self.answers):
            msg = "two answers have the same id; ids must be unique"
            raise DataError(msg)
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def unparsed(self) -> int:
        """How many answers to questions with candidates are none of them; they count as wrong."""
        return sum(a.given is None and bool(a.candidates) for a in self.answers)

    def where(self, **values: object) -> BehaviorResult:
        """Return the answers whose fields equal the given values, e.g. ``where(split="conflict")``; same cost."""
        unknown = set(values) - {f.name for f in fields(Answer)}
        if unknown:
            msg = f"answers have no field '{min(unknown)}': there are {', '.join(f.name for f in fields(Answer))}"
            raise ConfigError(msg)
        kept = tuple(a for a in self.answers if all(getattr(a, key) == value for key, value in values.items()))
        return BehaviorResult(kept, self.cost, self.provenance)

    def frame(self) -> pd.DataFrame:
        """Return one row an answer."""
        import pandas as pd

        return pd.DataFrame([asdict(a) for a in self.answers], columns=[f.name for f in fields(Answer)])

    # -- rates ---------------------------------------------------------------------------------------------------

    def rate(self, name: str) -> Estimate:
        """Return one of `RATES` over all answers it applies to, with its 95 % interval clustered by group.

        See `groundscope.core.statistics.estimate` for the interval; it has a width even where all are right.
        """
        value = rate_of(name)
        counted = [(bool(v), a.group) for a in self.answers if (v := value(a)) is not None]
        return estimate([v for v, _ in counted], [g for _, g in counted])

    def rates(self, name: str, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Return one of `RATES` as a table: a row a value of `by`, columns ``n``, the rate's name, ``low``, ``high``.

        Parameters
        ----------
        name
            Which rate.
        by
            One or more of `BY`, in order of first appearance; None for a single row over all.

        Raises
        ------
        ConfigError
            For a rate or column that there is not.
        """
        import pandas as pd

        value = rate_of(name)
        columns = [by] if isinstance(by, str) else list(by or ())
        unknown = [c for c in columns if c not in BY]
        if unknown:
            msg = f"answers cannot be split by '{unknown[0]}': there are {', '.join(BY)}"
            raise ConfigError(msg)
        parts: dict[tuple[str, ...], list[Answer]] = {} if columns else {(): []}
        for row in self.answers:
            if value(row) is not None:
                parts.setdefault(tuple(getattr(row, c) for c in columns), []).append(row)
        rows = []
        for key, part in parts.items():
            found = estimate([bool(value(a)) for a in part], [a.group for a in part])
            rows.append((*key, found.n, found.value, found.low, found.high))
        return pd.DataFrame(rows, columns=[*columns, "n", name, "low", "high"])

    def accuracy(self, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Return the share of right answers among questions with candidates; see `rates`."""
        return self.rates("accuracy", by)

    def yes_ratio(self, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Return the share of yes among the *given* answers to yes-no questions, whatever is true; see `rates`."""
        return self.rates("yes_ratio", by)

    def false_positive_rate(self, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Return how often it said yes where the truth is no; see `rates`."""
        return self.rates("false_positive_rate", by)

    def wrong_by_prior(self, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """Return how often it was wrong with just the prior's answer, on the split ``conflict``; see `rates`."""
        return self.rates("wrong_by_prior", by)

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Write everything as one JSON file, an answer a line; the file is whole or not there."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "cost": asdict(self.cost),
            "provenance": dict(self.provenance),
        }
        answers = [asdict(a) for a in self.answers]
        header[KEY] = document_digest({**header, "answers": answers})
        lines = ",\n".join(json.dumps(a, allow_nan=False) for a in answers)
        text = f'{json.dumps(header, allow_nan=False)[:-1]}, "answers": [\n{lines}\n]}}\n'
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text.encode())

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        DataError
            Naming the file, where it is missing, damaged, something else, or of another version.
        """
        try:
            text = read_text(path)
        except OSError as error:
            msg = f"answers '{path}' cannot be read: {error.strerror or error}"
            raise DataError(msg) from error
        try:
            held = parse_json(text)
        except (ValueError, RecursionError) as error:
            msg = f"answers '{path}' are damaged: invalid JSON: {error}"
            raise DataError(msg) from error
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            msg = f"'{path}' does not hold answers saved by BehaviorResult.save"
            raise DataError(msg)
        version = held.get("version")
        if type(version) is not int or not 1 <= version <= VERSION:
            msg = f"answers '{path}' are of version {version!a}, this release reads up to {VERSION}: answer again"
            raise DataError(msg)
        take_digest(held, str(path), DataError, required=version > _LAST_WITHOUT_DIGEST)
        for name, kind in (("answers", list), ("cost", dict), ("provenance", dict)):
            if not isinstance(held.get(name), kind):
                what = "a list" if kind is list else "an object"
                msg = f"answers '{path}' are damaged: '{name}' must be {what}, not {_shown(held.get(name))}"
                raise DataError(msg)
        rows = [_fields(values, _ANSWER, f"answer {n}", path) for n, values in enumerate(held["answers"], 1)]
        answers = tuple(_answer(row) for row in rows)
        cost = Cost(**_fields(held["cost"], _COST, "cost", path))
        try:
            return cls(answers, cost, held["provenance"])
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
"""Field of an answer to what it must hold, in words and as a test."""
_COST: Mapping[str, tuple[str, Callable[[object], bool]]] = MappingProxyType(
    {
        "seconds": ("a number or null", lambda v: v is None or _is_number(v)),
        "forwards": ("a whole number or null", lambda v: v is None or _is_count(v)),
        "answers": ("a whole number", _is_count),
    }
)


def _fields(
    values: Any, rules: Mapping[str, tuple[str, Callable[[object], bool]]], where: str, path: Path | str
) -> dict[str, Any]:
    """Return the fields of a stored object; raises `DataError` for one that is missing, unknown or of a wrong type."""
    problem = None
    if not isinstance(values, dict):
        problem = f"must be an object, not {_shown(values)}"
    elif missing := [name for name in rules if name not in values]:
        problem = f"has no field '{missing[0]}'"
    elif unknown := [name for name in values if name not in rules]:
        problem = f"has an unknown field '{unknown[0]}'"
    elif wrong := [name for name, (_, good) in rules.items() if not good(values[name])]:
        problem = f"field '{wrong[0]}' must hold {rules[wrong[0]][0]}, not {_shown(values[wrong[0]])}"
    if problem is not None:
        msg = f"answers '{path}' are damaged: {where}: {problem}"
        raise DataError(msg)
    return values


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
