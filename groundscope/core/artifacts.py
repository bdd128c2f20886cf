"""Results on disk: one safetensors file, with everything that is not a tensor as JSON in its header."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from groundscope.core.errors import StoreError
from groundscope.core.files import canonical_json, explained, write_whole
from groundscope.core.tensor_files import encode_tensors, read_tensors
from groundscope.core.user_files import parse_json


def write(path: Path, kind: str, version: int, tensors: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
    """Write tensors and a card; the file is whole or as it was before. Raises `StoreError` where it cannot be written."""
    text = canonical_json({"version": version, **card})
    write_bytes(path, encode_tensors(tensors, {kind: text}), kind)


def write_bytes(path: Path, data: bytes, kind: str) -> None:
    """Write a file whole; raises `StoreError` where that cannot be done."""
    with explained(lambda reason: f"{path}: the {kind} cannot be written: {reason}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)


@contextlib.contextmanager
def reading_result(path: Path, kind: str) -> Iterator[None]:
    """Turn an error of the system over a file of results into a `StoreError` that says what it is."""
    try:
        yield
    except FileNotFoundError as error:
        msg = f"no {kind} at {path}: there is no such file"
        raise StoreError(msg) from error
    except OSError as error:
        msg = f"{path}: the {kind} cannot be read: {error.strerror or error}"
        raise StoreError(msg) from error


def read(path: Path, kind: str, version: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `write` wrote; raises `StoreError` where it is missing, damaged, of another kind or a newer version."""
    with reading_result(path, kind):
        tensors, header = read_tensors(path, error=StoreError)
    if kind not in header:
        msg = f"{path} is no {kind}: its header names {', '.join(header) or 'nothing'}"
        raise StoreError(msg)
    try:
        card = parse_json(header[kind])
    except (ValueError, RecursionError) as error:
        msg = f"{path} is no {kind}, or is damaged: {error}"
        raise StoreError(msg) from error
    if not isinstance(card, dict):
        msg = f"{path} is no {kind}, or is damaged: its card is not a JSON object"
        raise StoreError(msg)
    found = card.pop("version", 0)
    if not isinstance(found, int) or not 1 <= found <= version:
        msg = f"{path}: {kind} of version {found}, this groundscope reads up to {version}; update it, or make the file again"
        raise StoreError(msg)
    return tensors, card
