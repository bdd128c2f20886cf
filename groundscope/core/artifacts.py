"""Results on disk: one safetensors file, with everything that is not a tensor as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from groundscope.core.errors import StoreError
from groundscope.core.files import canonical_json, explained, write_whole


def write(path: Path, kind: str, version: int, tensors: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
    """Write tensors and a card; the file is whole or as it was before. Raises `StoreError` where it cannot be written."""
    from safetensors.numpy import save

    text = canonical_json({"version": version, **card})
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, metadata={kind: text}), kind)


def write_bytes(path: Path, data: bytes, kind: str) -> None:
    """Write a file whole; raises `StoreError` where that cannot be done."""
    with explained(lambda reason: f"{path}: the {kind} cannot be written: {reason}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)


def read(path: Path, kind: str, version: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `write` wrote; raises `StoreError` where it is missing, damaged, of another kind or a newer version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
            if kind not in header:
                msg = f"{path} is no {kind}: its header names {', '.join(header) or 'nothing'}"
                raise StoreError(msg)
            card = json.loads(header[kind])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except FileNotFoundError as error:
        msg = f"no {kind} at {path}: there is no such file"
        raise StoreError(msg) from error
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        msg = f"{path} is no {kind}, or is damaged: {error}"
        raise StoreError(msg) from error
    found = card.pop("version", 0)
    if not isinstance(found, int) or not 1 <= found <= version:
        msg = f"{path}: {kind} of version {found}, this groundscope reads up to {version}; update it, or make the file anew"
        raise StoreError(msg)
    return tensors, card
