"""How faithful a circuit is: what the model still does with these heads alone.

The curve of the Mechanistic Interpretability Benchmark (Mueller et al. 2025, arXiv 2504.13151): with m(C) the mean
margin of the true answer when every head outside C is ablated, ``f(k) = (m(C_k) - m(none)) / (m(all) - m(none))`` for
the best k of all heads. Two areas sum it up: CPR, of f, for a ranking by signed effect, how soon the model's own
performance is there; CMD, of ``|1 - f|``, for a ranking by absolute effect, how far behaviour is from the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from circuits.ablation import How, Where, ablate
from circuits.head_statistics import by_group
from circuits.heads import HeadScores
from concepts.errors import ConfigError, PatchError
from concepts.schema import Example
from concepts.statistics import Estimate
from lvlm.model import Lvlm
from lvlm.sites import Head

if TYPE_CHECKING:
    import pandas as pd

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all heads at which a curve is read."""
Ranking = HeadScores | Sequence[Head] | np.ndarray
"""Scores, of which mean effects rank; all heads, best first; or one number a head, ``[n_layers, n_heads]``."""
_LEAST = 1e-6


@dataclass(frozen=True, eq=False)
class Curve:
    """What is left of the model's preference for the truth with the best heads alone."""

    shares: tuple[float, ...]
    """Shares of all heads, ascending."""
    circuits: tuple[tuple[Head, ...], ...]
    """The heads of each, ``round(share * n_heads)`` of them, best first."""
    margins: np.ndarray
    """Margin of the true answer with each circuit alone, float64 ``[n_examples, n_shares]``, in logits."""
    full: np.ndarray
    """Margin of the whole model, ``[n_examples]``."""
    empty: np.ndarray
    """Margin with every head ablated, ``[n_examples]``."""
    groups: tuple[str, ...]
    order: Literal["signed", "absolute"]
    how: How
    """What became of the heads outside."""

    @property
    def faithfulness(self) -> np.ndarray:
        """F at each share, float64 ``[n_shares]``: 0 without heads, 1 where all of the model's margin is there."""
        return _f(self.margins.mean(0), self.full.mean(), self.empty.mean())

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
        """Return an area with its percentile interval, whole groups drawn again."""
        drawn = self._draws(resamples, seed)
        curves = drawn if what == "cpr" else np.abs(1 - drawn)
        areas = np.array([area(self.shares, f) for f in curves if np.isfinite(f).all()])
        low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2]) if len(areas) else (math.nan, math.nan)
        return Estimate(getattr(self, what), float(low), float(high), len(self.full))

    def frame(self, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Return one row a share: ``share``, ``heads``, ``faithfulness``, ``low``, ``high``."""
        import pandas as pd

        low, high = np.nanquantile(self._draws(resamples, seed), [(1 - level) / 2, (1 + level) / 2], axis=0)
        size = [len(c) for c in self.circuits]
        columns = {"share": self.shares, "heads": size, "faithfulness": self.faithfulness, "low": low, "high": high}
        return pd.DataFrame(columns)

    def _draws(self, resamples: int, seed: int) -> np.ndarray:
        """Return f of redrawn groups, ``[resamples, n_shares]``; NaN where a draw leaves nothing to divide by."""
        table = np.column_stack([self.margins, self.full, self.empty])
        _, sums, _ = by_group(table, self.groups)  # [G, n_shares + 2]
        rng = np.random.Generator(np.random.PCG64(seed))
        drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples) @ sums
        gap = drawn[:, -2] - drawn[:, -1]
        return np.where(np.abs(gap) > _LEAST, (drawn[:, :-2].T - drawn[:, -1]) / np.where(gap == 0, 1, gap), np.nan).T


@dataclass(frozen=True)
class MinimalSet:
    """A small set of heads that does what the model does, and how each of them counts."""

    heads: tuple[Head, ...]
    faithfulness: float
    """f of these heads alone."""
    left: float
    """f of the model without them: what a complete set leaves is near 0 (completeness)."""
    lost: tuple[float, ...]
    """For each head what f loses without it (minimality): all at least `tolerance`."""
    dropped: tuple[Head, ...]
    """Heads of the ranking's beginning that were not needed."""
    goal: float
    tolerance: float


@dataclass(frozen=True, eq=False)
class _Alone:
    """Runs circuits alone, and remembers what they gave."""

    model: Lvlm
    examples: Sequence[Example]
    how: How
    tokens: Where
    reference: Sequence[Example] | None
    batch_size: int
    seed: int
    progress: bool | None
    known: dict[frozenset[Head], np.ndarray] = field(default_factory=dict)

    def margins(self, circuits: Sequence[Sequence[Head]]) -> np.ndarray:
        """Return the margin with each circuit alone, float64 ``[n_examples, n_circuits]``."""
        every = heads_of(self.model)
        whole = frozenset(every)
        new = [c for c in dict.fromkeys(frozenset(c) for c in circuits) if c not in self.known and c != whole]
        if new or whole not in self.known:
            outside = [[head for head in every if head not in circuit] for circuit in new or [frozenset()]]
            found = ablate(
                self.model,
                self.examples,
                outside,
                self.how,
                self.tokens,
                reference=self.reference,
                batch_size=self.batch_size,
                seed=self.seed,
                progress=self.progress,
            )
            self.known[whole] = found.margins.astype(np.float64)
            self.known.update(zip(new or [frozenset()], found.ablated.T.astype(np.float64), strict=True))
        return np.stack([self.known[frozenset(c)] for c in circuits], axis=1)


def curve(
    model: Lvlm,
    examples: Sequence[Example],
    ranking: Ranking,
    order: Literal["signed", "absolute"] = "signed",
    *,
    how: How = "mean",
    tokens: Where = "all",
    shares: Sequence[float] = SHARES,
    reference: Sequence[Example] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> Curve:
    """Return how much of the model's preference for the truth its best heads carry alone.

    Parameters
    ----------
    model
        In evaluation mode.
    examples
        Questions with candidate answers; other ones than the ranking was made from.
    ranking
        Which heads are best: scores, heads in order, or numbers ``[n_layers, n_heads]``.
    order
        Best is the largest effect (``signed``), or the largest absolute one (``absolute``). A sequence of heads is taken
        as it is.
    how, tokens, reference, batch_size, seed, progress
        How heads outside the circuit are ablated; see `circuits.ablate`. MLPs are left as they are.
    shares
        Shares of all heads, ascending.

    Raises
    ------
    ConfigError
        For shares that do not ascend between 0 and 1, or another order.
    PatchError
        Where the whole model's mean margin is that of the model without heads, so that f is undefined; and as `ablate`.
    """
    given = tuple(float(s) for s in shares)
    if not given or list(given) != sorted(set(given)) or not 0 <= given[0] <= given[-1] <= 1:
        msg = f"shares={list(given)}: give ascending shares of all heads between 0 and 1"
        raise ConfigError(msg)
    best = ranked(model, ranking, order)
    circuits = tuple(best[: round(share * len(best))] for share in given)
    alone = _Alone(model, examples, how, tokens, reference, batch_size, seed, progress)
    found = alone.margins([(), best, *circuits])
    _check_gap(model, found[:, 1], found[:, 0])
    return Curve(given, circuits, found[:, 2:], found[:, 1], found[:, 0], tuple(e.group for e in examples), order, how)


def minimal(
    model: Lvlm,
    examples: Sequence[Example],
    ranking: Ranking,
    goal: float = 0.9,
    tolerance: float = 0.01,
    *,
    how: How = "mean",
    tokens: Where = "all",
    reference: Sequence[Example] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> MinimalSet:
    """Return a small set of heads that alone is faithful to `goal`: the ranking's beginning, less what is not needed.

    Heads are added in order until f reaches the goal; then, the worst first, each is left out for good where f loses
    less than `tolerance` and stays at the goal. Completeness and minimality as in Wang et al. (2023, arXiv 2211.00593,
    section 4), for single heads.

    Parameters
    ----------
    model, examples, ranking, how, tokens, reference, batch_size, seed, progress
        As for `curve`.
    goal
        Least f of the set.
    tolerance
        What f may lose with a head that is not needed.

    Raises
    ------
    PatchError
        As `curve`.
    """
    best = ranked(model, ranking, "signed")
    alone = _Alone(model, examples, how, tokens, reference, batch_size, seed, progress)
    empty, full = (float(x) for x in alone.margins([(), best]).mean(0))
    _check_gap(model, np.array([full]), np.array([empty]))

    def f(*circuits: Sequence[Head]) -> np.ndarray:
        return _f(alone.margins(circuits).mean(0), full, empty)

    size = next(k for k in range(len(best) + 1) if k == len(best) or f(best[:k])[0] >= goal)
    chosen, now = list(best[:size]), float(f(best[:size])[0])
    for head in reversed(best[:size]):
        without = [h for h in chosen if h != head]
        then = float(f(without)[0])
        if then >= goal and now - then < tolerance:
            chosen, now = without, then
    left_out = [[h for h in chosen if h != head] for head in chosen]
    lost = now - f(*left_out) if chosen else np.zeros(0)
    rest = [h for h in best if h not in chosen]
    dropped = tuple(h for h in best[:size] if h not in chosen)
    return MinimalSet(tuple(chosen), now, float(f(rest)[0]), tuple(lost.tolist()), dropped, goal, tolerance)


def area(shares: Sequence[float], values: np.ndarray) -> float:
    """Return the area under values over shares, by the trapezoid rule."""
    return float(np.trapezoid(np.asarray(values, np.float64), np.asarray(shares, np.float64)))


def ranked(model: Lvlm, ranking: Ranking, order: str = "signed") -> tuple[Head, ...]:
    """Return all heads of a model, best first; raises `PatchError` for a ranking of other heads."""
    if order not in ("signed", "absolute"):
        msg = f"order='{order}': choose 'signed' or 'absolute'"
        raise ConfigError(msg)
    every = heads_of(model)
    if isinstance(ranking, HeadScores | np.ndarray):
        scores = np.asarray(ranking.mean if isinstance(ranking, HeadScores) else ranking, np.float64)
        if scores.shape != (model.n_layers, model.n_heads) or not np.isfinite(scores).all():
            msg = f"a ranking of {model.name} needs finite scores [{model.n_layers}, {model.n_heads}], not {list(scores.shape)}"
            raise PatchError(msg)
        flat = scores.ravel() if order == "signed" else np.abs(scores).ravel()
        return tuple(every[i] for i in np.argsort(-flat, kind="stable"))
    if sorted(ranking) != every:
        msg = f"a ranking of {model.name} needs each of its {len(every)} heads once"
        raise PatchError(msg)
    return tuple(ranking)


def heads_of(model: Lvlm) -> list[Head]:
    """Return all heads of the decoder, layer by layer."""
    return [Head(i, h) for i in range(model.n_layers) for h in range(model.n_heads)]


def _f(margins: np.ndarray, full: float, empty: float) -> np.ndarray:
    return (margins - empty) / (full - empty)


def _check_gap(model: Lvlm, full: np.ndarray, empty: np.ndarray) -> None:
    gap = float(full.mean() - empty.mean())
    if abs(gap) <= _LEAST:
        msg = f"{model.name} prefers the truth by as much without any head ({empty.mean():.3g} logits): f is undefined"
        raise PatchError(msg)
