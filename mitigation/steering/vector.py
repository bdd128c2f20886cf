"""Steering vectors: changes of a model's activations, with their places, token positions and strength."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from circuits.interventions.options import NORMS, Norm
from groundscope.core import artifacts
from groundscope.core.errors import ConfigError, ModelError, PatchError, StoreError
from groundscope.core.files import canonical_json
from groundscope.core.result_fields import building, check_fields
from groundscope.core.text import nearest
from lvlm.sites import Head, Site, parse_heads
from lvlm.token_selection import LEGACY_STEERING_POSITIONS, STEERABLE, TokenSelection
from mitigation.protocol import ForwardCost
from mitigation.steering import vector_file
from mitigation.steering.changes import AddChange, Kind, ProbeGate, VectorChange, real_number
from mitigation.steering.places import Key, canonical, name_of, order, site_of

if TYPE_CHECKING:
    from circuits.interventions.intervention import Intervention
    from lvlm.model import Lvlm

__all__ = ["NORMS", "Norm", "SteeringVector", "combine"]


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """Changes of activations at selected places; derived by `mitigation.derive`, activated by `applied`.

    All changes of a vector are of one kind: `AddChange`, `AmplifyChange` or `ProjectChange`. A vector is a
    `mitigation.Mitigation`.

    Examples
    --------
    >>> import numpy as np
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> direction = np.eye(1, model.width)[0]
    >>> vector = gs.SteeringVector({2: gs.AddChange(direction, sigma=3.0)}, "last+generated", 1.0, model.name, model.config_hash)
    >>> vector.kind, vector.layers
    ('add', (2,))
    >>> question = gs.scenes.dataset(10)[0]
    >>> batch = next(model.batches([question]))
    >>> before = model.logits(batch.inputs)
    >>> with vector.applied(model):
    ...     steered = model.logits(batch.inputs)
    >>> bool((steered == before).all()), bool((model.logits(batch.inputs) == before).all())
    (False, True)
    """

    changes: Mapping[Key, VectorChange]
    """By head (its ``z``), by layer number (``resid_post``), or by any other `Site`."""
    positions: str
    """Token selection (`lvlm.token_selection`): ``last``, ``last+generated``, ``all``, ``image:all``, ``suffix:all``,
    ``suffix+generated`` or ``generated:all``. The tokens are the same with and without a cache, and after a chunked prefill."""
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
        if not isinstance(self.changes, Mapping) or not self.changes:
            msg = "a steering vector needs changes: a mapping with at least one head, layer or site"
            raise PatchError(msg)
        expected = {"model": str, "config_hash": str, "provenance": Mapping, "gate": ProbeGate | None}
        wrong = [name for name, kind in expected.items() if not isinstance(getattr(self, name), kind)]
        wrong += [f"changes[{key!r}]" for key, item in self.changes.items() if not isinstance(item, VectorChange)]
        if wrong:
            msg = (
                f"{wrong[0]} has a wrong type: model and config_hash must be text, provenance a mapping, gate a ProbeGate or "
                "None, each change an AddChange, AmplifyChange or ProjectChange"
            )
            raise PatchError(msg)
        kinds = list(dict.fromkeys(item.kind for item in self.changes.values()))
        if len(kinds) > 1:
            msg = f"changes of kinds {', '.join(kinds)}: a vector has changes of one kind; nest the contexts of several vectors"
            raise PatchError(msg)
        object.__setattr__(self, "decay", real_number("decay", self.decay))
        object.__setattr__(self, "positions", str(TokenSelection.parse(self.positions, allowed=STEERABLE)))
        if not isinstance(self.norm, str) or self.norm not in NORMS:
            msg = f"unknown norm '{self.norm}'; choose from {', '.join(NORMS)}{nearest(str(self.norm), NORMS)}"
            raise ConfigError(msg)
        if not 0 < self.decay <= 1 or (self.norm != "free" and kinds[0] != "add"):
            msg = (
                f"decay={self.decay}, norm='{self.norm}', kind='{kinds[0]}': decay must be in (0, 1], and norm 'free' unless "
                "the kind is 'add'"
            )
            raise ConfigError(msg)
        object.__setattr__(self, "strength", _finite(self.strength))
        by_key = {canonical(key): item for key, item in self.changes.items()}
        ordered = sorted(by_key.items(), key=lambda item: order(item[0]))
        object.__setattr__(self, "changes", MappingProxyType(dict(ordered)))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))
        by_token = [name_of(key) for key, item in ordered if item.by_token]
        if by_token and self.positions != "all":
            msg = f"a direction for each token ({', '.join(by_token)}) requires positions 'all'"
            raise PatchError(msg)

    def __repr__(self) -> str:
        places = ", ".join(map(name_of, self.changes))
        return (
            f"SteeringVector({self.kind} at {places}; {self.positions}, strength {self.strength:g}, for {self.model!r})"
        )

    @property
    def kind(self) -> Kind:
        """Kind of all changes: ``add``, ``amplify`` or ``project``."""
        return next(iter(self.changes.values())).kind

    @property
    def name(self) -> str:
        """Name for tables and for the provenance of answers: kind, places, positions and strength."""
        return self._named(self.strength)

    def _named(self, strength: float) -> str:
        return f"{self.kind} at {', '.join(map(name_of, self.changes))}; {self.positions}, strength {strength:g}"

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON values that identify the vector: its settings and the provenance of its directions."""
        settings = {"kind": self.kind, "positions": self.positions, "strength": self.strength, "norm": self.norm}
        return MappingProxyType({**settings, "decay": self.decay, "provenance": dict(self.provenance)})

    @property
    def forward_cost(self) -> ForwardCost:
        """Forward passes compared with the model alone: no additional ones."""
        return ForwardCost()

    @property
    def heads(self) -> tuple[Head, ...]:
        """Heads that the vector acts on."""
        return tuple(k for k in self.changes if isinstance(k, Head))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose residual stream the vector acts on."""
        return tuple(k for k in self.changes if isinstance(k, int))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Other sites that the vector acts on."""
        return tuple(k for k in self.changes if isinstance(k, Site))

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
            For positions ``image:all`` if the image is not in the decoder's sequence; during a forward pass, if positions are
            unknown: several tokens added to a cache outside of `generate`, or continuous batching.
        """
        from circuits.interventions.intervention import intervened

        if not force:
            self.check(model)
        name = self._named(self.strength if strength is None else strength)
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
        for key, item in self.changes.items() if s else ():
            head = key.head if isinstance(key, Head) else None
            change = item.transform(s, self.norm)
            interventions.append(Intervention(site_of(key), change, self.positions, head, gate=gate, decay=self.decay))
        return interventions

    def displacements(self, strength: float | None = None) -> dict[Key, np.ndarray]:
        """Return the addition at each place, float64 ``[d]`` or ``[n, d]``; raises `PatchError` for another kind than ``add``."""
        s = self.strength if strength is None else _finite(strength)
        additions = {key: item.displacement(s) for key, item in self.changes.items() if isinstance(item, AddChange)}
        if not additions:
            msg = f"{self}: only changes of kind 'add' displace every input equally"
            raise PatchError(msg)
        return additions

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

    def at(self, positions: str) -> Self:
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

    def randomized(self, seed: int) -> Self:
        """Return a control with random directions and the same size of change at every place.

        `AddChange` and `ProjectChange` get a random direction of the same length; `AmplifyChange` rotates each input's
        deviation at random, which preserves its length.
        """
        rng = np.random.default_rng(seed)
        changes: dict[Key, VectorChange] = {key: item.randomized(rng) for key, item in self.changes.items()}
        return self._control(changes, f"random directions, seed {seed}")

    def on_heads(self, heads: Sequence[Head | str]) -> Self:
        """Return a control: the same directions and sigmas, in order, at other heads.

        Raises
        ------
        PatchError
            For another number of heads, a repeated head, a vector that acts on layers, or kind ``amplify``: a mean belongs
            to its head, so derive an amplification for the other heads.
        """
        heads = parse_heads(heads)
        if self.kind != "add" or len(self.heads) < len(self.changes):
            msg = "only directions at heads can be moved to other heads; derive a new amplification for the other heads"
            raise PatchError(msg)
        if len(set(heads)) != len(self.changes) or len(heads) != len(self.changes):
            msg = f"this vector needs {len(self.changes)} different heads, not {', '.join(map(str, heads)) or 'an empty list'}"
            raise PatchError(msg)
        changes: dict[Key, VectorChange] = dict(zip(heads, self.changes.values(), strict=True))
        return self._control(changes, f"moved from {', '.join(map(str, self.heads))}")

    def _control(self, changes: Mapping[Key, VectorChange], description: str) -> Self:
        return replace(self, changes=changes, provenance={**self.provenance, "control": description})

    # ---- files

    def save(self, path: str | Path, model: Lvlm | None = None) -> Path:
        """Write a safetensors file with metadata in its header, and the same metadata as a ``.json`` file.

        The format is described in `mitigation.steering.vector_file`. With the model, the file also names the modules of every
        place, so that ``mitigation/steering/export/apply_vector.py`` can apply it without groundscope.

        Raises
        ------
        StoreError
            If a file cannot be written.
        ModelError
            For a model that the vector was not derived for.
        """
        path = Path(path)
        tensors, entries, gate = vector_file.encode(self.changes, self.gate)
        card = {
            "kind": self.kind,
            "rule": vector_file.RULES[self.kind],
            "positions": self.positions,
            "strength": self.strength,
            "model": self.model,
            "config_hash": self.config_hash,
            "entries": entries,
            "provenance": dict(self.provenance),
            "norm": self.norm,
            "decay": self.decay,
        }
        if gate:
            card["gate"] = gate
        if model is not None:
            from mitigation.steering.module_places import module_places

            self.check(model)
            card |= module_places(self, model)
        version = vector_file.VERSION
        artifacts.write(path, vector_file.KIND, version, tensors, card)
        text = f"{canonical_json({'version': version, **card})}\n"
        artifacts.write_bytes(path.with_suffix(".json"), text.encode(), vector_file.KIND)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of `save`; only the metadata in the header count.

        Raises `StoreError` if the file is missing, damaged, of another kind or of a newer version.
        """
        tensors, card, version = artifacts.read_versioned(Path(path), vector_file.KIND, vector_file.VERSION)
        with building(f"{path}: damaged steering vector", StoreError):
            changes = vector_file.decode_changes(card["kind"], card["entries"], tensors)
            gate = vector_file.decode_gate(card["gate"], tensors) if "gate" in card else None
            required = ("positions", "strength", "model", "config_hash", "provenance")
            values = {name: card[name] for name in required}
            values |= {name: card[name] for name in ("norm", "decay") if name in card}
            check_fields(values, cls)
            if version <= vector_file.OLD_POSITIONS_UNTIL:
                values["positions"] = LEGACY_STEERING_POSITIONS.get(values["positions"], values["positions"])
            return cls(changes=changes, gate=gate, **values)


