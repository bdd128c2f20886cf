"""What all results over counterfactual pairs have in common: the pairs, the model, the patch and its metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import numpy as np

from circuits.results.statistics import by_group
from groundscope.core import artifacts
from groundscope.core.errors import PatchError, StoreError
from groundscope.core.result_fields import building, check_fields
from lvlm.token_selection import LEGACY_PATCH_TOKENS

VERSION = 2
BY_PAIR = ("ids", "groups", "levels", "kinds")
_ARRAYS = ("effects", "clean", "corrupt")


@dataclass(frozen=True, eq=False, kw_only=True)
class PairRecord:
    """The pairs that a result was computed from, the model, and the settings of the patch."""

    ids: tuple[str, ...] = ()
    """Id of each pair's clean example. Like `groups`, `levels` and `kinds`, empty for graphs of groundscope 0.1."""
    groups: tuple[str, ...] = ()
    """Scene or image of each pair: the resampling unit of intervals, and the cluster of standard errors."""
    levels: tuple[str, ...] = ()
    """``object``, ``attribute`` or ``relation``, for each pair."""
    kinds: tuple[str, ...] = ()
    """Kind of change in each pair."""
    tokens: str
    """Patched positions, such as ``last``."""
    mode: str
    """``denoise`` or ``noise``."""
    metric: str = "logit_difference"
    """Name of the metric M; for a function, its module and name. It need not be registered to read a file."""
    min_effect: float = 0.0
    """Least ``|M_clean - M_corrupt|`` of a pair, in units of the metric."""
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

    def __post_init__(self) -> None:
        for name in BY_PAIR:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def card(self, skip: Sequence[str] = ()) -> dict[str, Any]:
        """Return the fields except `skip` as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        return {
            name: list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            for name, value in values.items()
        }


@dataclass(frozen=True, eq=False)
class PairScores(PairRecord):
    """Effects of patches, by pair."""

    effects: np.ndarray
    """float32 ``[n_pairs, ...]``: share of the metric's difference between clean and corrupt that a unit carries; 0 for
    none, 1 for all, negative if it opposes the answer. Read-only."""
    clean: np.ndarray
    """The metric in the clean run, float32 ``[n_pairs]``."""
    corrupt: np.ndarray
    """The metric in the corrupt run."""

    _FILE: ClassVar[str]
    """Kind of the file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _ARRAYS:
            object.__setattr__(self, name, np.array(getattr(self, name), np.float32))
        artifacts.freeze(self)
        sizes = {name: len(getattr(self, name)) for name in (*_ARRAYS, *BY_PAIR)}
        if len(set(sizes.values())) != 1 or not len(self.effects):
            msg = f"scores of pairs need effects [n_pairs, ...] and all fields of equal length >= 1; got {sizes}"
            raise PatchError(msg)

    @property
    def n_pairs(self) -> int:
        """Number of pairs."""
        return len(self.effects)

    @property
    def scale(self) -> float:
        """Mean of ``|M_clean - M_corrupt|`` over pairs, in units of the metric."""
        return float(np.abs(self.clean - self.corrupt).mean())

    def select(self, keep: np.ndarray) -> Self:
        """Return the scores of some pairs, by boolean mask or indices, e.g. ``np.array(s.levels) == 'object'``."""
        which = np.arange(self.n_pairs)[keep]
        lists: dict[str, Any] = {name: tuple(getattr(self, name)[i] for i in which) for name in BY_PAIR}
        return replace(self, **{name: getattr(self, name)[which] for name in _ARRAYS}, **lists)

    def save(self, path: str | Path) -> Path:
        """Write one ``.safetensors`` file, with numbers as tensors and other fields as JSON in its header."""
        path = Path(path)
        tensors = {name: getattr(self, name) for name in _ARRAYS}
        artifacts.write(path, self._FILE, VERSION, tensors, self.card(skip=_ARRAYS))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`; raise `StoreError` if it is missing, damaged, of another kind or newer."""
        tensors, card = artifacts.read(Path(path), cls._FILE, VERSION)
        with building(f"{path} is a damaged file of {cls._FILE.replace('_', ' ')}", StoreError):
            return cls(**tensors, **check_fields(upgraded(card), cls))


def upgraded(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a file with the names and token selections of today.

    Groundscope 0.1 wrote ``direction`` for the mode of a patch, ``suffix`` for ``suffix:all``, and ``12,13`` for
    ``positions:12,13``.
    """
    card = dict(card)
    if "direction" not in card:
        return card
    card["mode"] = card.pop("direction")
    if isinstance(card.get("tokens"), str):
        old, new = card["tokens"], _tokens(card["tokens"])
        card["tokens"] = new
        if card.get("positions") == [old]:
            card["positions"] = [new]
    provenance = card.get("provenance")
    if isinstance(provenance, Mapping) and "metric" in provenance:
        card["provenance"] = {name: value for name, value in provenance.items() if name != "metric"}
        card["metric"] = provenance["metric"]
    return card


def _tokens(text: str) -> str:
    if text[:1].isdecimal():
        return f"positions:{text.replace(' ', '')}"
    return LEGACY_PATCH_TOKENS.get(text, text)


def standard_error(effects: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Return the standard error of the mean over pairs, ``[N, ...]`` -> ``[...]``, clustered by group; NaN for one group."""
    _, sums, counts = by_group(effects, groups)
    n = len(counts)
    if n < 2:
        return np.full(effects.shape[1:], np.nan)
    mean = effects.mean(axis=0, dtype=np.float64)
    residual = sums - counts.reshape(-1, *(1,) * mean.ndim) * mean
    return np.sqrt((residual**2).sum(axis=0) * n / (n - 1)) / len(effects)
