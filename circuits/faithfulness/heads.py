"""How faithful a circuit is: what the model still does with these heads alone.

The curve of the Mechanistic Interpretability Benchmark (Mueller et al. 2025, arXiv 2504.13151): with m(C) the mean
margin of the true answer when every head outside C is ablated, ``f(k) = (m(C_k) - m(none)) / (m(all) - m(none))`` for
the best k of all heads. Two areas sum it up: CPR, of f, for a ranking by signed effect, how soon the model's own
performance is there; CMD, of ``|1 - f|``, for a ranking by absolute effect, how far behaviour is from the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from circuits.ablation import How, Where, ablate
from circuits.faithfulness.curve import SHARES, FaithfulCurve, check_gap, ratio
from circuits.results.head_scores import HeadScores
from concepts.schema import Example
from groundscope.core.errors import ConfigError, PatchError
from lvlm.model import Lvlm
from lvlm.sites import Head, parse_heads

__all__ = ["Curve", "MinimalSet", "curve", "heads_of", "minimal", "ranked"]

Ranking = HeadScores | Sequence[Head | str] | np.ndarray
"""Scores, of which mean effects rank; all heads, best first; or one number a head, ``[n_layers, n_heads]``."""


@dataclass(frozen=True, eq=False)
class Curve(FaithfulCurve):
    """What is left of the model's preference for the truth, its margin in logits, with the best heads alone."""

    counted = "heads"

    circuits: tuple[tuple[Head, ...], ...]
    """The heads of each share, ``round(share * n_heads)`` of them, best first."""
    order: Literal["signed", "absolute"]
    how: How
    """What became of the heads outside."""


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
    check_gap(model.name, found[:, 1], found[:, 0], "without any head")
    groups = tuple(e.group for e in examples)
    return Curve(given, found[:, 2:], found[:, 1], found[:, 0], groups, circuits, order, how)


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
    check_gap(model.name, np.array([full]), np.array([empty]), "without any head")

    def f(*circuits: Sequence[Head]) -> np.ndarray:
        return ratio(alone.margins(circuits).mean(0), full, empty)

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
    heads = parse_heads(ranking)
    if sorted(heads) != every:
        msg = f"a ranking of {model.name} needs each of its {len(every)} heads once"
        raise PatchError(msg)
    return heads


def heads_of(model: Lvlm) -> list[Head]:
    """Return all heads of the decoder, layer by layer."""
    return [Head(i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
