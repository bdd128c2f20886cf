"""Tensors and metadata of the native format of steering vectors: a safetensors file with the metadata in its header.

Tensors are named ``layers.{l}.head.{h}`` ``[head_dim]`` and ``layers.{l}.residual`` ``[D]``; an amplification may add
``….reads`` and ``….writes`` ``[k, d]``; other sites are named ``layers.{l}.mlp_out``, ``vision.layers.{l}.mlp_out``
(``[n, d]`` if every token has a separate direction). A gate's probe is ``gate.weights`` ``[d]``. Files that were written with
the model also name the module of each place (`mitigation.steering.module_places`).
`mitigation.steering.vector.SteeringVector.save` and `load` write and read the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from groundscope.core.errors import StoreError
from groundscope.core.result_fields import check_fields
from lvlm.sites import Head, Site
from mitigation.steering.changes import (
    KINDS,
    AddChange,
    AmplifyChange,
    Kind,
    ProbeGate,
    ProjectChange,
    VectorChange,
)
from mitigation.steering.places import Key, site_of

VERSION = 4
"""Version 2 added norm rules, schedules and sites other than heads and residual streams; version 3 added the norm rule
'away'; version 4
spells positions in the grammar of `lvlm.token_selection`. All versions are readable."""
OLD_POSITIONS_UNTIL = 3
KIND = "steering_vector"
RULES: Mapping[Kind, str] = {
    "add": "x + strength * sigma * vector; norm 'kept': |x| unit(that), 'relative': |x| unit(x / |x| + ...), "
    "'away': 'relative' with ... times 1 + max(0, cos(x, -vector))",
    "project": "x - strength * max(<x, vector>, 0) * vector",
    "amplify": "x + strength * (x - vector) @ reads.T @ writes; reads is the identity where absent, writes is reads",
}
"""Formulas for readers of the file; ``vector`` is the tensor with the name of the place."""
_NAME = re.compile(r"^(?:(vision)\.)?layers\.(\d+)\.(?:head\.(\d+)|(\w+))$")
_GATE = "gate.weights"


def encode(
    changes: Mapping[Key, VectorChange], gate: ProbeGate | None
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Return the tensors, the metadata of each place, and the metadata of the gate (empty without one)."""
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, Any] = {}
    for key, change in changes.items():
        name = tensor_name(key)
        tensors[name] = change.mean if isinstance(change, AmplifyChange) else change.direction
        if isinstance(change, AmplifyChange):
            tensors |= {f"{name}.{p}": a for p in ("reads", "writes") if (a := getattr(change, p)) is not None}
        sigma = change.sigma if isinstance(change, AddChange) else 1.0
        entries[name] = {"site": str(site_of(key)), "sigma": sigma}
    if gate is None:
        return tensors, entries, {}
    tensors[_GATE] = gate.weights
    return tensors, entries, {"at": tensor_name(gate.place), "bias": gate.bias, "about": gate.about}


def decode_changes(kind: object, entries: Any, tensors: Mapping[str, np.ndarray]) -> dict[Key, VectorChange]:
    """Return the change at each place; raises what a damaged file causes, to be converted by `result_fields.building`."""
    if kind not in KINDS:
        msg = f"unknown kind '{kind}'; choose from {', '.join(KINDS)}"
        raise StoreError(msg)
    changes: dict[Key, VectorChange] = {}
    for name, about in check_fields(entries, object, "entries").items():
        sigma = check_fields(about, AddChange, f"entries.{name}")["sigma"]
        if kind == "add":
            change = AddChange(tensors[name], sigma)
        elif kind == "amplify":
            change = AmplifyChange(tensors[name], tensors.get(f"{name}.reads"), tensors.get(f"{name}.writes"))
        else:
            change = ProjectChange(tensors[name])
        changes[parse_name(name)] = change
    return changes


def decode_gate(metadata: Any, tensors: Mapping[str, np.ndarray]) -> ProbeGate:
    """Return the gate; raises what a damaged file causes, to be converted by `result_fields.building`."""
    values = check_fields(metadata, object, "gate")
    about = check_fields({name: values[name] for name in ("bias", "about")}, ProbeGate, "gate")
    return ProbeGate(parse_name(values["at"]), tensors[_GATE], **about)


def tensor_name(key: Key) -> str:
    """Return ``layers.3.head.5``, ``layers.3.residual``, or ``layers.3.mlp_out`` for another site."""
    if isinstance(key, Site):
        stack = "" if key.stack == "decoder" else f"{key.stack}."
        return f"{stack}layers.{key.layer}.{'cross_' if key.cross else ''}{key.component}"
    return f"layers.{key.layer}.head.{key.head}" if isinstance(key, Head) else f"layers.{key}.residual"


def parse_name(name: str) -> Key:
    """Return the place of a name of `tensor_name`; raises `StoreError` for another name."""
    match = _NAME.match(name)
    if match is None or (match[1] and match[3]):
        msg = f"'{name}' is not the name of a place"
        raise StoreError(msg)
    stack, layer, head, part = match[1] or "decoder", int(match[2]), match[3], match[4]
    if head is not None:
        return Head(layer, int(head))
    if part == "residual":
        return layer
    cross = "cross." if part.startswith("cross_") else ""
    return Site.parse(f"{stack}.L{layer}.{cross}{part.removeprefix('cross_')}")
