"""Effects of patching sites at positions on the answer, over pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from groundscope.core import artifacts
from groundscope.core.errors import PatchError, StoreError
from groundscope.core.result_fields import building, check_fields

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
_KIND = "patch_scores"
_ARRAYS = ("effects", "clean", "corrupt")
_BY_PAIR = ("ids", "groups", "levels", "kinds")


@dataclass(frozen=True, eq=False)
class PatchScores:
    """Effect of patching each site, by pair and position; returned by `circuits.patch`."""

    effects: np.ndarray
    """float32 ``[n_pairs, n_sites, n_positions]``: the share of the difference between clean and corrupt that a site
    carries; 0 for none, 1 for all. NaN if a pair has fewer positions than others: they are aligned at the last. Read-only."""
    clean: np.ndarray
    """The metric in the clean run, float32 ``[n_pairs]``."""
    corrupt: np.ndarray
    """The metric in the corrupt run."""
    sites: tuple[str, ...]
    """Names of patched units: ``decoder.L3.resid_post``, ``L3.H5``, ``L3.H5+L4.H1``, the path ``L3.H5->L4.H1``."""
    positions: tuple[str, ...]
    """Names of positions: the requested tokens, or, with ``:each``, the distance from the last of them, ``-2``, ``-1``,
    ``0``."""
    ids: tuple[str, ...]
    """Id of each pair's clean example."""
    groups: tuple[str, ...]
    """Scene or image of each pair: the cluster of the standard errors."""
    levels: tuple[str, ...]
    kinds: tuple[str, ...]
    tokens: str
    direction: str
    metric: str
    min_effect: float
    """Least ``|M_clean - M_corrupt|`` of a pair, in units of the metric."""
    excluded: int
    """Number of pairs excluded because they are below `min_effect`."""
    path: str
    """Method of the runs: ``shared prefix``, or ``whole forwards`` if the model does not support it; same results."""
    model: str
    config_hash: str
    weights_hash: str
    pairs_digest: str
    """SHA-256 of all pairs, including excluded pairs."""
    through: str = ""
    """For paths, the receiver's inputs and the state of the MLPs: ``qkv, mlps frozen``."""

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            array = np.array(getattr(self, name), np.float32)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        for name in (*_BY_PAIR, "sites", "positions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        shape = (len(self.ids), len(self.sites), len(self.positions))
        if self.effects.shape != shape or not len(self.ids):
            msg = f"effects {list(self.effects.shape)} must be non-empty, of pairs x sites x positions {list(shape)}"
            raise PatchError(msg)

    def __repr__(self) -> str:
        pairs, sites, positions = self.effects.shape
        return (
            f"PatchScores({pairs} pairs ({self.excluded} excluded) x {sites} sites x {positions} positions, {self.tokens}, "
            f"{self.direction}, {self.metric}, {self.path})"
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

    def save(self, path: str | Path) -> Path:
        """Write one ``.safetensors`` file, with numbers as tensors and other fields as JSON in its header."""
        path = Path(path)
        fields_of_card = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _ARRAYS}
        card = {k: list(v) if isinstance(v, tuple) else v for k, v in fields_of_card.items()}
        artifacts.write(path, _KIND, VERSION, {name: getattr(self, name) for name in _ARRAYS}, card)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`; raise `StoreError` if it is missing, damaged, of another kind or newer."""
        tensors, card = artifacts.read(Path(path), _KIND, VERSION)
        with building(f"{path} is a damaged file of patch scores", StoreError):
            return cls(**tensors, **check_fields(card, cls))
