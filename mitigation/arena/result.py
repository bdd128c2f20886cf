"""The table of an arena: for each row its measures, their changes, its price, and the controls that it does not beat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from groundscope.core import artifacts
from groundscope.core.errors import DataError
from groundscope.core.files import canonical_json, write_whole
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import Estimate
from mitigation.arena.caption_controls import CutCaptions
from mitigation.arena.measures import Measure
from mitigation.arena.price import Price

if TYPE_CHECKING:
    import pandas as pd

FORMAT, VERSION = "groundscope.arena", 1
_LONGEST = 200


@dataclass(frozen=True)
class RowResult:
    """What was measured of one row under one regime.

    Examples
    --------
    >>> from mitigation.arena.result import RowResult
    >>> RowResult("VCD", "greedy", problem="no image tokens").measures
    ()
    """

    name: str
    regime: str
    """``greedy``, or ``sampling`` with the release's way to write answers."""
    category: str = ""
    source: str = ""
    control: bool = False
    chosen: bool = False
    """Whether its parameters were chosen on validation images; else they are the published ones."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    measures: tuple[Measure, ...] = ()
    price: Price | None = None
    cut_to_length: CutCaptions | None = None
    """The model's own captions, cut to this row's mean number of words."""
    cut_to_recall: CutCaptions | None = None
    """The model's own captions, cut to this row's recall."""
    not_beaten: tuple[str, ...] = ()
    """Controls that it does not beat beyond the interval, in the arena's objective."""
    problem: str | None = None
    """Why nothing was measured."""

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", dict(self.parameters))  # a read-only view cannot be copied by `asdict`

    def measure(self, name: str) -> Measure | None:
        """Return a measure by name; None if it does not apply."""
        return next((m for m in self.measures if m.name == name), None)


@dataclass(frozen=True)
class ArenaResult:
    """Rows in the order in which they were run; the first of each regime is the model alone.

    Examples
    --------
    >>> from mitigation.arena.result import ArenaResult, RowResult
    >>> arena = ArenaResult((RowResult("unmodified", "greedy"),), "all: right", {})
    >>> arena.row("unmodified").regime
    'greedy'
    """

    rows: tuple[RowResult, ...]
    objective: str
    """The measure, or ``the mean of`` several, in which methods are compared with controls."""
    provenance: Mapping[str, Any]

    __repr__ = short_repr

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def row(self, name: str, regime: str = "greedy") -> RowResult:
        """Return a row; raises `DataError` for a name without one."""
        row = next((r for r in self.rows if r.name == name and r.regime == regime), None)
        if row is None:
            names = ", ".join(dict.fromkeys(r.name for r in self.rows if r.regime == regime))
            msg = f"the arena has no row '{name}' ({regime}); its rows are: {names}"
            raise DataError(msg)
        return row

    @property
    def measure_names(self) -> list[str]:
        """Names of all measures, in order of first appearance."""
        return list(dict.fromkeys(m.name for row in self.rows for m in row.measures))

    def frame(self) -> pd.DataFrame:
        """Return one line per row: names, each measure with its interval and change, price, and problem."""
        import pandas as pd

        lines = []
        for row in self.rows:
            line: dict[str, Any] = {
                "method": row.name, "regime": row.regime, "class": row.category, "source": row.source,
                "control": row.control, "chosen": row.chosen,
            }  # fmt: skip
            for m in row.measures:
                line |= {m.name: m.value.value, f"{m.name}, low": m.value.low, f"{m.name}, high": m.value.high}
                if m.change is not None:
                    line |= {f"{m.name}, change": m.change.value}
                    line |= {f"{m.name}, change low": m.change.low, f"{m.name}, change high": m.change.high}
                if m.spread is not None:
                    line[f"{m.name}, spread"] = m.spread
            if row.price is not None:
                line |= {f"price, {key}": value for key, value in asdict(row.price).items()}
            for name in ("cut_to_length", "cut_to_recall"):
                cut = getattr(row, name)
                if cut is not None:
                    line[f"unmodified, {name.replace('_', ' ')}: CHAIR_i"] = cut.chair_i
            line["not beaten"] = "; ".join(row.not_beaten)
            line["problem"] = row.problem or ""
            lines.append(line)
        return pd.DataFrame(lines)

    def save(self, path: Path | str) -> None:
        """Write the result as a JSON file with a digest."""
        rows = [_plain(asdict(row) | {"parameters": _json(row.parameters)}) for row in self.rows]
        content = {"rows": rows, "objective": self.objective, "provenance": _json(self.provenance)}
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, (canonical_json(artifacts.sign_document(FORMAT, VERSION, content)) + "\n").encode())

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a file that `save` wrote; raises `DataError` for one that is missing, damaged or of another kind."""
        document = artifacts.read_document(
            Path(path), FORMAT, "arena result", VERSION, error=DataError, advice="run the arena again"
        )
        try:
            rows = tuple(_row(values) for values in document["rows"])
            return cls(rows, str(document["objective"]), document["provenance"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"arena result '{path}' is damaged: {error}; run the arena again"
            raise DataError(msg) from error


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value if _is_plain(value) and len(str(value)) <= 2000 else _abbreviated(value)
        for key, value in values.items()
    }


def _abbreviated(value: object) -> str:
    """Return an object, such as the images of a control, as text of at most `_LONGEST` characters."""
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _plain(value: Any) -> Any:
    """Return a value that JSON can represent: NaN and infinity as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _row(values: dict[str, Any]) -> RowResult:
    measures = tuple(
        Measure(m["name"], _estimate(m["value"]), None if m["change"] is None else _estimate(m["change"]), m["spread"])
        for m in values["measures"]
    )
    price = None if values["price"] is None else Price(**values["price"])
    cuts = {n: None if values[n] is None else CutCaptions(**values[n]) for n in ("cut_to_length", "cut_to_recall")}
    return RowResult(
        **{**values, "measures": measures, "price": price, **cuts, "not_beaten": tuple(values["not_beaten"])}
    )


def _estimate(values: dict[str, Any]) -> Estimate:
    numbers: dict[str, Any] = {key: math.nan if value is None else value for key, value in values.items()}
    return Estimate(**numbers)
