"""What every curve of faithfulness has: f at each size, and the areas that sum it up."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from circuits.results.statistics import by_group
from groundscope.core.errors import PatchError
from groundscope.core.statistics import FEW_GROUPS, Estimate, draws_interval

if TYPE_CHECKING:
    import pandas as pd

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all heads, or edges, at which a curve is read."""
_LEAST = 1e-6
"""Logits of difference without which f is undefined."""


@dataclass(frozen=True, eq=False)
class FaithfulCurve:
    """How much of what the model makes of the truth is left with parts of it alone, at several sizes."""

    counted: ClassVar[str] = "parts"
    """What sizes count, as `frame` calls the column."""

    shares: tuple[float, ...]
    """Shares of all parts, ascending."""
    margins: np.ndarray
    """What each circuit alone gives, float64 ``[n_examples, n_shares]``, in logits."""
    full: np.ndarray
    """What the whole model gives, ``[n_examples]``."""
    empty: np.ndarray
    """What is given without any part, ``[n_examples]``."""
    groups: tuple[str, ...]
    circuits: tuple[Sized, ...]
    """The parts of each share, best first."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of parts of each circuit."""
        return tuple(len(c) for c in self.circuits)

    @property
    def faithfulness(self) -> np.ndarray:
        """F at each share, float64 ``[n_shares]``: 0 without any part, 1 where all of the model's preference is there."""
        return ratio(self.margins.mean(0), self.full.mean(), self.empty.mean())

    @property
    def cpr(self) -> float:
        """Area under f over `shares`, by the trapezoid rule: .999 for a circuit that is faithful from the start."""
        return area(self.shares, self.faithfulness)

    @property
    def cmd(self) -> float:
        """Area under ``|1 - f|``: 0 for a circuit that behaves like the model from the start."""
        return area(self.shares, np.abs(1 - self.faithfulness))

    def interval(
        self, what: Literal["cpr", "cmd"] = "cpr", level: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> Estimate:
        """Return an area with its bootstrap interval, whole groups drawn again (`groundscope.core.statistics.draws_interval`)."""
        drawn = self._draws(resamples, seed)
        curves = drawn if what == "cpr" else np.abs(1 - drawn)
        areas = np.array([area(self.shares, f) if np.isfinite(f).all() else math.nan for f in curves])
        value, n = getattr(self, what), len(set(self.groups))
        low, high = draws_interval(areas, value, n, level)
        return Estimate(value, float(low), float(high), len(self.full), n < FEW_GROUPS)

    def frame(self, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Return one row a share: ``share``, ``heads`` or ``edges``, ``faithfulness``, ``low``, ``high``."""
        import pandas as pd

        low, high = draws_interval(self._draws(resamples, seed), self.faithfulness, len(set(self.groups)), level)
        columns = {"share": self.shares, self.counted: self.sizes, "faithfulness": self.faithfulness}
        return pd.DataFrame({**columns, "low": low, "high": high})

    def _draws(self, resamples: int, seed: int) -> np.ndarray:
        """Return f of redrawn groups, ``[resamples, n_shares]``; NaN where a draw leaves nothing to divide by."""
        table = np.column_stack([self.margins, self.full, self.empty])
        _, sums, _ = by_group(table, self.groups)  # [G, n_shares + 2]
        rng = np.random.Generator(np.random.PCG64(seed))
        drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples) @ sums
        gap = drawn[:, -2] - drawn[:, -1]
        return np.where(np.abs(gap) > _LEAST, (drawn[:, :-2].T - drawn[:, -1]) / np.where(gap == 0, 1, gap), np.nan).T


def area(shares: Sequence[float], values: np.ndarray) -> float:
    """Return the area under values over shares, by the trapezoid rule."""
    return float(np.trapezoid(np.asarray(values, np.float64), np.asarray(shares, np.float64)))


def ratio(margins: np.ndarray, full: float, empty: float) -> np.ndarray:
    """Return f of some margins."""
    return (margins - empty) / (full - empty)


def check_gap(name: str, full: np.ndarray, empty: np.ndarray, without: str) -> None:
    """Raise `PatchError` where f is undefined: a model prefers the truth as much without what is counted."""
    gap = float(full.mean() - empty.mean())
    if abs(gap) <= _LEAST:
        msg = f"{name} prefers the truth by as much {without} ({empty.mean():.3g} logits): f is undefined"
        raise PatchError(msg)
