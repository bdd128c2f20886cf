"""Steering vectors: changes of a model's activations, with their places, token positions and strength."""

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
from mitigation.steering.placement import Entry, Key, ProbeGate, canonical, name_of, order, real_number, site_of

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
    """A change of activations at selected places; derived by `mitigation.steering.derive`, activated by `applied`.

    ``add``
        ``x <- x + strength * sigma * direction``: ITI's form (Li et al. 2023, arXiv 2306.03341). It adds the same vector
        for every input, which suits errors in one direction (yes instead of no). A norm rule can preserve the length of x.
    ``amplify``
        ``x <- x + strength * (x - mean)``, in full or within a subspace: the deviation from the mean grows, so the effect
        depends on the input and questions may have opposite answers. A strength of -1 removes the deviation. If the mean
        is that of blank images, the deviation is the head's response to this image.
    ``project``
        ``x <- x - strength * max(<x, t>, 0) / <t, t> * t``: removes the positive component along t (ProjectAway, Jiang et
        al. 2024, arXiv 2410.02762).
    """

    entries: Mapping[Key, Entry]
    """By head (its ``z``), by layer number (``resid_post``), or by any other `Site`."""
    kind: Kind
    positions: Positions
    """``last``: the last token of the prompt and every generated token; ``all``; ``image``: the image tokens; ``suffix``: all
    tokens after the image, including generated ones; ``question``: the prompt's tokens after the image; ``generated``: every
    generated token. The tokens are the same with and without a cache, and after a chunked prefill."""
    strength: float
    """Default strength of `applied`."""
    model: str
    """Name of the model that the vector was derived for."""
    config_hash: str
    """SHA-256 of that model's configuration."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON values: method, and digests of the data that the vector was derived from."""
    norm: Norm = "free"
    """For ``add`` only. ``free``: the length of x changes; ``kept``: ``|x| unit(x + d)``; ``relative``:
    ``|x| unit(x / |x| + d)``, with sigma relative to the length of x; ``away``: ``relative`` with d times
    ``1 + max(0, cos(x, -d))``."""
    decay: float = 1.0
    """Schedule: factor in (0, 1] that multiplies the strength with each generated token; 1 is constant."""
    gate: ProbeGate | None = None
    """Schedule: a probe that restricts the vector to tokens with a positive prediction; None for all tokens."""

    def __post_init__(self) -> None:
        if not isinstance(self.entries, Mapping) or not self.entries:
            msg = "a steering vector needs entries: a mapping with at least one head, layer or site"
            raise PatchError(msg)
        expected = {"model": str, "config_hash": str, "provenance": Mapping, "gate": ProbeGate | None}
        wrong = [name for name, kind in expected.items() if not isinstance(getattr(self, name), kind)]
        wrong += [f"entries[{key!r}]" for key, entry in self.entries.items() if not isinstance(entry, Entry)]
        if wrong:
            msg = (
                f"{wrong[0]} has a wrong type: model and config_hash must be text, provenance a mapping, gate a ProbeGate or "
                "None, each entry an Entry"
            )
            raise PatchError(msg)
        object.__setattr__(self, "decay", real_number("decay", self.decay))
        if self.kind not in KINDS or self.positions not in POSITIONS or self.norm not in NORMS:
            msg = (
                f"kind='{self.kind}', positions='{self.positions}', norm='{self.norm}': choose kind from {KINDS}, positions "
                f"from {POSITIONS}, norm from {NORMS}"
            )
            raise ConfigError(msg)
        if not 0 < self.decay <= 1 or (self.norm != "free" and self.kind != "add"):
            msg = (
                f"decay={self.decay}, norm='{self.norm}', kind='{self.kind}': decay must be in (0, 1], and norm 'free' unless "
                "the kind is 'add'"
            )
            raise ConfigError(msg)
        object.__setattr__(self, "strength", _finite(self.strength))
        by_key = {canonical(key): entry for key, entry in self.entries.items()}
        ordered = sorted(by_key.items(), key=lambda item: order(item[0]))
        object.__setattr__(self, "entries", MappingProxyType(dict(ordered)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))
        for key, entry in ordered if self.kind != "amplify" else ():
            lengths = np.atleast_1d(np.linalg.norm(entry.vector.astype(np.float64), axis=-1))
            # A token without a direction has a row of zeros and is not steered.
            not_unit = lengths[(np.abs(lengths - 1) > 1e-4) & ((lengths > 0) | (not entry.by_token))]
            if len(not_unit):
                msg = f"direction at {name_of(key)} has length {not_unit[0]:g}, not 1; normalize it and put its length into sigma"
                raise PatchError(msg)
        by_token = [name_of(key) for key, entry in ordered if entry.by_token]
        if by_token and (self.kind != "add" or self.positions != "all"):
            msg = f"a direction for each token ({', '.join(by_token)}) requires kind 'add' and positions 'all'"
            raise PatchError(msg)

    def __repr__(self) -> str:
        where = ", ".join(name_of(k) for k in self.entries)
        return (
            f"SteeringVector({self.kind} at {where}; {self.positions}, strength {self.strength:g}, for {self.model!r})"
        )

    @property
    def heads(self) -> tuple[Head, ...]:
        """Heads that the vector acts on."""
        return tuple(k for k in self.entries if isinstance(k, Head))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose residual stream the vector acts on."""
        return tuple(k for k in self.entries if isinstance(k, int))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Other sites that the vector acts on."""
        return tuple(k for k in self.entries if isinstance(k, Site))

    # ---- use

    @contextmanager
    def applied(self, model: Lvlm, strength: float | None = None, *, force: bool = False) -> Iterator[None]:
        """Steer a model while the context is open: in forward passes, any form of generation, and beam search.

        Afterwards, even after an error, the model is restored bit for bit. Contexts nest: their effects add up.

        Parameters
        ----------
        model
            The model that the vector was derived for.
        strength
            Strength in units of sigma (``add``) or of the deviation (``amplify``); by default the vector's. 0 has no effect.
        force
            Also steer a model with another configuration.

        Raises
        ------
        ModelError
            For another model, unless forced.
        ConfigError
            For a strength that is not a finite number.
        SiteError, PatchError
            If, with `force`, the model lacks the heads or layers, or they have another width.
        ModelError
            For positions ``image`` if the image is not in the decoder's sequence; during a forward pass, if positions are
            unknown: several tokens added to a cache outside of `generate`, or continuous batching.
        """
        from circuits.interventions.intervention import intervened

        if not force:
            self.check(model)
        at = self.strength if strength is None else strength
        name = f"{self.kind} at {', '.join(name_of(key) for key in self.entries)}; {self.positions}, strength {at:g}"
        with intervened(model, self.interventions(strength), kind="steering vector", name=name):
            yield

    def interventions(self, strength: float | None = None) -> list[Intervention]:
        """Return the interventions that `applied` activates; an empty list if the strength is 0."""
        from torch import tensor

        from circuits.interventions.intervention import Gate, Intervention

        s = self.strength if strength is None else _finite(strength)
        gate = None
        if self.gate is not None:
            place = self.gate.place
            head = place.head if isinstance(place, Head) else None
            gate = Gate(site_of(place), tensor(self.gate.weights), self.gate.bias, head)
        interventions = []
        for key, entry in self.entries.items() if s else ():
            head = key.head if isinstance(key, Head) else None
            change = self._change(entry, s)
            interventions.append(Intervention(site_of(key), change, self.positions, head, gate=gate, decay=self.decay))
        return interventions

    def _change(self, entry: Entry, strength: float) -> Change:
        """Return the change of the tensor at a place."""
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
        """Raise `ModelError` for a model with another configuration than that of the vector's model."""
        if model.config_hash != self.config_hash:
            msg = (
                f"this vector was derived for '{self.model}' (configuration {self.config_hash[:12]}), not for "
                f"'{model.name}' ({model.config_hash[:12]}); derive a vector for this model, or pass force=True"
            )
            raise ModelError(msg)

    # ---- variants

    def scaled(self, strength: float) -> Self:
        """Return the same vector with another default strength."""
        return replace(self, strength=strength)

    def at(self, positions: Positions) -> Self:
        """Return the same vector at other positions."""
        return replace(self, positions=positions)

    def decaying(self, factor: float) -> Self:
        """Return the same vector with its strength multiplied by `factor` per generated token.

        Raises `ConfigError` for a factor outside (0, 1].
        """
        return replace(self, decay=factor)

    def gated(self, gate: ProbeGate | None) -> Self:
        """Return the same vector with a gate that restricts it to some tokens; None removes the gate."""
        return replace(self, gate=gate)

    def randomised(self, seed: int) -> Self:
        """Return a control with random directions and the same size of change at every entry.

        ``add``, ``project``: a random direction with the same length and sigma. ``amplify``: each input's deviation is
        rotated at random, which preserves its length.
        """
        rng = np.random.default_rng(seed)
        entries: dict[Key, Entry] = {}
        for key, entry in self.entries.items():
            d = entry.vector.shape[-1]
            if self.kind != "amplify":
                direction = rng.standard_normal(entry.vector.shape)
                length = np.linalg.norm(entry.vector, axis=-1, keepdims=True)  # 0 for a token that is not steered
                entries[key] = replace(
                    entry, vector=length * direction / np.linalg.norm(direction, axis=-1, keepdims=True)
                )
            else:
                k = d if entry.reads is None else len(entry.reads)
                rotated = np.linalg.qr(rng.standard_normal((d, k)))[0].T
                if entry.writes is not None:
                    rotated = rotated * np.linalg.norm(entry.writes, axis=1, keepdims=True)
                entries[key] = replace(entry, writes=rotated)
        return self._control(entries, f"random directions, seed {seed}")

    def on_heads(self, heads: Sequence[Head | str]) -> Self:
        """Return a control: the same directions and sigmas, entry by entry, at other heads.

        Raises
        ------
        PatchError
            For another number of heads, a repeated head, a vector that acts on layers, or kind ``amplify``: a mean belongs
            to its head, so derive an amplification for the other heads.
        """
        heads = parse_heads(heads)
        if self.kind != "add" or len(self.heads) < len(self.entries):
            msg = "only directions at heads can be moved to other heads; derive a new amplification for the other heads"
            raise PatchError(msg)
        if len(set(heads)) != len(self.entries) or len(heads) != len(self.entries):
            msg = f"this vector needs {len(self.entries)} different heads, not {', '.join(map(str, heads)) or 'an empty list'}"
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
        """Read a file of `save`; raises `StoreError` if it is missing, damaged, of another kind or of a newer version."""
        from mitigation.steering.native_format import load

        return load(path)


