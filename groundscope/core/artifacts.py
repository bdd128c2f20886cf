"""Result files: versions, digests, and one message for each way in which a file cannot be read.

A result is written in one of two forms. Arrays with a few fields are one safetensors file, whose header holds all other
fields as JSON (`write`, `read`). Results without arrays are one JSON document with a format, a version and a digest
(`sign_document`, `read_document`). Files are replaced atomically.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from groundscope.core.document_digest import KEY, document_digest, take_digest
from groundscope.core.errors import GroundscopeError, StoreError
from groundscope.core.files import canonical_json, explained, write_whole
from groundscope.core.tensor_files import encode_tensors, read_tensors
from groundscope.core.user_files import parse_json, read_json


def freeze(result: object) -> None:
    """Make the arrays of a dataclass read-only, also those in mappings; to be called in ``__post_init__``.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> from groundscope.core.artifacts import freeze
    >>> @dataclass(frozen=True)
    ... class Result:
    ...     scores: np.ndarray
    ...     def __post_init__(self):
    ...         freeze(self)
    >>> Result(np.zeros(2)).scores[0] = 1
    Traceback (most recent call last):
    ValueError: assignment destination is read-only
    """
    for item in fields(result):  # pyright: ignore[reportArgumentType] - any dataclass
        value = getattr(result, item.name)
        for array in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(array, np.ndarray):
                array.setflags(write=False)


def write(path: Path, kind: str, version: int, tensors: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
    """Write tensors and a card atomically; raise `StoreError` if the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from groundscope.core import artifacts
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "mean.safetensors"
    ...     artifacts.write(path, "mean", 2, {"values": np.ones(3)}, {"site": "decoder.L3.z"})
    ...     artifacts.read(path, "mean", 2)
    ({'values': array([1., 1., 1.])}, {'site': 'decoder.L3.z'})
    """
    text = canonical_json({"version": version, **card})
    write_bytes(path, encode_tensors(tensors, {kind: text}), kind)


def write_bytes(path: Path, data: bytes, kind: str) -> None:
    """Write a file atomically; raise `StoreError` if it cannot be written."""
    with explained(lambda reason: f"{path}: the {kind} cannot be written: {reason}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)


@contextlib.contextmanager
def reading_result(path: Path, kind: str, error: type[GroundscopeError] = StoreError) -> Iterator[None]:
    """Convert a system error while reading a result file into an `error` that names the file."""
    try:
        yield
    except FileNotFoundError as reason:
        msg = f"no {kind} at {path}: no such file"
        raise error(msg) from reason
    except OSError as reason:
        msg = f"{path}: the {kind} cannot be read: {reason.strerror or reason}"
        raise error(msg) from reason


def check_version(
    path: Path,
    kind: str,
    version: object,
    newest: int,
    *,
    oldest: int = 1,
    error: type[GroundscopeError] = StoreError,
    advice: str = "create the file again",
) -> int:
    """Return the version of a file; raise an `error`, which names the file, if this release does not support it."""
    if type(version) is not int or not oldest <= version <= newest:
        supported = f"versions {oldest} to {newest}" if oldest < newest else f"version {newest}"
        msg = (
            f"{path} is a {kind} of version {version!a}, but this groundscope supports {supported}; update groundscope, or "
            f"{advice}"
        )
        raise error(msg)
    return version


def read(path: Path, kind: str, version: int, *, oldest: int = 1) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file written by `write`; raise `StoreError` if it is missing, damaged, of another kind or newer."""
    tensors, card, _ = read_versioned(path, kind, version, oldest=oldest)
    return tensors, card


def read_versioned(
    path: Path, kind: str, version: int, *, oldest: int = 1
) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
    """Read a file as `read`, and return its version too."""
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
    return tensors, card, check_version(path, kind, card.pop("version", 0), version, oldest=oldest)


def sign_document(name: str, version: int, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON document with its format, version and digest, as `read_document` verifies them.

    Examples
    --------
    >>> from groundscope.core.artifacts import sign_document
    >>> document = sign_document("groundscope.note", 1, {"text": "seen"})
    >>> document["format"], document["version"], document["text"], len(document["digest"])
    ('groundscope.note', 1, 'seen', 64)
    """
    document = {"format": name, "version": version, **content}
    document[KEY] = document_digest(document)
    return document


def read_document(
    path: Path,
    name: str,
    kind: str,
    newest: int,
    *,
    oldest: int = 1,
    last_without_digest: int = 0,
    error: type[GroundscopeError] = StoreError,
    advice: str = "create the file again",
) -> dict[str, Any]:
    """Read a JSON document that `sign_document` made, without its format, version and digest.

    Parameters
    ----------
    path
        The file.
    name
        Its format.
    kind
        What it contains, for messages: ``probe grid``.
    newest, oldest
        Supported versions.
    last_without_digest
        The last version whose documents may lack a digest.
    error
        The class of the exception.
    advice
        How to obtain the file again, for the message about its version.

    Raises
    ------
    GroundscopeError
        An `error` if the file is missing, damaged, of another kind, or of an unsupported version.
    """
    try:
        with reading_result(path, kind, error):
            document = read_json(path, error=error)
    except RecursionError as reason:
        msg = f"{path} is not a {kind} file, or is damaged: {reason}"
        raise error(msg) from reason
    if not isinstance(document, dict) or document.get("format") != name:
        msg = f"{path} is not a {kind} file"
        raise error(msg)
    version = check_version(path, kind, document.get("version"), newest, oldest=oldest, error=error, advice=advice)
    take_digest(document, str(path), error, required=version > last_without_digest)
    del document["format"], document["version"]
    return document
