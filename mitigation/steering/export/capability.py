"""The vectors that an export format can represent, and the error message for those that it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.interventions.options import NORMS, Norm
from groundscope.core.errors import ConfigError
from lvlm.sites import Head, Site
from lvlm.token_selection import STEERABLE
from mitigation.steering.changes import KINDS, Kind
from mitigation.steering.places import Key
from mitigation.steering.vector import SteeringVector

PLACES = ("residual", "heads", "attention output", "MLP output", "vision MLP output", "another site")


@dataclass(frozen=True)
class Capability:
    """The vectors that a format can represent, as its consumer applies them.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation import AddChange, Capability, SteeringVector
    >>> everywhere = Capability("my server", "output of a layer, at every token", ("residual",))
    >>> vector = SteeringVector({2: AddChange(np.eye(8)[0])}, "last+generated", 1.0, "m", "c")
    >>> everywhere.obstacles(vector)
    ["it acts at positions 'last+generated', but the format only at 'all'"]
    >>> everywhere.obstacles(vector.at("all"))
    []
    """

    consumer: str
    """Software that reads the file."""
    effect: str
    """Place where the consumer adds the vector."""
    places: tuple[str, ...]
    """Places, of `PLACES`."""
    kinds: tuple[Kind, ...] = ("add",)
    norms: tuple[Norm, ...] = ("free",)
    positions: tuple[str, ...] = ("all",)
    schedules: bool = False
    """Whether a file can contain a decay or a gate."""
    by_token: bool = False
    """Whether each token may have a separate direction."""
    first_layer: int = 0
    """First layer whose output a file can change."""
    one_place: bool = False
    """Whether a file can contain only one kind of place."""

    def obstacles(self, vector: SteeringVector) -> list[str]:
        """Return the reasons why the format cannot represent a vector; empty if it can."""
        reasons = []
        kinds_of_place = list(dict.fromkeys(place_of(key) for key in vector.changes))
        unsupported = [place for place in kinds_of_place if place not in self.places]
        if unsupported:
            reasons.append(f"it acts on {', '.join(unsupported)}, but the format only on {', '.join(self.places)}")
        elif self.one_place and len(kinds_of_place) > 1:
            reasons.append(f"it acts on {' and '.join(kinds_of_place)}, but a file only on one of them")
        if vector.kind not in self.kinds:
            reasons.append(f"it is of kind '{vector.kind}', but the format supports only {', '.join(self.kinds)}")
        if vector.norm not in self.norms:
            reasons.append(f"its norm is '{vector.norm}', but the format supports only {', '.join(self.norms)}")
        if vector.positions not in self.positions:
            reasons.append(
                f"it acts at positions '{vector.positions}', but the format only at '{', '.join(self.positions)}'"
            )
        if not self.schedules and (vector.decay < 1 or vector.gate is not None):
            reasons.append("it has a decay or a gate, which the format does not support")
        if not self.by_token and any(change.by_token for change in vector.changes.values()):
            reasons.append("it has a direction for each token, which the format does not support")
        early = [key for key in vector.changes if not isinstance(key, Site | Head) and key < self.first_layer]
        if early:
            reasons.append(
                f"layer {early[0]} comes before layer {self.first_layer}, the first layer that the format supports"
            )
        return reasons


EVERYTHING = Capability(
    "groundscope", "at the places in the file", PLACES, KINDS, NORMS, STEERABLE, schedules=True, by_token=True
)


@dataclass(frozen=True)
class Export:
    """An export format, an entry of `mitigation.exports`.

    Examples
    --------
    >>> from mitigation import exports
    >>> exports["gguf"].capability.consumer
    'llama.cpp'
    """

    write: Callable[..., Path]
    """``write(vector, path, model)`` writes a file and returns its path; may have the options ``strength`` and ``convert``."""
    capability: Capability
    """The vectors that the format can represent."""
    suffix: str = ".pt"
    """Suffix of its files."""


def require(vector: SteeringVector, name: str, capability: Capability, *, convertible: bool = False) -> None:
    """Raise `ConfigError` if a format cannot represent a vector; the message names the reasons and alternatives.

    Parameters
    ----------
    vector
        The vector to write.
    name
        Name of the format.
    capability
        Capability of the format.
    convertible
        Whether the message suggests ``convert=True``.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation import AddChange, Capability, SteeringVector, export
    >>> vector = SteeringVector({2: AddChange(np.eye(8)[0])}, "all", 1.0, "m", "c")
    >>> export.require(vector, "mine", Capability("my server", "output of a layer", ("residual",)))
    """
    require_vector(vector, name, capability)
    obstacles = capability.obstacles(vector)
    if not obstacles:
        return
    suggestions = ["export it as 'safetensors' or another of mitigation.export.formats_for(vector)"]
    if vector.positions not in capability.positions:
        suggestions.append(f"or test vector.at('{capability.positions[0]}') and export that one")
    if convertible and any(isinstance(key, Head | Site) for key in vector.changes):
        suggestions.append("or pass convert=True to convert it to the format's place")
    msg = (
        f"{vector} cannot be written as '{name}' for {capability.consumer}: {'; '.join(obstacles)}. "
        f"{', '.join(suggestions)}"
    )
    raise ConfigError(msg)


def require_vector(vector: object, name: str, capability: Capability) -> None:
    """Raise `ConfigError` for anything but a steering vector, such as a method that changes weights."""
    if not isinstance(vector, SteeringVector):
        msg = (
            f"{type(vector).__name__} cannot be written as '{name}' for {capability.consumer}: it is no steering vector; a "
            "method that changes weights is written by mitigation.training_free.weight_export"
        )
        raise ConfigError(msg)


def place_of(key: Key) -> str:
    """Return the kind of a place, one of `PLACES`."""
    if isinstance(key, Head):
        return "heads"
    if not isinstance(key, Site):
        return "residual"
    if key.component == "mlp_out":
        return "MLP output" if key.stack == "decoder" else "vision MLP output"
    plain = key.component == "attn_out" and key.stack == "decoder" and not key.cross
    return "attention output" if plain else "another site"


def metadata_of(vector: SteeringVector, name: str, strength: float, **more: Any) -> Mapping[str, Any]:
    """Return the metadata stored with every export: the format, the model and the provenance."""
    return {
        "format": name,
        "strength": strength,
        "positions": vector.positions,
        "norm": vector.norm,
        "places": [place_of(key) for key in vector.changes],
        "model": vector.model,
        "config_hash": vector.config_hash,
        "provenance": dict(vector.provenance),
        **more,
    }
