"""Base of faithfulness curves: f at each circuit size, and areas under the curve."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from circuits.results.statistics import by_group
from groundscope.core.errors import PatchError
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import FEW_GROUPS, Estimate, draws_interval

if TYPE_CHECKING:
    import pandas as pd

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Default circuit sizes, as shares of all heads or edges."""
_LEAST = 1e-6
"""Least difference in logits between the full and the empty circuit; f is undefined below it."""


@dataclass(frozen=True, eq=False)
class FaithfulCurve:
    """Share of the model's preference for the true answer that circuits of several sizes preserve."""

    counted: ClassVar[str] = "parts"
    """Unit of circuit sizes, and column name in `frame`."""

    shares: tuple[float, ...]
    """Shares of all parts, ascending."""
    margins: np.ndarray
    """Margin with each circuit only, float64 ``[n_examples, n_shares]``, in logits."""
    full: np.ndarray
    """Margin of the full model, ``[n_examples]``."""
    empty: np.ndarray
    """Margin of the empty circuit, ``[n_examples]``."""
    groups: tuple[str, ...]
    circuits: tuple[Sized, ...]
    """The circuit of each share, its best parts first."""

    __repr__ = short_repr

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of parts of each circuit."""
        return tuple(len(c) for c in self.circuits)

    @property
    def faithfulness(self) -> np.ndarray:
        """F at each share, float64 ``[n_shares]``: 0 for the empty circuit, 1 if the full preference is preserved."""
        return ratio(self.margins.mean(0), self.full.mean(), self.empty.mean())

    @property
    def cpr(self) -> float:
        """Area under f over `shares`, by the trapezoid rule: .999 if the smallest circuit is faithful."""
        return area(self.shares, self.faithfulness)

    @property
    def cmd(self) -> float:
        """Area under ``|1 - f|``: 0 if the smallest circuit behaves like the model."""
        return area(self.shares, np.abs(1 - self.faithfulness))

    def interval(
        self,
        area_name: Literal["cpr", "cmd"] = "cpr",
        *,
        resamples: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> Estimate:
        """Return an area with its bootstrap interval over groups (`groundscope.core.statistics.draws_interval`)."""
        draws = self._draws(resamples, seed)
        curves = draws if area_name == "cpr" else np.abs(1 - draws)
        areas = np.array([area(self.shares, f) if np.isfinite(f).all() else math.nan for f in curves])
        value, n = getattr(self, area_name), len(set(self.groups))
        low, high = draws_interval(areas, value, n, confidence)
        return Estimate(value, float(low), float(high), len(self.full), n < FEW_GROUPS)

    def frame(self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """Return one row per share: ``share``, ``heads`` or ``edges``, ``faithfulness``, ``low``, ``high``."""
        import pandas as pd

        low, high = draws_interval(self._draws(resamples, seed), self.faithfulness, len(set(self.groups)), confidence)
        columns = {"share": self.shares, self.counted: self.sizes, "faithfulness": self.faithfulness}
        return pd.DataFrame({**columns, "low": low, "high": high})

    def _draws(self, resamples: int, seed: int) -> np.ndarray:
        """Return faithfulness for each draw of groups, ``[resamples, n_shares]``; NaN if full and empty circuit agree."""
        table = np.column_stack([self.margins, self.full, self.empty])
        _, sums, _ = by_group(table, self.groups)  # [G, n_shares + 2]
        rng = np.random.Generator(np.random.PCG64(seed))
        sums_of_draws = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples) @ sums
        gap = sums_of_draws[:, -2] - sums_of_draws[:, -1]
        return np.where(
            np.abs(gap) > _LEAST, (sums_of_draws[:, :-2].T - sums_of_draws[:, -1]) / np.where(gap == 0, 1, gap), np.nan
        ).T


def area(shares: Sequence[float], values: np.ndarray) -> float:
    """Return the area under values over shares, by the trapezoid rule.

    Examples
    --------
    >>> from circuits.faithfulness import area
    >>> area((0.0, 0.5, 1.0), [0.0, 1.0, 1.0])
    0.75
    """
    return float(np.trapezoid(np.asarray(values, np.float64), np.asarray(shares, np.float64)))


def ratio(margins: np.ndarray, full: float, empty: float) -> np.ndarray:
    """Return f from margins: ``(margins - empty) / (full - empty)``."""
    return (margins - empty) / (full - empty)


def check_gap(name: str, full: np.ndarray, empty: np.ndarray, without: str) -> None:
    """Raise `PatchError` if f is undefined: the model's margin is the same with the empty circuit."""
    gap = float(full.mean() - empty.mean())
    if abs(gap) <= _LEAST:
        msg = f"f is undefined: {name} has the same mean margin {without} ({empty.mean():.3g} logits)"
        raise PatchError(msg)
