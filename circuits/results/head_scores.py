"""Effects of heads on the answer, over pairs: means, uncertainty, and selection of heads."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
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
from groundscope.core.result_fields import building, check_fields
from groundscope.core.short_repr import short_repr
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
    """Effect of patching each head, by pair; returned by `patch_heads`."""

    effects: np.ndarray
    """float32 ``[n_pairs, n_layers, n_heads]``: share of the difference between clean and corrupt that a head carries;
    0 for none, 1 for all, negative if it opposes the answer. Read-only."""
    clean: np.ndarray
    """Log-odds of the clean against the corrupt answer in the clean run, float32 ``[n_pairs]``."""
    corrupt: np.ndarray
    """The same log-odds in the corrupt run."""
    ids: tuple[str, ...]
    """Id of each pair's clean example."""
    groups: tuple[str, ...]
    """Scene or image of each pair: the resampling unit of the intervals."""
    levels: tuple[str, ...]
    """``object``, ``attribute`` or ``relation``, for each pair."""
    kinds: tuple[str, ...]
    """Kind of change in each pair."""
    tokens: str
    """Patched positions: ``last`` or ``suffix``."""
    direction: str
    """``denoise`` or ``noise``."""
    min_effect: float
    """Least ``|LD_clean - LD_corrupt|`` of a pair, in logits."""
    excluded: int
    """Number of pairs excluded because they are below `min_effect`."""
    model: str
    """Name of the model."""
    config_hash: str
    weights_hash: str
    pairs_digest: str
    """SHA-256 of all pairs, including excluded pairs."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Further provenance, JSON-serializable."""

    __repr__ = short_repr

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
            msg = f"head scores need effects [n_pairs, n_layers, n_heads], and all fields of equal length >= 1; got {sizes}"
            raise PatchError(msg)

    # ---- numbers

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers, and of heads per layer."""
        return self.effects.shape[1], self.effects.shape[2]

    @property
    def n_pairs(self) -> int:
        """Number of pairs."""
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
        self._check_count(k)
        order = np.argsort(-self.mean, axis=None, kind="stable")[:k]
        return tuple(Head(int(i) // self.shape[1], int(i) % self.shape[1]) for i in order)

    def random_heads(self, k: int, *, exclude: Collection[Head | str] = (), seed: int) -> tuple[Head, ...]:
        """Return `k` random heads, none of `exclude`, as a control; see `circuits.random_heads`."""
        return random_heads(self.shape, k, exclude=exclude, seed=seed)

    def select(self, keep: np.ndarray) -> Self:
        """Return the scores of some pairs, by boolean mask or indices, e.g. ``np.array(s.levels) == 'object'``."""
        which = np.arange(self.n_pairs)[keep]
        lists = {name: tuple(getattr(self, name)[i] for i in which) for name in _LISTS}
        return replace(self, **{name: getattr(self, name)[which] for name in _ARRAYS}, **lists)

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
        title = f"{self.model}: {self.direction} at {self.tokens}, {self.n_pairs} pairs"
        return heatmap(self.mean, title=title, label="mean effect", marked=self.family_p() <= alpha, path=path, ax=ax)

    def _check_count(self, k: int) -> None:
        if not 1 <= k <= self.mean.size:
            msg = f"k={k} must be between 1 and {self.mean.size} heads ({self.shape[0]} layers of {self.shape[1]})"
            raise PatchError(msg)

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Write one ``.safetensors`` file, with numbers as tensors and other fields as JSON in its header."""
        path = Path(path)
        fields_of_card = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _ARRAYS}
        card = {k: list(v) if k in _LISTS else dict(v) if k == "provenance" else v for k, v in fields_of_card.items()}
        artifacts.write(path, _KIND, VERSION, {name: getattr(self, name) for name in _ARRAYS}, card)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`; raise `StoreError` if it is missing, damaged, of another kind or newer."""
        tensors, card = artifacts.read(Path(path), _KIND, VERSION)
        with building(f"{path} is a damaged file of head scores", StoreError):
            return cls(**tensors, **check_fields(card, cls))


def compare(
    a: HeadScores,
    b: HeadScores,
    *,
    k: Sequence[int] = (5, 10),
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
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
    """
    first, second = Rows(a.effects, a.groups), Rows(b.effects, b.groups)
    return compare_rows(first, second, k, resamples=resamples, confidence=confidence, seed=seed)


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
    """
    excluded = set(parse_heads(exclude))
    candidates = [head for i in range(shape[0]) for h in range(shape[1]) if (head := Head(i, h)) not in excluded]
    if not 0 < k <= len(candidates):
        msg = f"cannot draw {k} random heads: {len(candidates)} of {shape[0] * shape[1]} heads are available"
        raise PatchError(msg)
    return tuple(candidates[int(i)] for i in np.random.default_rng(seed).permutation(len(candidates))[:k])
