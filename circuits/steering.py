"""Steering vectors: what is changed inside a model, where and how strongly, to make it say what it sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from concepts.errors import ConfigError, ModelError, PatchError
from lvlm.sites import Head, Site

if TYPE_CHECKING:
    from circuits.interventions import Intervention
    from lvlm.model import Lvlm

Kind = Literal["add", "amplify"]
Positions = Literal["last", "all", "image", "suffix"]
KINDS: tuple[Kind, ...] = ("add", "amplify")
POSITIONS: tuple[Positions, ...] = ("last", "all", "image", "suffix")


@dataclass(frozen=True, eq=False)
class Entry:
    """What is done at one head or layer; arrays are float32 and read-only."""

    vector: np.ndarray
    """``[d]``. ``add``: the direction, of length 1. ``amplify``: the mean that deviations are counted from."""
    sigma: float = 1.0
    """``add``: standard deviation of the projections on the direction, in activation units: one unit of strength."""
    reads: np.ndarray | None = None
    """``amplify``: orthonormal rows ``[k, d]`` of the subspace whose deviation counts; None for all of it."""
    writes: np.ndarray | None = None
    """``amplify``: orthogonal rows, ``[k, d]`` or ``[d, d]``, of where it goes and how far; None for where it was."""

    def __post_init__(self) -> None:
        for name in ("vector", "reads", "writes"):
            value = getattr(self, name)
            if value is None:
                continue
            array = np.array(value, np.float32, order="C")  # in one order, so that a file gives the same sums
            if array.ndim != (1 if name == "vector" else 2) or not np.isfinite(array).all():
                msg = f"{name} of shape {list(array.shape)}: it must be finite and {'[d]' if name == 'vector' else '[k, d]'}"
                raise PatchError(msg)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "sigma", float(self.sigma))
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            msg = f"sigma={self.sigma}: the unit of strength must be positive and finite"
            raise PatchError(msg)
        rows = [len(a) for a in (self.reads, self.writes) if a is not None]
        if self.writes is not None and len(self.writes) != len(self.vector if self.reads is None else self.reads):
            msg = f"reads and writes must have as many rows, not {rows}"
            raise PatchError(msg)


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A change at chosen heads and layers of a decoder; made by `circuits.derive`, used by `applied`.

    ``add``
        ``x <- x + strength * sigma * direction``: ITI's form (Li et al. 2023, arXiv 2306.03341). It pushes every
        input the same way, and suits an error that has one way (yes for no).
    ``amplify``
        ``x <- x + strength * (x - mean)``, in full or within a subspace: what this input has that the mean does not
        is made larger, so that questions may want opposite answers. A strength of -1 takes it away instead. Where
        the mean is that of blank images, the deviation is what the head took from this image.
    """

    entries: Mapping[Head | int, Entry]
    """By head (its ``z``) or by layer number (``resid_post``)."""
    kind: Kind
    positions: Positions
    """``last``: the last position of every forward, so the last prompt token and every generated one; ``all``;
    ``image``: the image's tokens; ``suffix``: everything after the image, generated tokens included."""
    strength: float
    """Used where `applied` is given none."""
    model: str
    """Name of the model it was made for."""
    config_hash: str
    """SHA-256 of that model's configuration."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON: method, digests of what it was derived from."""

    def __post_init__(self) -> None:
        if not self.entries:
            msg = "a steering vector needs at least one head or layer; none was given"
            raise PatchError(msg)
        if self.kind not in KINDS or self.positions not in POSITIONS:
            msg = f"kind='{self.kind}', positions='{self.positions}': choose a kind of {KINDS} and positions of {POSITIONS}"
            raise ConfigError(msg)
        object.__setattr__(self, "strength", _finite(self.strength))
        ordered = sorted(self.entries.items(), key=lambda item: _order(item[0]))
        object.__setattr__(self, "entries", MappingProxyType(dict(ordered)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))
        for key, entry in ordered:
            norm = float(np.linalg.norm(entry.vector.astype(np.float64)))
            if self.kind == "add" and not abs(norm - 1) <= 1e-4:
                msg = f"direction at {name_of(key)} has length {norm:g}, not 1: its length belongs in sigma"
                raise PatchError(msg)

    def __repr__(self) -> str:
        where = ", ".join(name_of(k) for k in self.entries)
        return (
            f"SteeringVector({self.kind} at {where}; {self.positions}, strength {self.strength:g}, for {self.model!r})"
        )

    @property
    def heads(self) -> tuple[Head, ...]:
        """Heads it acts on."""
        return tuple(k for k in self.entries if isinstance(k, Head))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose residual stream it acts on."""
        return tuple(k for k in self.entries if not isinstance(k, Head))

    # ---- use

    @contextmanager
    def applied(self, model: Lvlm, strength: float | None = None, *, force: bool = False) -> Iterator[None]:
        """Steer a model while the context is open: in forwards, cached generation and beam search alike.

        Afterwards, after an error too, the model is bit for bit what it was. Contexts nest: vectors add up.

        Parameters
        ----------
        model
            The model it was made for.
        strength
            In units of sigma (``add``) or of the deviation (``amplify``); by default the vector's own. 0 does nothing.
        force
            Steer a model with another configuration.

        Raises
        ------
        ModelError
            For another model, unless forced.
        ConfigError
            For a strength that is not a finite number.
        SiteError, PatchError
            Where a forced model lacks the heads or layers, or they have another width.
        """
        from circuits.interventions import intervened

        if not force:
            self.check(model)
        with intervened(model, self.interventions(strength)):
            yield

    def interventions(self, strength: float | None = None) -> list[Intervention]:
        """Return what `applied` does, as interventions; none where the strength is 0."""
        from torch import Tensor, tensor

        from circuits.interventions import Add, Amplify, Intervention

        s = self.strength if strength is None else _finite(strength)

        def as_tensor(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else tensor(array)

        made = []
        for key, entry in self.entries.items() if s else ():
            vector = tensor(entry.vector)
            if self.kind == "add":
                change = Add(s * entry.sigma * vector)
            else:
                change = Amplify(vector, s, as_tensor(entry.reads), as_tensor(entry.writes))
            head = key.head if isinstance(key, Head) else None
            made.append(Intervention(site_of(key), change, self.positions, head))
        return made

    def check(self, model: Lvlm) -> None:
        """Raise `ModelError` where a model's configuration is not that of the one this was made for."""
        if model.config_hash != self.config_hash:
            msg = (
                f"this vector was made for '{self.model}' (configuration {self.config_hash[:12]}), not for "
                f"'{model.name}' ({model.config_hash[:12]}): derive one for it, or say force=True"
            )
            raise ModelError(msg)

    # ---- variants

    def scaled(self, strength: float) -> Self:
        """Return the same vector with another strength of its own."""
        return replace(self, strength=strength)

    def at(self, positions: Positions) -> Self:
        """Return the same vector at other positions."""
        return replace(self, positions=positions)

    def randomised(self, seed: int) -> Self:
        """Return a control of the same size: every entry pushes as far as before, but in a random direction.

        ``add``: a random direction of the same length and sigma. ``amplify``: each input's deviation is turned by a
        random rotation, so that it has the same length for the same input.
        """
        rng = np.random.default_rng(seed)
        entries: dict[Head | int, Entry] = {}
        for key, entry in self.entries.items():
            d = len(entry.vector)
            if self.kind == "add":
                direction = rng.standard_normal(d)
                entries[key] = replace(entry, vector=direction / np.linalg.norm(direction))
            else:
                k = d if entry.reads is None else len(entry.reads)
                turned = np.linalg.qr(rng.standard_normal((d, k)))[0].T
                if entry.writes is not None:
                    turned = turned * np.linalg.norm(entry.writes, axis=1, keepdims=True)
                entries[key] = replace(entry, writes=turned)
        return self._control(entries, f"random directions, seed {seed}")

    def on_heads(self, heads: Sequence[Head]) -> Self:
        """Return a control: the same directions and sigmas, entry by entry, at other heads.

        Raises
        ------
        PatchError
            For another number of heads, a head twice, a vector that acts on layers, or one that amplifies: a mean
            belongs to its head, so derive it anew for the other heads.
        """
        if self.kind != "add" or self.layers:
            msg = "only directions at heads can be moved to other heads; derive an amplification anew for them"
            raise PatchError(msg)
        if len(set(heads)) != len(self.entries) or len(heads) != len(self.entries):
            msg = f"{len(self.entries)} different heads are needed, not {', '.join(map(str, heads)) or 'none'}"
            raise PatchError(msg)
        moved: dict[Head | int, Entry] = dict(zip(heads, self.entries.values(), strict=True))
        return self._control(moved, f"moved from {', '.join(map(str, self.heads))}")

    def _control(self, entries: Mapping[Head | int, Entry], how: str) -> Self:
        return replace(self, entries=entries, provenance={**self.provenance, "control": how})

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Write the native format, `circuits.export.safetensors`."""
        from circuits.export.native import safetensors

        return safetensors(self, path)

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read what `save` wrote; raises `StoreError` where it is missing, damaged, something else or newer."""
        from circuits.export.native import load

        return load(path)


def site_of(key: Head | int) -> Site:
    """Return the site of an entry: ``z`` of a head's layer, or ``resid_post`` of a layer."""
    return Site("decoder", key.layer, "z") if isinstance(key, Head) else Site("decoder", key, "resid_post")


def name_of(key: Head | int) -> str:
    """Return ``L3.H5`` or ``L3``."""
    return str(key) if isinstance(key, Head) else f"L{key}"


def _order(key: Head | int) -> tuple[int, int]:
    """Sort by layer, its heads before its residual stream: the order in which they are reached."""
    return (key.layer, key.head) if isinstance(key, Head) else (key, 1 << 30)


def _finite(strength: float) -> float:
    if not math.isfinite(strength):
        msg = f"strength={strength}: it must be a finite number"
        raise ConfigError(msg)
    return float(strength)
