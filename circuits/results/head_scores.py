"""Effects of heads on the answer, over pairs: means, uncertainty, and selection of heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from circuits.results.head_plot import heatmap
from circuits.results.pair_scores import PairScores, standard_error
from circuits.results.statistics import (
    GroupedScores,
    RankingComparison,
    Stability,
    compare_rows,
    family_p,
    mean_interval,
    share_positive,
    stability,
)
from groundscope.core.errors import PatchError
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count
from lvlm.sites import Head, parse_heads

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(PairScores):
    """Effect of patching each head, by pair; returned by `patch_heads`. Effects are ``[n_pairs, n_layers, n_heads]``.

    Examples
    --------
    >>> import numpy as np
    >>> from circuits import HeadScores
    >>> by_pair = {"ids": ("a", "b"), "groups": ("a", "b"), "levels": ("object",) * 2, "kinds": ("blank",) * 2}
    >>> record = {"mode": "denoise", "excluded": 0, "model": "toy", "config_hash": "", "weights_hash": "", "pairs_digest": ""}
    >>> effects = np.array([[[0.1, 0.9]], [[0.3, 0.7]]])
    >>> scores = HeadScores(effects, np.ones(2), -np.ones(2), **by_pair, **record, tokens="last")
    >>> scores.top(1), scores.mean.round(2).tolist()
    ((Head(layer=0, head=1),), [[0.2, 0.8]])
    """

    _FILE: ClassVar[str] = "head_scores"

    __repr__ = short_repr

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.effects.ndim != 3:
            msg = f"head scores need effects [n_pairs, n_layers, n_heads], not {list(self.effects.shape)}"
            raise PatchError(msg)

    # ---- numbers

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers, and of heads per layer."""
        return self.effects.shape[1], self.effects.shape[2]

    @property
    def mean(self) -> np.ndarray:
        """Mean effect over pairs, float64 ``[n_layers, n_heads]``."""
        return self.effects.mean(axis=0, dtype=np.float64)

    @property
    def patching_effect(self) -> np.ndarray:
        """``(M_patched - M_corrupt) / (M_clean - M_corrupt)`` in either mode, float32, shaped as `effects`."""
        return self.effects if self.mode == "denoise" else 1 - self.effects

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of `mean`, float64 ``[n_layers, n_heads]``, clustered by group; NaN with one group only."""
        return standard_error(self.effects, self.groups)

    def interval(
        self, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the bootstrap interval of `mean` over groups: low and high, ``[n_layers, n_heads]`` each."""
        return mean_interval(self.effects, self.groups, resamples=resamples, confidence=confidence, seed=seed)

    @property
    def sign(self) -> np.ndarray:
        """Share of groups with a mean effect above 0, float64 ``[n_layers, n_heads]``."""
        return share_positive(self.effects, self.groups)

    def family_p(self, *, flips: int = 2000, seed: int = 0) -> np.ndarray:
        """Return each head's two-sided p against no effect, corrected for all heads, ``[n_layers, n_heads]``.

        Sign-flip test over groups with the maximum statistic over heads: `circuits.results.statistics.family_p`. The
        probability that any head without an effect has p <= a is at most a.
        """
        return family_p(self.effects, self.groups, flips=flips, seed=seed)

    def stability(self, k: int = 5, *, splits: int = 200, confidence: float = 0.95, seed: int = 0) -> Stability:
        """Split the groups into random halves and measure the agreement of their rankings of heads.

        Parameters
        ----------
        k
            Number of top heads to compare.
        splits
            Number of random splits.
        confidence
            Share of the splits that the ranges cover. The ranges describe rankings from half of the groups; the ranking
            from all groups is more certain.
        seed
            Seed of the random splits.

        Raises
        ------
        PatchError
            If there are fewer than 4 groups, or fewer than `k` heads.
        """
        return stability(self.effects, self.groups, k, splits=splits, confidence=confidence, seed=seed)

    # ---- selection

    def top(self, k: int) -> tuple[Head, ...]:
        """Return the `k` heads of largest mean effect, largest first; raise `PatchError` if there are fewer heads."""
        check_head_count(self.shape, k)
        return largest_heads(self.mean, k)

    def random_heads(self, k: int, *, exclude: Collection[Head | str] = (), seed: int) -> tuple[Head, ...]:
        """Return `k` random heads, none of `exclude`, as a control; see `circuits.random_heads`."""
        return random_heads(self.shape, k, exclude=exclude, seed=seed)

    def frame(self, *, confidence: float = 0.95) -> pd.DataFrame:
        """Return one row per head: layer, head, name, effect, standard_error, low, high, sign, p, rank (1 for the largest).

        ``p`` is `family_p`, corrected for the number of heads.
        """
        import pandas as pd

        low, high = self.interval(confidence=confidence)
        layer, head = np.divmod(np.arange(self.mean.size), self.shape[1])
        rank = np.empty(self.mean.size, int)
        rank[np.argsort(-self.mean, axis=None, kind="stable")] = np.arange(1, self.mean.size + 1)
        return pd.DataFrame(
            {
                "layer": layer,
                "head": head,
                "name": [str(Head(int(a), int(b))) for a, b in zip(layer, head, strict=True)],
                "effect": self.mean.ravel(),
                "standard_error": self.standard_error.ravel(),
                "low": low.ravel(),
                "high": high.ravel(),
                "sign": self.sign.ravel(),
                "p": self.family_p().ravel(),
                "rank": rank,
            }
        )

    def heatmap(self, path: str | Path | None = None, ax: Axes | None = None, *, alpha: float = 0.05) -> Axes:
        """Draw the mean effects, first layer at the bottom; a dot marks heads whose `family_p` is at most `alpha`.

        Parameters
        ----------
        path
            File to write; its suffix selects the format. None writes no file.
        ax
            Axes to draw into; by default those of a new figure.
        alpha
            Significance level.
        """
        title = f"{self.model}: {self.mode} at {self.tokens}, {format_count(self.n_pairs, 'pair')}"
        return heatmap(self.mean, title=title, label="mean effect", marked=self.family_p() <= alpha, path=path, ax=ax)


