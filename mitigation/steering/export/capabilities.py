"""What a format can hold, and what to say where it cannot hold a vector."""

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
    """What a format, as its consumer applies it, can express."""

    consumer: str
    """Who reads the file."""
    applied: str
    """Where the consumer adds it."""
    places: tuple[str, ...]
    kinds: tuple[Kind, ...] = ("add",)
    norms: tuple[Norm, ...] = ("free",)
    positions: tuple[Positions, ...] = ("all",)
    schedules: bool = False
    """Whether a decay or a gate can be told."""
    by_token: bool = False
    """Whether tokens may have directions of their own."""
    first_layer: int = 0
    one_place: bool = False
    """Whether a file holds one kind of place only."""

    def obstacles(self, vector: SteeringVector) -> list[str]:
        """Return what about a vector cannot be held; empty where it can."""
        found = []
        kinds_of_place = list(dict.fromkeys(place_of(key) for key in vector.entries))
        unfit = [place for place in kinds_of_place if place not in self.places]
        if unfit:
            found.append(f"it acts on {', '.join(unfit)}, the file on {', '.join(self.places)}")
        elif self.one_place and len(kinds_of_place) > 1:
            found.append(f"it acts on {' and '.join(kinds_of_place)}, a file on one of them")
        if vector.kind not in self.kinds:
            found.append(f"it is of kind '{vector.kind}', the file of {', '.join(self.kinds)}")
        if vector.norm not in self.norms:
            found.append(f"its norm is '{vector.norm}', the file's {', '.join(self.norms)}")
        if vector.positions not in self.positions:
            found.append(f"it acts at positions '{vector.positions}', the file at '{', '.join(self.positions)}'")
        if not self.schedules and (vector.decay < 1 or vector.gate is not None):
            found.append("it decays or is gated, and the file has no schedule")
        if not self.by_token and any(entry.by_token for entry in vector.entries.values()):
            found.append("tokens have directions of their own")
        early = [key for key in vector.entries if not isinstance(key, Site | Head) and key < self.first_layer]
        if early:
            found.append(f"layer {early[0]} comes before layer {self.first_layer}, the first that the file can name")
        return found


EVERYTHING = Ability(
    "groundscope", "where the card says", PLACES, KINDS, NORMS, POSITIONS, schedules=True, by_token=True
)


def require(vector: SteeringVector, name: str, ability: Ability, *, convertible: bool = False) -> None:
    """Raise `ConfigError` where a format cannot hold a vector: what stands against it, and what can hold it.

    Parameters
    ----------
    vector
        What is to be written.
    name
        Of the format.
    ability
        Its own.
    convertible
        Say that ``convert=True`` would help.
    """
    obstacles = ability.obstacles(vector)
    if not obstacles:
        return
    from mitigation.steering.export import FORMATS

    others = [other for other, form in FORMATS.items() if not form.ability.obstacles(vector)]
    helps = [f"export it as {' or '.join(repr(other) for other in others)}"]
    if vector.positions not in ability.positions:
        at = ability.positions[0]
        helps.append(f"or test vector.at('{at}') and export that one")
    if convertible and any(isinstance(key, Head | Site) for key in vector.entries):
        helps.append("or say convert=True to have it carried to the file's place")
    msg = f"{vector} cannot be written as '{name}' for {ability.consumer}: {'; '.join(obstacles)}. {', '.join(helps)}"
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
    """Return what is added at a place, float64 ``[d]``: strength, sigma and direction in one."""
    return strength * entry.sigma * entry.vector.astype(np.float64)


def card_of(vector: SteeringVector, name: str, strength: float, **more: Any) -> Mapping[str, Any]:
    """Return what is written beside every file: what it is, for which model, and where it came from."""
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
