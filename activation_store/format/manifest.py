"""The manifest: what a finished store consists of, with a digest of everything, its own included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from activation_store.format.schema import LAYOUT_VERSION, Schema, check_version, shard_numbers
from groundscope.core.errors import StoreError
from groundscope.core.files import canonical_json


class DamagedManifestError(StoreError):
    """A manifest whose bytes are not those that were written."""


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest knows of one sealed shard."""

    file: str
    bytes: int
    rows: int
    sha256: str
    """Digest of the file but for its chunks; in version 1 of the whole file."""
    arrays: Mapping[str, str]
    """Digest of each array, by name (``decoder.z/last``)."""
    examples: tuple[str, ...]
    """Ids in row order: so that it can be said what a lost shard held."""
    version: int = 1
    """Layout version of the file."""


@dataclass(frozen=True)
class TensorsEntry:
    """What the manifest knows of the file of model-level arrays."""

    file: str
    bytes: int
    sha256: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class IndexEntry:
    """What the manifest knows of the index."""

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
        """Return the bytes of ``manifest.json``: equal for equal stores, whatever happened while they were written."""
        body = {
            "layout-version": LAYOUT_VERSION,
            "schema": self.schema.record(),
            "provenance": dict(self.provenance),
            "tensors": asdict(self.tensors) if self.tensors else None,
            "index": asdict(self.index) if self.index else None,
            "shards": [{**asdict(s), "arrays": dict(s.arrays)} for s in self.shards],
        }
        return canonical_json({**body, "sha256": _digest(body)}).encode()


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check that not a byte of it changed.

    Raises
    ------
    DamagedManifestError
        Where any byte of it changed.
    StoreError
        Where it is of a newer layout version.
    """
    raw = path.read_bytes()
    damaged = (
        f"{path}: the manifest is damaged; delete it and run the same trace again: "
        f"sealed shards are checked and kept, and the manifest is written anew"
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
    tensors, index = document["tensors"], document.get("index")
    return Manifest(
        schema=Schema.from_record(document["schema"]),
        provenance=document["provenance"],
        shards=tuple(ShardEntry(**{**s, "examples": tuple(s["examples"])}) for s in document["shards"]),
        tensors=TensorsEntry(**{**tensors, "names": tuple(tensors["names"])}) if tensors else None,
        index=IndexEntry(**index) if index else None,
    )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()