def compare(
    a: HeadScores,
    b: HeadScores,
    *,
    k: Sequence[int] = (5, 10),
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> RankingComparison:
    """Measure the agreement of two scores of the same heads, e.g. with other pairs, positions, directions or models.

    Groups are drawn with replacement. A group in both scores is drawn jointly, so that the difference is paired on shared
    groups; other groups are drawn independently. Draws rank heads by noisier means than the data, so intervals of rank
    correlation and overlap tend to be too low.

    Parameters
    ----------
    a, b
        Scores of models with equal numbers of layers and heads.
    k
        Numbers of top heads to compare.
    resamples
        Number of draws.
    confidence
        Coverage of the intervals.
    seed
        Seed of the draws.

    Raises
    ------
    PatchError
        If the shapes differ, or there are fewer than `k` heads.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> pairs = gs.counterfactuals.pairs(gs.scenes.dataset(n_images=10, seed=0), "blank")
    >>> first, second = (gs.patch_heads(model, half) for half in (pairs[:2], pairs[-2:]))
    >>> comparison = gs.circuits.compare(first, second, k=(5,))
    >>> comparison.difference.shape, comparison.groups
    ((6, 8), (1, 1, 0))
    """
    first, second = GroupedScores(a.effects, a.groups), GroupedScores(b.effects, b.groups)
    return compare_rows(first, second, k, resamples=resamples, confidence=confidence, seed=seed)


def top_heads(scores: Mapping[str, HeadScores] | Sequence[HeadScores], k: int) -> tuple[Head, ...]:
    """Return the `k` heads of largest effect, averaged over several scores with equal weight.

    Parameters
    ----------
    scores
        Scores of one model, such as one for each kind of pair.
    k
        Number of heads.

    Raises
    ------
    PatchError
        If `scores` is empty, their shapes differ, or there are fewer than `k` heads.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> data = gs.scenes.dataset(n_images=10, seed=0)
    >>> pairs = {kind: gs.counterfactuals.pairs(data, kind)[:2] for kind in ("blank", "object")}
    >>> scores = {kind: gs.patch_heads(model, some) for kind, some in pairs.items()}
    >>> len(gs.top_heads(scores, 3))
    3
    """
    each = list(scores.values()) if isinstance(scores, Mapping) else list(scores)
    if len({s.shape for s in each}) != 1:
        msg = f"top_heads needs scores of equal shape, at least one; got {[s.shape for s in each]}"
        raise PatchError(msg)
    check_head_count(each[0].shape, k)
    return largest_heads(np.mean([s.mean for s in each], axis=0), k)


def largest_heads(values: np.ndarray, k: int) -> tuple[Head, ...]:
    """Return the `k` heads of largest value ``[n_layers, n_heads]``, largest first; ties in order of layer and head."""
    order = np.argsort(-values, axis=None, kind="stable")[:k]
    return tuple(Head(*divmod(int(i), values.shape[1])) for i in order)


def check_head_count(shape: tuple[int, int], k: int) -> None:
    """Raise `PatchError` unless there are `k` heads."""
    if not 1 <= k <= shape[0] * shape[1]:
        msg = f"k={k} must be between 1 and {shape[0] * shape[1]} heads ({shape[0]} layers of {shape[1]})"
        raise PatchError(msg)


def random_heads(
    shape: tuple[int, int], k: int, *, exclude: Collection[Head | str] = (), seed: int
) -> tuple[Head, ...]:
    """Return `k` distinct random heads, as a control for a selection of heads.

    Parameters
    ----------
    shape
        Number of layers, and of heads per layer; `HeadScores.shape`.
    k
        Number of heads.
    exclude
        Heads to exclude, such as the selected heads.
    seed
        Random seed; the only source of randomness.

    Raises
    ------
    PatchError
        If fewer than `k` heads remain.

    Examples
    --------
    >>> from circuits import random_heads
    >>> heads = random_heads((6, 8), 3, exclude=["L0.H0"], seed=0)
    >>> len(set(heads)), heads == random_heads((6, 8), 3, exclude=["L0.H0"], seed=0)
    (3, True)
    """
    excluded = set(parse_heads(exclude))
    candidates = [head for i in range(shape[0]) for h in range(shape[1]) if (head := Head(i, h)) not in excluded]
    if not 0 < k <= len(candidates):
        msg = f"cannot draw {k} random heads: {len(candidates)} of {shape[0] * shape[1]} heads are available"
        raise PatchError(msg)
    return tuple(candidates[int(i)] for i in np.random.default_rng(seed).permutation(len(candidates))[:k])
