"""The vectors that each export format can represent, and error messages for those that it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuits.interventions.options import NORMS, Norm
from groundscope.core.errors import ConfigError
from lvlm.sites import Head, Site
from mitigation.steering.placement import Entry, Key
from mitigation.steering.vector import KINDS, POSITIONS, Kind, Positions, SteeringVector

PLACES = ("residual", "heads", "attention output", "MLP output", "vision MLP output", "another site")


@dataclass(frozen=True)
class Ability:
    """The vectors that a format can represent, as its consumer applies them."""

    consumer: str
    """Software that reads the file."""
    applied: str
    """Place where the consumer adds the vector."""
    places: tuple[str, ...]
    kinds: tuple[Kind, ...] = ("add",)
    norms: tuple[Norm, ...] = ("free",)
    positions: tuple[Positions, ...] = ("all",)
    schedules: bool = False
    """Whether a file can contain a decay or a gate."""
    by_token: bool = False
    """Whether each token may have a separate direction."""
    first_layer: int = 0
    one_place: bool = False
    """Whether a file can contain only one kind of place."""

    def obstacles(self, vector: SteeringVector) -> list[str]:
        """Return the reasons why the format cannot represent a vector; empty if it can."""
        reasons = []
        kinds_of_place = list(dict.fromkeys(place_of(key) for key in vector.entries))
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
        if not self.by_token and any(entry.by_token for entry in vector.entries.values()):
            reasons.append("it has a direction for each token, which the format does not support")
        early = [key for key in vector.entries if not isinstance(key, Site | Head) and key < self.first_layer]
        if early:
            reasons.append(
                f"layer {early[0]} comes before layer {self.first_layer}, the first layer that the format supports"
            )
        return reasons


EVERYTHING = Ability(
    "groundscope", "at the places in the file", PLACES, KINDS, NORMS, POSITIONS, schedules=True, by_token=True
)


def require(vector: SteeringVector, name: str, ability: Ability, *, convertible: bool = False) -> None:
    """Raise `ConfigError` if a format cannot represent a vector; the message names the reasons and suitable formats.

    Parameters
    ----------
    vector
        The vector to write.
    name
        Name of the format.
    ability
        Ability of the format.
    convertible
        Whether the message suggests ``convert=True``.
    """
    obstacles = ability.obstacles(vector)
    if not obstacles:
        return
    from mitigation.steering.export import FORMATS

    suitable = [other for other, form in FORMATS.items() if not form.ability.obstacles(vector)]
    suggestions = [f"export it as {' or '.join(repr(other) for other in suitable)}"]
    if vector.positions not in ability.positions:
        position = ability.positions[0]
        suggestions.append(f"or test vector.at('{position}') and export that one")
    if convertible and any(isinstance(key, Head | Site) for key in vector.entries):
        suggestions.append("or pass convert=True to convert it to the format's place")
    msg = f"{vector} cannot be written as '{name}' for {ability.consumer}: {'; '.join(obstacles)}. {', '.join(suggestions)}"
    raise ConfigError(msg)


def place_of(key: Key) -> str:
    """Return the kind of place of an entry, one of `PLACES`."""
    if isinstance(key, Head):
        return "heads"
    if not isinstance(key, Site):
        return "residual"
    if key.component == "mlp_out":
        return "MLP output" if key.stack == "decoder" else "vision MLP output"
    plain = key.component == "attn_out" and key.stack == "decoder" and not key.cross
    return "attention output" if plain else "another site"


def displacement(entry: Entry, strength: float) -> np.ndarray:
    """Return the vector added at a place, float64 ``[d]``: the product of strength, sigma and direction."""
    return strength * entry.sigma * entry.vector.astype(np.float64)


def card_of(vector: SteeringVector, name: str, strength: float, **more: Any) -> Mapping[str, Any]:
    """Return the metadata stored with every export: the format, the model and the provenance."""
    return {
        "format": name,
        "strength": strength,
        "positions": vector.positions,
        "norm": vector.norm,
        "places": [place_of(key) for key in vector.entries],
        "model": vector.model,
        "config_hash": vector.config_hash,
        "provenance": dict(vector.provenance),
        **more,
    }
