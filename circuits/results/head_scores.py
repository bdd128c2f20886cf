"""What each head does to the answer, over pairs: effects, how sure they are, and the heads to look at."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from circuits.results.head_plot import heatmap
from circuits.results.statistics import (
    Comparison,
    Rows,
    Stability,
    by_group,
    compare_rows,
    family_p,
    mean_interval,
    share_positive,
    stability,
)
from groundscope.core import artifacts
from groundscope.core.errors import PatchError, StoreError
from lvlm.sites import Head, parse_heads

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

VERSION = 1
_KIND = "head_scores"
_ARRAYS = ("effects", "clean", "corrupt")
_LISTS = ("ids", "groups", "levels", "kinds")


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Effect of patching each head, by pair; made by `patch_heads`."""

    effects: np.ndarray
    """float32 ``[n_pairs, n_layers, n_heads]``: share of the difference between clean and corrupt that a head carries;
    0 for nothing, 1 for all, negative where it works against it. Read-only."""
    clean: np.ndarray
    """Log-odds of the clean against the corrupt answer in the clean run, float32 ``[n_pairs]``."""
    corrupt: np.ndarray
    """The same in the corrupt run."""
    ids: tuple[str, ...]
    """Id of each pair's clean example."""
    groups: tuple[str, ...]
    """Scene or image of each pair: the unit of the intervals."""
    levels: tuple[str, ...]
    """``object``, ``attribute`` or ``relation``, of each pair."""
    kinds: tuple[str, ...]
    """What was changed in each pair."""
    tokens: str
    """Where heads were patched: ``last`` or ``suffix``."""
    direction: str
    """``denoise`` or ``noise``."""
    min_effect: float
    """Least ``|LD_clean - LD_corrupt|`` of the pairs kept, in logits."""
    excluded: int
    """Number of pairs left out because they were under it."""
    model: str
    """Name of the model."""
    config_hash: str
    weights_hash: str
    pairs_digest: str
    """SHA-256 of all pairs that were given, those left out included."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping, plain JSON."""

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            array = np.array(getattr(self, name), np.float32)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        for name in _LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))
        sizes = {name: len(getattr(self, name)) for name in _ARRAYS + _LISTS}
        if self.effects.ndim != 3 or len(set(sizes.values())) != 1 or not len(self.effects):
            msg = (
                f"head scores need effects [n_pairs, n_layers, n_heads] and as many of the rest, at least one: {sizes}"
            )
            raise PatchError(msg)

    # ---- numbers

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers, and of heads in each."""
        return self.effects.shape[1], self.effects.shape[2]

    @property
    def n_pairs(self) -> int:
        """Number of pairs kept."""
        return len(self.effects)

    @property
    def mean(self) -> np.ndarray:
        """Mean effect over pairs, float64 ``[n_layers, n_heads]``."""
        return self.effects.mean(axis=0, dtype=np.float64)

    @property
    def patching_effect(self) -> np.ndarray:
        """``(LD_patched - LD_corrupt) / (LD_clean - LD_corrupt)`` in either direction, float32, shaped as `effects`."""
        return self.effects if self.direction == "denoise" else 1 - self.effects

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of `mean`, float64 ``[n_layers, n_heads]``, clustered by group; NaN with one group only."""
        _, sums, counts = by_group(self.effects, self.groups)
        n = len(counts)
        if n < 2:
            return np.full(self.shape, math.nan)
        residual = sums - counts[:, None, None] * self.mean
        return np.sqrt((residual**2).sum(axis=0) * n / (n - 1)) / self.n_pairs

    def interval(self, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the percentile bootstrap interval of `mean` over groups: low and high, ``[n_layers, n_heads]`` each."""
        return mean_interval(self.effects, self.groups, level, resamples, seed)

    @property
    def sign(self) -> np.ndarray:
        """Share of groups whose mean effect is above 0, float64 ``[n_layers, n_heads]``; 1 where all agree."""
        return share_positive(self.effects, self.groups)

    def family_p(self, flips: int = 2000, seed: int = 0) -> np.ndarray:
        """Return each head's two-sided p against no effect, corrected for all heads, ``[n_layers, n_heads]``.

        By flipping the signs of whole groups and comparing with the largest statistic of any head:
        `circuits.results.statistics.family_p`. The chance that any head without an effect has p <= a is at most a.
        """
        return family_p(self.effects, self.groups, flips, seed)

    def stability(self, k: int = 5, splits: int = 200, seed: int = 0, level: float = 0.95) -> Stability:
        """Divide the groups into random halves and say how alike the two rank the heads.

        Parameters
        ----------
        k
            How many of the first heads to compare.
        splits
            Number of random divisions.
        seed
            Decides them.
        level
            Share of the divisions that the ranges cover. They say how much rankings from half of the groups vary, not
            how sure the ranking from all of them is: that is surer.

        Raises
        ------
        PatchError
            With fewer than 4 groups, or fewer than `k` heads.
        """
        return stability(self.effects, self.groups, k, splits, seed, level)

    # ---- choices

    def top(self, k: int) -> tuple[Head, ...]:
        """Return the `k` heads of largest mean effect, largest first; raises `PatchError` where there are fewer."""
        self._check_count(k)
        order = np.argsort(-self.mean, axis=None, kind="stable")[:k]
        return tuple(Head(int(i) // self.shape[1], int(i) % self.shape[1]) for i in order)

    def random_heads(self, k: int, seed: int, exclude: Collection[Head | str] = ()) -> tuple[Head, ...]:
        """Return `k` heads at random, none of `exclude`: a control; see `circuits.random_heads`."""
        return random_heads(k, seed, exclude, shape=self.shape)

    def select(self, keep: np.ndarray) -> Self:
        """Return the scores over some pairs only: a boolean mask or numbers, e.g. ``np.array(s.levels) == 'object'``."""
        which = np.arange(self.n_pairs)[keep]
        lists = {name: tuple(getattr(self, name)[i] for i in which) for name in _LISTS}
        return replace(self, **{name: getattr(self, name)[which] for name in _ARRAYS}, **lists)

    def frame(self, level: float = 0.95) -> pd.DataFrame:
        """Return one row a head: layer, head, name, effect, standard_error, low, high, sign, p, rank (1 for the largest).

        ``p`` is `family_p`: corrected for looking at all heads.
        """
        import pandas as pd

        low, high = self.interval(level)
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

    def heatmap(self, path: str | Path | None = None, ax: Axes | None = None, *, level: float = 0.05) -> Axes:
        """Draw the mean effects, layers upwards; a dot marks heads whose `family_p` is at most `level`.

        Parameters
        ----------
        path
            Where to write the picture; its ending decides the format. Without one nothing is written.
        ax
            Where to draw; by default a figure of its own.
        level
            Of significance.
        """
        title = f"{self.model}: {self.direction} at {self.tokens}, {self.n_pairs} pairs"
        return heatmap(self.mean, title=title, label="mean effect", marked=self.family_p() <= level, path=path, ax=ax)

    def _check_count(self, k: int) -> None:
        if not 1 <= k <= self.mean.size:
            msg = f"top({k}): there are {self.mean.size} heads ({self.shape[0]} layers of {self.shape[1]})"
            raise PatchError(msg)

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Write one ``.safetensors`` file, numbers as tensors and the rest as JSON in its header."""
        path = Path(path)
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _ARRAYS}
        card = {k: list(v) if k in _LISTS else dict(v) if k == "provenance" else v for k, v in rest.items()}
        artifacts.write(path, _KIND, VERSION, {name: getattr(self, name) for name in _ARRAYS}, card)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises `StoreError` where it is missing, damaged, something else or newer."""
        tensors, card = artifacts.read(Path(path), _KIND, VERSION)
        try:
            return cls(**tensors, **card)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"{path}: damaged head scores: {error}"
            raise StoreError(msg) from error


def compare(
    a: HeadScores,
    b: HeadScores,
    k: tuple[int, ...] = (5, 10),
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Say how alike two scores of the same heads are: other pairs, other positions, another direction, another model.

    Groups are drawn with replacement; a group in both is drawn for both at once, so that on the same pairs the
    difference is a paired one, and groups in one only are drawn apart. A draw ranks heads by noisier means than the
    data do: percentile intervals of rank correlation and overlap therefore lie rather too low than too high.

    Parameters
    ----------
    a, b
        Scores of models with as many layers and heads.
    k
        At which numbers of first heads to compare.
    resamples
        Number of draws.
    seed
        Decides them.
    level
        Coverage of the intervals.

    Raises
    ------
    PatchError
        Where the shapes differ, or there are fewer than `k` heads.
    """
    first, second = Rows(a.effects, a.groups), Rows(b.effects, b.groups)
    return compare_rows(first, second, k, resamples=resamples, seed=seed, level=level)


def random_heads(
    k: int, seed: int, exclude: Collection[Head | str] = (), *, shape: tuple[int, int]
) -> tuple[Head, ...]:
    """Return `k` different heads at random: the control of a choice of heads.

    Parameters
    ----------
    k
        How many.
    seed
        Decides which; nothing else does.
    exclude
        Heads that are not to be drawn, the chosen ones say.
    shape
        Number of layers, and of heads in each.

    Raises
    ------
    PatchError
        Where fewer than `k` are left.
    """
    out = set(parse_heads(exclude))
    left = [head for i in range(shape[0]) for h in range(shape[1]) if (head := Head(i, h)) not in out]
    if not 0 < k <= len(left):
        msg = f"{k} heads at random: {len(left)} of {shape[0] * shape[1]} are left to draw from"
        raise PatchError(msg)
    return tuple(left[int(i)] for i in np.random.default_rng(seed).permutation(len(left))[:k])
