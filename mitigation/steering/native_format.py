"""The native format: a safetensors file with metadata in its header, and the same metadata as a JSON file.

Tensors are named ``layers.{l}.head.{h}`` ``[head_dim]`` and ``layers.{l}.residual`` ``[D]``; an amplification may add
``….reads`` and ``….writes`` ``[k, d]``; other sites are named ``layers.{l}.mlp_out``, ``vision.layers.{l}.mlp_out``
(``[n, d]`` if every token has a separate direction). A gate's probe is ``gate.weights`` ``[d]``. `load` reads the metadata
in the header only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core import artifacts
from groundscope.core.errors import StoreError
from groundscope.core.files import canonical_json
from groundscope.core.result_fields import building, check_fields
from lvlm.sites import Head, Site
from mitigation.steering.placement import Entry, Key, ProbeGate, site_of
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from lvlm.model import Lvlm

VERSION = 3
"""Version 2 added norm rules, schedules and sites other than heads and residual streams; version 3 added the norm rule
'away'. All versions are readable."""
KIND = "steering_vector"
_NAME = re.compile(r"^(?:(vision)\.)?layers\.(\d+)\.(?:head\.(\d+)|(\w+))$")
_GATE = "gate.weights"
_RULES = {
    "add": "x + strength * sigma * vector; norm 'kept': |x| unit(that), 'relative': |x| unit(x / |x| + ...), "
    "'away': 'relative' with ... times 1 + max(0, cos(x, -vector))",
    "project": "x - strength * max(<x, vector>, 0) * vector",
    "amplify": "x + strength * (x - vector) @ reads.T @ writes; reads is the identity where absent, writes is reads",
}


def safetensors(vector: SteeringVector, path: str | Path, model: Lvlm | None = None) -> Path:
    """Write a steering vector in the native format.

    Parameters
    ----------
    vector
        The vector.
    path
        Path of the safetensors file; the metadata go into a file of the same name with the suffix ``.json``.
    model
        Optional, for the common interface of exporters: a model to check the vector against.

    Raises
    ------
    StoreError
        If a file cannot be written.
    ModelError
        For a model that the vector was not derived for.
    """
    if model is not None:
        vector.check(model)
    path = Path(path)
    tensors: dict[str, np.ndarray] = {}
    entries = {}
    for key, entry in vector.entries.items():
        name = tensor_name(key)
        tensors[name] = entry.vector
        tensors.update({f"{name}.{p}": a for p in ("reads", "writes") if (a := getattr(entry, p)) is not None})
        entries[name] = {"site": str(site_of(key)), "sigma": entry.sigma}
    card = {
        "kind": vector.kind,
        "rule": _RULES[vector.kind],
        "positions": vector.positions,
        "strength": vector.strength,
        "model": vector.model,
        "config_hash": vector.config_hash,
        "entries": entries,
        "provenance": dict(vector.provenance),
        "norm": vector.norm,
        "decay": vector.decay,
    }
    if vector.gate is not None:
        tensors[_GATE] = vector.gate.weights
        card["gate"] = {"at": tensor_name(vector.gate.place), "bias": vector.gate.bias, "about": vector.gate.about}
    version = VERSION if vector.norm == "away" else 2
    artifacts.write(path, KIND, version, tensors, card)
    artifacts.write_bytes(path.with_suffix(".json"), f"{canonical_json({'version': version, **card})}\n".encode(), KIND)
    return path


def load(path: str | Path) -> SteeringVector:
    """Read a steering vector; raises `StoreError` if the file is missing, damaged, of another kind or of a newer version."""
    tensors, card = artifacts.read(Path(path), KIND, VERSION)
    with building(f"{path}: damaged steering vector", StoreError):
        listed = check_fields(card["entries"], object, "entries")
        entries = dict(_entry(name, about, tensors) for name, about in listed.items())
        fields = ("kind", "positions", "strength", "model", "config_hash", "provenance")
        schedule = {name: card[name] for name in ("norm", "decay") if name in card}
        gate = None
        if "gate" in card:
            values = check_fields(card["gate"], object, "gate")
            about = check_fields({name: values[name] for name in ("bias", "about")}, ProbeGate, "gate")
            gate = ProbeGate(_key(values["at"]), tensors[_GATE], **about)
        plain = check_fields({name: card[name] for name in fields} | schedule, SteeringVector)
        return SteeringVector(entries=entries, gate=gate, **plain)


def tensor_name(key: Key) -> str:
    """Return ``layers.3.head.5``, ``layers.3.residual``, or ``layers.3.mlp_out`` for another site."""
    if isinstance(key, Site):
        stack = "" if key.stack == "decoder" else f"{key.stack}."
        return f"{stack}layers.{key.layer}.{'cross_' if key.cross else ''}{key.component}"
    return f"layers.{key.layer}.head.{key.head}" if isinstance(key, Head) else f"layers.{key}.residual"


def _key(name: str) -> Key:
    """Parse a name written by `tensor_name`."""
    match = _NAME.match(name)
    if match is None or (match[1] and match[3]):
        msg = f"'{name}' is not the name of an entry"
        raise StoreError(msg)
    stack, layer, head, part = match[1] or "decoder", int(match[2]), match[3], match[4]
    if head is not None:
        return Head(layer, int(head))
    if part == "residual":
        return layer
    cross = "cross." if part.startswith("cross_") else ""
    return Site.parse(f"{stack}.L{layer}.{cross}{part.removeprefix('cross_')}")


def _entry(name: str, about: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[Key, Entry]:
    sigma = check_fields(about, Entry, f"entries.{name}")["sigma"]
    entry = Entry(tensors[name], sigma, tensors.get(f"{name}.reads"), tensors.get(f"{name}.writes"))
    return _key(name), entry
