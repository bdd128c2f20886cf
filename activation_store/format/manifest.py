"""The manifest: the parts of a finished store with their digests, and a digest of the manifest itself."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from activation_store.format.schema import INDEX, TENSORS, Schema, check_version, shard_numbers
from groundscope.core.errors import StoreError
from groundscope.core.files import DamagedFileError, canonical_json
from groundscope.core.text import format_count
from groundscope.core.user_files import read_bytes

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 1 << 34


class DamagedManifestError(DamagedFileError):
    """A manifest whose bytes changed after it was written."""


@dataclass(frozen=True)
class ShardEntry:
    """Manifest entry of a sealed shard."""

    file: str
    bytes: int
    rows: int
    sha256: str
    """Digest of the file: that of its seal; in version 2 over all bytes but its chunks, in version 1 over the whole file."""
    arrays: Mapping[str, str]
    """Digest of each array, by name (``decoder.z/last``)."""
    examples: tuple[str, ...]
    """Ids in row order, so that the examples of a lost shard can be named."""
    version: int = 1
    """Layout version of the file."""


@dataclass(frozen=True)
class TensorsEntry:
    """Manifest entry of the file of model-level arrays."""

    file: str
    bytes: int
    sha256: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class IndexEntry:
    """Manifest entry of the index."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Schema, provenance and parts of a store."""

    schema: Schema
    provenance: Mapping[str, Any]
    shards: tuple[ShardEntry, ...]
    tensors: TensorsEntry | None = None
    index: IndexEntry | None = None

    def __post_init__(self) -> None:
        ordered = sorted(self.shards, key=lambda s: shard_numbers(s.file) or (0, 0))
        object.__setattr__(self, "shards", tuple(ordered))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def encode(self) -> bytes:
        """Return the bytes of ``manifest.json``: equal for equal stores, whether or not their runs were interrupted."""
        body = {
            "layout-version": self.schema.layout_version,
            "schema": self.schema.record(),
            "provenance": dict(self.provenance),
            "tensors": asdict(self.tensors) if self.tensors else None,
            "index": asdict(self.index) if self.index else None,
            "shards": [{**asdict(s), "arrays": dict(s.arrays)} for s in self.shards],
        }
        return canonical_json({**body, "sha256": _digest(body)}).encode()


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check that no byte changed. Unknown fields are ignored.

    Raises
    ------
    DamagedManifestError
        If any byte changed.
    StoreError
        If it has a newer layout version, a field has a wrong type, or it is not a regular file.
    OSError
        If it cannot be read.
    """
    raw = read_bytes(path, limit=_MOST_BYTES, error=StoreError)
    damaged = (
        f"{path}: the manifest is damaged; delete it and run the same trace again: "
        f"sealed shards are verified and kept, and the manifest is written again"
    )
    try:
        document = json.loads(raw)
        stated = document.pop("sha256")
        intact = stated == _digest(document) and canonical_json({**document, "sha256": stated}).encode() == raw
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedManifestError(damaged) from error
    if not intact:
        raise DamagedManifestError(damaged)
    check_version(document.get("layout-version"), str(path))
    try:
        tensors, index = document["tensors"], document.get("index")
        return Manifest(
            schema=Schema.from_record(document["schema"]),
            provenance=_typed(document, "provenance", dict),
            shards=tuple(_shard_entry(s) for s in _typed(document, "shards", list)),
            tensors=TensorsEntry(*_file(tensors, TENSORS), _texts(tensors, "names")) if tensors else None,
            index=IndexEntry(*_file(index, INDEX)) if index else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, StoreError):
            raise
        msg = f"{path}: a field of the manifest is missing or has a wrong type ({error}); another program wrote it"
        raise StoreError(msg) from error


def _shard_entry(record: Any) -> ShardEntry:
    file, size, sha256 = _file(record)
    if shard_numbers(file) is None:
        msg = f"'file' is {file!r}, not the name of a shard"
        raise TypeError(msg)
    arrays = _typed(record, "arrays", dict)
    if not all(isinstance(value, str) for value in arrays.values()):
        msg = "'arrays' must map names to digests"
        raise TypeError(msg)
    rows, examples = _typed(record, "rows", int), _texts(record, "examples")
    if rows != len(examples) or not rows:
        msg = f"'rows' is {rows} for {format_count(len(examples), 'example')}"
        raise TypeError(msg)
    version = record.get("version", 1)
    check_version(version, file)
    return ShardEntry(file, size, rows, sha256, arrays, examples, version)


def _file(record: Any, name: str | None = None) -> tuple[str, int, str]:
    """Return name, bytes and SHA-256 of a file; raise TypeError or KeyError if one is not valid or the name differs."""
    file, size, sha256 = (
        _typed(record, field, kind) for field, kind in (("file", str), ("bytes", int), ("sha256", str))
    )
    if (name is not None and file != name) or not _SHA256.fullmatch(sha256) or size < 0:
        msg = f"'file', 'bytes' or 'sha256' of {file!r} is not valid"
        raise TypeError(msg)
    return file, size, sha256


def _texts(record: Any, field: str) -> tuple[str, ...]:
    values = _typed(record, field, list)
    if not all(isinstance(value, str) for value in values):
        msg = f"'{field}' must be a list of strings"
        raise TypeError(msg)
    return tuple(values)


def _typed(record: Any, field: str, kind: type) -> Any:
    if not isinstance(record, dict):
        msg = f"expected an object with '{field}', not {type(record).__name__}"
        raise TypeError(msg)
    value = record[field]
    if not isinstance(value, kind) or isinstance(value, bool):
        msg = f"'{field}' must be {kind.__name__}, not {type(value).__name__}"
        raise TypeError(msg)
    return value


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()