def combined(vectors: Sequence[SteeringVector]) -> SteeringVector:
    """Return the sum of additive vectors as one vector of strength 1.

    Parameters
    ----------
    vectors
        Vectors for one model and at the same positions, of kind ``add``, with norm ``free`` and without schedule; for other
        vectors, nest the contexts of `SteeringVector.applied`.

    Raises
    ------
    PatchError
        For no vectors, vectors that cannot be summed, or vectors that cancel at some place.
    """
    first = vectors[0] if vectors else None
    properties = {(v.kind, v.positions, v.config_hash, v.norm, v.decay, v.gate is None) for v in vectors}
    if (
        first is None
        or len(properties) > 1
        or (first.kind, first.norm, first.decay, first.gate) != ("add", "free", 1.0, None)
    ):
        msg = (
            f"{len(vectors)} vectors cannot be combined: they must be additive, without norm rule and schedule, at the same "
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
            msg = (
                f"at {name_of(key)} the vectors cancel, or have a direction for each token; nest their contexts instead"
            )
            raise PatchError(msg)
        entries[key] = Entry(move / length, length)
    parts = [{"strength": v.strength, **v.provenance} for v in vectors]
    return replace(first, entries=entries, strength=1.0, provenance={"method": "combined", "parts": parts})


def _finite(strength: float) -> float:
    number = real_number("strength", strength)
    if not math.isfinite(number):
        msg = f"strength={strength}: it must be a finite number"
        raise ConfigError(msg)
    return number
