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

from circuits.interventions.options import NORMS, Norm
from groundscope.core.errors import ConfigError, ModelError, PatchError
from lvlm.sites import Head, Site, parse_heads
from mitigation.steering.placement import Entry, Key, ProbeGate, canonical, name_of, order, site_of

if TYPE_CHECKING:
    from circuits.interventions.intervention import Change, Intervention
    from lvlm.model import Lvlm

__all__ = [
    "KINDS",
    "NORMS",
    "POSITIONS",
    "Entry",
    "Key",
    "Kind",
    "Norm",
    "Positions",
    "ProbeGate",
    "SteeringVector",
    "combined",
    "name_of",
    "site_of",
]

Kind = Literal["add", "amplify", "project"]
Positions = Literal["last", "all", "image", "suffix", "question", "generated"]
KINDS: tuple[Kind, ...] = ("add", "amplify", "project")
POSITIONS: tuple[Positions, ...] = ("last", "all", "image", "suffix", "question", "generated")


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A change at chosen places of a model; made by `mitigation.steering.derive`, used by `applied`.

    ``add``
        ``x <- x + strength * sigma * direction``: ITI's form (Li et al. 2023, arXiv 2306.03341). It pushes every
        input the same way, and suits an error that has one way (yes for no). The norm rule may keep x as long as it was.
    ``amplify``
        ``x <- x + strength * (x - mean)``, in full or within a subspace: what this input has that the mean does not
        is made larger, so that questions may want opposite answers. A strength of -1 takes it away instead. Where
        the mean is that of blank images, the deviation is what the head took from this image.
    ``project``
        ``x <- x - strength * max(<x, t>, 0) / <t, t> * t``: what points along t is taken out (ProjectAway, Jiang et al.
        2024, arXiv 2410.02762).
    """

    entries: Mapping[Key, Entry]
    """By head (its ``z``), by layer number (``resid_post``), or by any other `Site`."""
    kind: Kind
    positions: Positions
    """``last``: the last token of the prompt and every generated one; ``all``; ``image``: the image's tokens; ``suffix``:
    everything after the image, generated tokens included; ``question``: what follows the image in the prompt;
    ``generated``: every generated token. With a cache, without one and after a prefill in chunks they are the same tokens."""
    strength: float
    """Used where `applied` is given none."""
    model: str
    """Name of the model it was made for."""
    config_hash: str
    """SHA-256 of that model's configuration."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON: method, digests of what it was derived from."""
    norm: Norm = "free"
    """``add`` only. ``free``: x gets longer or shorter; ``kept``: ``|x| unit(x + d)``; ``relative``:
    ``|x| unit(x / |x| + d)``, with sigma as a share of the length of x; ``away``: ``relative`` with d times
    ``1 + max(0, cos(x, -d))``."""
    decay: float = 1.0
    """Schedule: factor, in (0, 1], by which the strength shrinks with each generated token; 1 is constant."""
    gate: ProbeGate | None = None
    """Schedule: the probe that lets it act only where it sees the problem; None for everywhere."""

    def __post_init__(self) -> None:
        if not self.entries:
            msg = "a steering vector needs at least one head or layer; none was given"
            raise PatchError(msg)
        if self.kind not in KINDS or self.positions not in POSITIONS or self.norm not in NORMS:
            msg = (
                f"kind='{self.kind}', positions='{self.positions}', norm='{self.norm}': choose a kind of {KINDS}, positions "
                f"of {POSITIONS}, a norm of {NORMS}"
            )
            raise ConfigError(msg)
        if not 0 < self.decay <= 1 or (self.norm != "free" and self.kind != "add"):
            msg = (
                f"decay={self.decay}, norm='{self.norm}' of kind '{self.kind}': decay is in (0, 1], norms are for 'add'"
            )
            raise ConfigError(msg)
        object.__setattr__(self, "strength", _finite(self.strength))
        named = {canonical(key): entry for key, entry in self.entries.items()}
        ordered = sorted(named.items(), key=lambda item: order(item[0]))
        object.__setattr__(self, "entries", MappingProxyType(dict(ordered)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))
        for key, entry in ordered if self.kind != "amplify" else ():
            lengths = np.atleast_1d(np.linalg.norm(entry.vector.astype(np.float64), axis=-1))
            # A token without a direction of its own has a row of zeros, and is left alone.
            wrong = lengths[(np.abs(lengths - 1) > 1e-4) & ((lengths > 0) | (not entry.by_token))]
            if len(wrong):
                msg = f"direction at {name_of(key)} has length {wrong[0]:g}, not 1: its length belongs in sigma"
                raise PatchError(msg)
        by_token = [name_of(key) for key, entry in ordered if entry.by_token]
        if by_token and (self.kind != "add" or self.positions != "all"):
            msg = f"a direction for each token ({', '.join(by_token)}) is of kind 'add' and acts at positions 'all'"
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
        return tuple(k for k in self.entries if isinstance(k, int))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Other sites it acts on."""
        return tuple(k for k in self.entries if isinstance(k, Site))

    # ---- use

    @contextmanager
    def applied(self, model: Lvlm, strength: float | None = None, *, force: bool = False) -> Iterator[None]:
        """Steer a model while the context is open: in forwards, in generation of any form, and in beam search.

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
        ModelError
            For positions ``image`` where the image is not in the decoder's sequence; during a forward, for a form in which
            positions cannot be known: several tokens onto a cache outside of `generate`, continuous batching.
        """
        from circuits.interventions.intervention import intervened

        if not force:
            self.check(model)
        at = self.strength if strength is None else strength
        name = f"{self.kind} at {', '.join(name_of(key) for key in self.entries)}; {self.positions}, strength {at:g}"
        with intervened(model, self.interventions(strength), kind="steering vector", name=name):
            yield

    def interventions(self, strength: float | None = None) -> list[Intervention]:
        """Return what `applied` does, as interventions; none where the strength is 0."""
        from torch import tensor

        from circuits.interventions.intervention import Gate, Intervention

        s = self.strength if strength is None else _finite(strength)
        gate = None
        if self.gate is not None:
            place = self.gate.place
            head = place.head if isinstance(place, Head) else None
            gate = Gate(site_of(place), tensor(self.gate.weights), self.gate.bias, head)
        made = []
        for key, entry in self.entries.items() if s else ():
            head = key.head if isinstance(key, Head) else None
            change = self._change(entry, s)
            made.append(Intervention(site_of(key), change, self.positions, head, gate=gate, decay=self.decay))
        return made

    def _change(self, entry: Entry, strength: float) -> Change:
        """Return what becomes of the tensor at a place."""
        from torch import Tensor, tensor

        from circuits.interventions.intervention import Add, Amplify, Project

        def as_tensor(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else tensor(array)

        vector = tensor(entry.vector)
        if self.kind == "add":
            return Add(strength * entry.sigma * vector, self.norm)
        if self.kind == "project":
            return Project(vector, strength)
        return Amplify(vector, strength, as_tensor(entry.reads), as_tensor(entry.writes))

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

    def decaying(self, factor: float) -> Self:
        """Return the same vector, `factor` times as strong with every generated token; raises `ConfigError` outside (0, 1]."""
        return replace(self, decay=factor)

    def gated(self, gate: ProbeGate | None) -> Self:
        """Return the same vector that acts only where a probe sees the problem; None takes the gate away."""
        return replace(self, gate=gate)

    def randomised(self, seed: int) -> Self:
        """Return a control of the same size: every entry pushes as far as before, but in a random direction.

        ``add``, ``project``: a random direction of the same length and sigma. ``amplify``: each input's deviation is turned by a
        random rotation, so that it has the same length for the same input.
        """
        rng = np.random.default_rng(seed)
        entries: dict[Key, Entry] = {}
        for key, entry in self.entries.items():
            d = entry.vector.shape[-1]
            if self.kind != "amplify":
                direction = rng.standard_normal(entry.vector.shape)
                length = np.linalg.norm(entry.vector, axis=-1, keepdims=True)  # 0 for a token that is left alone
                entries[key] = replace(
                    entry, vector=length * direction / np.linalg.norm(direction, axis=-1, keepdims=True)
                )
            else:
                k = d if entry.reads is None else len(entry.reads)
                turned = np.linalg.qr(rng.standard_normal((d, k)))[0].T
                if entry.writes is not None:
                    turned = turned * np.linalg.norm(entry.writes, axis=1, keepdims=True)
                entries[key] = replace(entry, writes=turned)
        return self._control(entries, f"random directions, seed {seed}")

    def on_heads(self, heads: Sequence[Head | str]) -> Self:
        """Return a control: the same directions and sigmas, entry by entry, at other heads.

        Raises
        ------
        PatchError
            For another number of heads, a head twice, a vector that acts on layers, or one that amplifies: a mean
            belongs to its head, so derive it anew for the other heads.
        """
        heads = parse_heads(heads)
        if self.kind != "add" or len(self.heads) < len(self.entries):
            msg = "only directions at heads can be moved to other heads; derive an amplification anew for them"
            raise PatchError(msg)
        if len(set(heads)) != len(self.entries) or len(heads) != len(self.entries):
            msg = f"{len(self.entries)} different heads are needed, not {', '.join(map(str, heads)) or 'none'}"
            raise PatchError(msg)
        moved: dict[Key, Entry] = dict(zip(heads, self.entries.values(), strict=True))
        return self._control(moved, f"moved from {', '.join(map(str, self.heads))}")

    def _control(self, entries: Mapping[Key, Entry], how: str) -> Self:
        return replace(self, entries=entries, provenance={**self.provenance, "control": how})

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Write the native format, `mitigation.steering.export.safetensors`."""
        from mitigation.steering.native_format import safetensors

        return safetensors(self, path)

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read what `save` wrote; raises `StoreError` where it is missing, damaged, something else or newer."""
        from mitigation.steering.native_format import load

        return load(path)


def combined(vectors: Sequence[SteeringVector]) -> SteeringVector:
    """Return one additive vector that does what several do together, of strength 1.

    Parameters
    ----------
    vectors
        For one model and at the same positions, of kind ``add``, with a free norm and without schedule: nested contexts
        (`SteeringVector.applied`) stack any others.

    Raises
    ------
    PatchError
        For none, or vectors that do not add up to one, or that cancel out at some place.
    """
    first = vectors[0] if vectors else None
    alike = {(v.kind, v.positions, v.config_hash, v.norm, v.decay, v.gate is None) for v in vectors}
    if (
        first is None
        or len(alike) > 1
        or (first.kind, first.norm, first.decay, first.gate) != ("add", "free", 1.0, None)
    ):
        msg = (
            f"{len(vectors)} vectors cannot be made one: they must be additive, without norm rule and schedule, at the same "
            f"positions and for the same model; nest their contexts instead"
        )
        raise PatchError(msg)
    moves: dict[Key, np.ndarray] = {}
    for vector in vectors:
        for key, entry in vector.entries.items():
            move = vector.strength * entry.sigma * entry.vector.astype(np.float64)
            moves[key] = moves[key] + move if key in moves else move
    entries: dict[Key, Entry] = {}
    for key, move in moves.items():
        length = float(np.linalg.norm(move))
        if move.ndim > 1 or not length > 0:
            msg = f"at {name_of(key)} the vectors cancel out, or differ from token to token: there is no one direction"
            raise PatchError(msg)
        entries[key] = Entry(move / length, length)
    parts = [{"strength": v.strength, **v.provenance} for v in vectors]
    return replace(first, entries=entries, strength=1.0, provenance={"method": "combined", "parts": parts})


def _finite(strength: float) -> float:
    if not math.isfinite(strength):
        msg = f"strength={strength}: it must be a finite number"
        raise ConfigError(msg)
    return float(strength)
