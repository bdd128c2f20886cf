"""Effects of patching sites at positions on the answer, over pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from circuits.results.pair_scores import PairScores
from groundscope.core.errors import PatchError
from groundscope.core.text import format_count

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class PatchScores(PairScores):
    """Effect of patching each site, by pair and position; returned by `circuits.patch`.

    Effects are ``[n_pairs, n_sites, n_positions]``; NaN if a pair has fewer positions than others. Pairs are
    aligned at their last position.

    Examples
    --------
    >>> import numpy as np
    >>> from circuits import PatchScores
    >>> by_pair = {"ids": ("a",), "groups": ("a",), "levels": ("object",), "kinds": ("blank",)}
    >>> record = {"mode": "denoise", "excluded": 0, "model": "toy", "config_hash": "", "weights_hash": "", "pairs_digest": ""}
    >>> names = {"sites": ("decoder.L1.mlp_out",), "positions": ("last",), "path": "shared prefix"}
    >>> scores = PatchScores(np.array([[[0.4]]]), np.ones(1), -np.ones(1), **names, **by_pair, **record, tokens="last")
    >>> scores.frame()[["site", "position"]].values.tolist()
    [['decoder.L1.mlp_out', 'last']]
    """

    _FILE: ClassVar[str] = "patch_scores"

    sites: tuple[str, ...] = field(kw_only=True)
    """Names of patched units: ``decoder.L3.resid_post``, ``L3.H5``, ``L3.H5+L4.H1``, the path ``L3.H5->L4.H1``."""
    positions: tuple[str, ...] = field(kw_only=True)
    """Names of positions: the requested tokens, or, with ``:each``, the distance from the last of them, ``-2``, ``-1``,
    ``0``."""
    path: str = field(kw_only=True)
    """Method of the runs: ``shared prefix``, or ``whole forwards`` if the model does not support it; same results."""
    through: str = field(default="", kw_only=True)
    """For paths, the receiver's inputs and the state of the MLPs: ``qkv, mlps frozen``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sites", "positions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        shape = (len(self.ids), len(self.sites), len(self.positions))
        if self.effects.shape != shape:
            msg = f"effects {list(self.effects.shape)} must be of pairs x sites x positions {list(shape)}"
            raise PatchError(msg)

    def __repr__(self) -> str:
        pairs, sites, positions = self.effects.shape
        return (
            f"PatchScores({format_count(pairs, 'pair')} ({self.excluded} excluded) x {sites} sites x {positions} "
            f"positions, {self.tokens}, {self.mode}, {self.metric}, {self.path})"
        )

    @property
    def mean(self) -> np.ndarray:
        """Mean effect over the pairs with the position, float64 ``[n_sites, n_positions]``."""
        there = ~np.isnan(self.effects)
        return np.nansum(self.effects, axis=0, dtype=np.float64) / there.sum(axis=0)

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of `mean`, float64 ``[n_sites, n_positions]``, clustered by group; NaN with one group only."""
        names, index = np.unique(np.array(self.groups), return_inverse=True)
        if len(names) < 2:
            return np.full(self.mean.shape, math.nan)
        deviation = np.nan_to_num(self.effects - self.mean)
        sums = np.zeros((len(names), *self.mean.shape))
        np.add.at(sums, index, deviation.astype(np.float64))
        counts = (~np.isnan(self.effects)).sum(axis=0)
        return np.sqrt((sums**2).sum(axis=0) * len(names) / (len(names) - 1)) / counts

    def frame(self) -> pd.DataFrame:
        """Return one row per site and position: site, position, effect, standard_error, n_pairs, excluded."""
        import pandas as pd

        sites, positions = self.mean.shape
        return pd.DataFrame(
            {
                "site": np.repeat(self.sites, positions),
                "position": np.tile(self.positions, sites),
                "effect": self.mean.ravel(),
                "standard_error": self.standard_error.ravel(),
                "n_pairs": (~np.isnan(self.effects)).sum(axis=0).ravel(),
                "excluded": self.excluded,
            }
        )
