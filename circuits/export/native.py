"""The native format: a safetensors file, and beside it the same card as readable JSON.

Tensors are named ``layers.{l}.head.{h}`` ``[head_dim]`` and ``layers.{l}.residual`` ``[D]``; an amplification may add
``….reads`` and ``….writes`` ``[k, d]``. The card is in the file's header too, and is read from there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store.layout import canonical_json
from circuits import files
from circuits.steering import Entry, SteeringVector, site_of
from concepts.errors import GroundscopeError, StoreError
from lvlm.sites import Head

if TYPE_CHECKING:
    from lvlm.model import Lvlm

VERSION = 1
KIND = "steering_vector"
_NAME = re.compile(r"^layers\.(\d+)\.(?:residual|head\.(\d+))$")
_RULES = {
    "add": "x + strength * sigma * vector",
    "amplify": "x + strength * (x - vector) @ reads.T @ writes; reads is the identity where absent, writes is reads",
}


def safetensors(vector: SteeringVector, path: str | Path, model: Lvlm | None = None) -> Path:
    """Write a steering vector in the native format.

    Parameters
    ----------
    vector
        What to write.
    path
        Of the safetensors file; the card goes beside it with the suffix ``.json``.
    model
        Not needed: every exporter takes one, and this one checks it where it is given.

    Raises
    ------
    StoreError
        Where a file cannot be written.
    ModelError
        For a model that the vector was not made for.
    """
    if model is not None:
        vector.check(model)
    path = Path(path)
    tensors: dict[str, np.ndarray] = {}
    about = {}
    for key, entry in vector.entries.items():
        name = tensor_name(key)
        tensors[name] = entry.vector
        tensors.update({f"{name}.{p}": a for p in ("reads", "writes") if (a := getattr(entry, p)) is not None})
        about[name] = {"site": str(site_of(key)), "sigma": entry.sigma}
    card = {
        "kind": vector.kind,
        "rule": _RULES[vector.kind],
        "positions": vector.positions,
        "strength": vector.strength,
        "model": vector.model,
        "config_hash": vector.config_hash,
        "entries": about,
        "provenance": dict(vector.provenance),
    }
    files.write(path, KIND, VERSION, tensors, card)
    files.write_bytes(path.with_suffix(".json"), f"{canonical_json({'version': VERSION, **card})}\n".encode(), KIND)
    return path


def load(path: str | Path) -> SteeringVector:
    """Read a steering vector; raises `StoreError` where the file is missing, damaged, something else or newer."""
    tensors, card = files.read(Path(path), KIND, VERSION)
    try:
        entries = dict(_entry(name, about, tensors) for name, about in card["entries"].items())
        fields = ("kind", "positions", "strength", "model", "config_hash", "provenance")
        return SteeringVector(entries=entries, **{name: card[name] for name in fields})
    except (KeyError, TypeError, AttributeError, GroundscopeError) as error:
        msg = f"{path}: damaged steering vector: {error}"
        raise StoreError(msg) from error


def tensor_name(key: Head | int) -> str:
    """Return ``layers.3.head.5`` or ``layers.3.residual``."""
    return f"layers.{key.layer}.head.{key.head}" if isinstance(key, Head) else f"layers.{key}.residual"


def _entry(name: str, about: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[Head | int, Entry]:
    match = _NAME.match(name)
    if match is None:
        msg = f"no entry is called '{name}'"
        raise StoreError(msg)
    key = int(match[1]) if match[2] is None else Head(int(match[1]), int(match[2]))
    entry = Entry(tensors[name], about["sigma"], tensors.get(f"{name}.reads"), tensors.get(f"{name}.writes"))
    return key, entry