def combine(vectors: Sequence[SteeringVector]) -> SteeringVector:
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

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation import AddChange, SteeringVector, combine
    >>> first = SteeringVector({2: AddChange(np.array([1.0, 0.0]))}, "all", 3.0, "m", "c")
    >>> second = SteeringVector({2: AddChange(np.array([0.0, 1.0]))}, "all", 4.0, "m", "c")
    >>> combine([first, second]).changes[2].sigma
    5.0
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
    sums: dict[Key, np.ndarray] = {}
    for vector in vectors:
        for key, addition in vector.displacements().items():
            sums[key] = sums[key] + addition if key in sums else addition
    changes: dict[Key, VectorChange] = {}
    for key, addition in sums.items():
        length = float(np.linalg.norm(addition))
        if addition.ndim > 1 or not length > 0:
            msg = (
                f"at {name_of(key)} the vectors cancel, or have a direction for each token; nest their contexts instead"
            )
            raise PatchError(msg)
        changes[key] = AddChange(addition / length, length)
    parts = [{"strength": v.strength, **v.provenance} for v in vectors]
    return replace(first, changes=changes, strength=1.0, provenance={"method": "combined", "parts": parts})


def _finite(strength: float) -> float:
    number = real_number("strength", strength)
    if not math.isfinite(number):
        msg = f"strength={strength}: it must be a finite number"
        raise ConfigError(msg)
    return number
