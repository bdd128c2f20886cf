"""Result files: one safetensors file, with all fields that are not tensors as JSON in its header."""

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
    """Write tensors and a card atomically; raise `StoreError` if the file cannot be written."""
    text = canonical_json({"version": version, **card})
    write_bytes(path, encode_tensors(tensors, {kind: text}), kind)


def write_bytes(path: Path, data: bytes, kind: str) -> None:
    """Write a file atomically; raise `StoreError` if it cannot be written."""
    with explained(lambda reason: f"{path}: the {kind} cannot be written: {reason}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)


@contextlib.contextmanager
def reading_result(path: Path, kind: str) -> Iterator[None]:
    """Convert a system error while reading a result file into a `StoreError` that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        msg = f"no {kind} at {path}: no such file"
        raise StoreError(msg) from error
    except OSError as error:
        msg = f"{path}: the {kind} cannot be read: {error.strerror or error}"
        raise StoreError(msg) from error


def read(path: Path, kind: str, version: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file written by `write`; raise `StoreError` if it is missing, damaged, of another kind or newer."""
    with reading_result(path, kind):
        tensors, header = read_tensors(path, error=StoreError)
    if kind not in header:
        msg = f"{path} is not a {kind} file: its header contains {', '.join(header) or 'nothing'}"
        raise StoreError(msg)
    try:
        card = parse_json(header[kind])
    except (ValueError, RecursionError) as error:
        msg = f"{path} is not a {kind} file, or is damaged: {error}"
        raise StoreError(msg) from error
    if not isinstance(card, dict):
        msg = f"{path} is not a {kind} file, or is damaged: its card is not a JSON object"
        raise StoreError(msg)
    stored_version = card.pop("version", 0)
    if not isinstance(stored_version, int) or not 1 <= stored_version <= version:
        msg = (
            f"{path} is a {kind} of version {stored_version}, but this groundscope supports versions 1 to {version}; update "
            "groundscope, or create the file again"
        )
        raise StoreError(msg)
    return tensors, card
