"""Faithfulness of circuits of heads: ablate all other heads and measure the model's margin.

The curve of the Mechanistic Interpretability Benchmark (Mueller et al. 2025, arXiv 2504.13151): with m(C) the mean
margin of the true answer when every head outside C is ablated, ``f(k) = (m(C_k) - m(none)) / (m(all) - m(none))`` for
the best k of all heads. Two areas summarize it: CPR, of f, for a ranking by signed effect (how fast performance is
recovered); CMD, of ``|1 - f|``, for a ranking by absolute effect (how far behavior is from the full model's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from circuits.ablation import Method, ablate
from circuits.faithfulness.curve import SHARES, FaithfulCurve, check_gap, ratio
from circuits.head_set import HeadSet, all_heads
from circuits.results.head_scores import HeadScores
from concepts.schema import Example
from groundscope.core.errors import ConfigError, PatchError
from groundscope.core.short_repr import short_repr
from lvlm.model import Lvlm
from lvlm.sites import Head, parse_heads

__all__ = ["Curve", "MinimalSet", "curve", "minimal", "ranked"]

Ranking = HeadScores | Sequence[Head | str] | np.ndarray
"""Scores, ranked by mean effect; all heads, best first; or one number per head, ``[n_layers, n_heads]``."""


@dataclass(frozen=True, eq=False)
class Curve(FaithfulCurve):
    """Share of the model's margin for the true answer that the best heads preserve.

    Examples
    --------
    >>> import numpy as np
    >>> from circuits.faithfulness import Curve
    >>> margins, full, empty = np.array([[1.0, 2.0]]), np.array([2.0]), np.array([0.0])
    >>> curve = Curve((0.5, 1.0), margins, full, empty, ("scene",), ((), ()), "signed", "mean")
    >>> curve.faithfulness.tolist(), curve.cpr
    ([0.5, 1.0], 0.375)
    """

    counted = "heads"

    circuits: tuple[tuple[Head, ...], ...]
    """The best ``round(share * n_heads)`` heads of each share, best first."""
    order: Literal["signed", "absolute"]
    method: Method
    """Ablation of the heads outside the circuit."""

    __repr__ = short_repr


@dataclass(frozen=True)
class MinimalSet:
    """A small set of heads that is as faithful as required, with the contribution of each head.

    Examples
    --------
    >>> from circuits.faithfulness import MinimalSet
    >>> from lvlm import Head
    >>> MinimalSet((Head(1, 2),), 0.95, 0.1, (0.95,), (), goal=0.9, tolerance=0.01).faithfulness
    0.95
    """

    heads: tuple[Head, ...]
    faithfulness: float
    """f of these heads."""
    left: float
    """f of all other heads: near 0 for a complete set (completeness)."""
    lost: tuple[float, ...]
    """Decrease of f without each head (minimality): all at least `tolerance`."""
    dropped: tuple[Head, ...]
    """Top heads of the ranking that were removed as unnecessary."""
    goal: float
    tolerance: float

    __repr__ = short_repr


@dataclass(frozen=True, eq=False)
class _CircuitMargins:
    """Margins of circuits, cached."""

    model: Lvlm
    examples: Sequence[Example]
    method: Method
    tokens: str
    reference: Sequence[Example] | None
    batch_size: int
    seed: int
    progress: bool | None
    cache: dict[frozenset[Head], np.ndarray] = field(default_factory=dict)

    def margins(self, circuits: Sequence[Sequence[Head]]) -> np.ndarray:
        """Return the margin with each circuit only, float64 ``[n_examples, n_circuits]``."""
        every = all_heads(self.model)
        whole = frozenset(every)
        new = [c for c in dict.fromkeys(frozenset(c) for c in circuits) if c not in self.cache and c != whole]
        if new or whole not in self.cache:
            outside = [HeadSet(head for head in every if head not in circuit) for circuit in new or [frozenset()]]
            ablation = ablate(
                self.model,
                self.examples,
                outside,
                tokens=self.tokens,
                method=self.method,
                reference=self.reference,
                batch_size=self.batch_size,
                seed=self.seed,
                progress=self.progress,
            )
            self.cache[whole] = ablation.margins.astype(np.float64)
            self.cache.update(zip(new or [frozenset()], ablation.ablated.T.astype(np.float64), strict=True))
        return np.stack([self.cache[frozenset(c)] for c in circuits], axis=1)


def curve(
    model: Lvlm,
    examples: Sequence[Example],
    ranking: Ranking,
    *,
    tokens: str = "all",
    order: Literal["signed", "absolute"] = "signed",
    shares: Sequence[float] = SHARES,
    method: Method = "mean",
    reference: Sequence[Example] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> Curve:
    """Measure how much of the model's preference for the true answer its best heads preserve.

    Parameters
    ----------
    model
        In evaluation mode.
    examples
        Questions with candidate answers; not the examples that the ranking was computed on.
    ranking
        Ranking of heads: scores, all heads in order, or numbers ``[n_layers, n_heads]``.
    order
        Rank by effect (``signed``) or by absolute effect (``absolute``), largest first. Does not apply to a sequence of
        heads.
    shares
        Shares of all heads, ascending.
    tokens, method, reference, batch_size, seed, progress
        Ablation of the heads outside the circuit; see `circuits.ablate`. MLPs are not ablated.

    Raises
    ------
    ConfigError
        If shares are not ascending between 0 and 1, or `order` is unknown.
    PatchError
        If the mean margin is the same with and without all heads, so that f is undefined; and as `ablate`.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> questions = gs.scenes.dataset(n_images=10, seed=0)[:3]
    >>> ranking = gs.all_heads(model)
    >>> curve = gs.faithfulness.curve(model, questions, ranking, shares=(0.5, 1.0))
    >>> curve.sizes, curve.faithfulness[-1].item()
    ((24, 48), 1.0)
    """
    ascending = tuple(float(s) for s in shares)
    if not ascending or list(ascending) != sorted(set(ascending)) or not 0 <= ascending[0] <= ascending[-1] <= 1:
        msg = f"invalid shares={list(ascending)}: pass ascending shares of all heads between 0 and 1"
        raise ConfigError(msg)
    best = ranked(model, ranking, order=order)
    circuits = tuple(best[: round(share * len(best))] for share in ascending)
    circuit_margins = _CircuitMargins(model, examples, method, tokens, reference, batch_size, seed, progress)
    margins = circuit_margins.margins([(), best, *circuits])
    check_gap(model.name, margins[:, 1], margins[:, 0], "without any head")
    groups = tuple(e.group for e in examples)
    return Curve(ascending, margins[:, 2:], margins[:, 1], margins[:, 0], groups, circuits, order, method)


def minimal(
    model: Lvlm,
    examples: Sequence[Example],
    ranking: Ranking,
    *,
    tokens: str = "all",
    goal: float = 0.9,
    tolerance: float = 0.01,
    method: Method = "mean",
    reference: Sequence[Example] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> MinimalSet:
    """Return a small set of heads with faithfulness `goal`: the top of the ranking without unnecessary heads.

    Heads are added in order until f reaches the goal; then, worst first, each head is removed if f decreases by less than
    `tolerance` and stays at the goal. Completeness and minimality as in Wang et al. (2023, arXiv 2211.00593, section 4),
    for single heads.

    Parameters
    ----------
    model, examples, ranking, tokens
        As for `curve`.
    goal
        Required f of the set.
    tolerance
        Largest decrease of f for which a head counts as unnecessary.
    method, reference, batch_size, seed, progress
        As for `curve`.

    Raises
    ------
    PatchError
        As `curve`.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> questions = gs.scenes.dataset(n_images=10, seed=0)[:3]
    >>> small = gs.faithfulness.minimal(model, questions, gs.all_heads(model), goal=0.0, tolerance=0.0)
    >>> small.faithfulness >= small.goal
    True
    """
    best = ranked(model, ranking)
    circuit_margins = _CircuitMargins(model, examples, method, tokens, reference, batch_size, seed, progress)
    empty, full = (float(x) for x in circuit_margins.margins([(), best]).mean(0))
    check_gap(model.name, np.array([full]), np.array([empty]), "without any head")

    def f(*circuits: Sequence[Head]) -> np.ndarray:
        return ratio(circuit_margins.margins(circuits).mean(0), full, empty)

    size = next(k for k in range(len(best) + 1) if k == len(best) or f(best[:k])[0] >= goal)
    selected, now = list(best[:size]), float(f(best[:size])[0])
    for head in reversed(best[:size]):
        without = [h for h in selected if h != head]
        then = float(f(without)[0])
        if then >= goal and now - then < tolerance:
            selected, now = without, then
    left_out = [[h for h in selected if h != head] for head in selected]
    lost = now - f(*left_out) if selected else np.zeros(0)
    remaining = [h for h in best if h not in selected]
    dropped = tuple(h for h in best[:size] if h not in selected)
    return MinimalSet(tuple(selected), now, float(f(remaining)[0]), tuple(lost.tolist()), dropped, goal, tolerance)


def ranked(model: Lvlm, ranking: Ranking, *, order: str = "signed") -> tuple[Head, ...]:
    """Return all heads of a model, best first; raise `PatchError` if the ranking does not match the model's heads.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> import numpy as np
    >>> scores = np.zeros((6, 8))
    >>> scores[3, 5] = -1
    >>> gs.faithfulness.ranked(model, scores, order="absolute")[0]
    Head(layer=3, head=5)
    """
    if order not in ("signed", "absolute"):
        msg = f"unknown order '{order}'; choose 'signed' or 'absolute'"
        raise ConfigError(msg)
    every = all_heads(model)
    if isinstance(ranking, HeadScores | np.ndarray):
        scores = np.asarray(ranking.mean if isinstance(ranking, HeadScores) else ranking, np.float64)
        if scores.shape != (model.n_layers, model.n_heads) or not np.isfinite(scores).all():
            msg = f"invalid ranking {list(scores.shape)}: {model.name} needs finite scores [{model.n_layers}, {model.n_heads}]"
            raise PatchError(msg)
        flat = scores.ravel() if order == "signed" else np.abs(scores).ravel()
        return tuple(every[i] for i in np.argsort(-flat, kind="stable"))
    heads = parse_heads(ranking)
    if sorted(heads) != every:
        msg = f"invalid ranking: list each of the {len(every)} heads of {model.name} exactly once"
        raise PatchError(msg)
    return heads
