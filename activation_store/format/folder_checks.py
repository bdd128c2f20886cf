"""Check that a folder's shards are the sealed ones: by size, digest and example ids."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from activation_store.format.columns import read_columns
from activation_store.format.encoding import Column
from activation_store.format.hdf5 import group_at
from activation_store.format.manifest import IndexEntry, ShardEntry
from activation_store.format.schema import INDEX
from activation_store.format.seal import seal_digest
from activation_store.format.shard import LAST_UNSEALED, open_unscreened, reading, rebuild_advice
from groundscope.core.errors import StoreError
from groundscope.core.files import DamagedFileError, file_digest
from groundscope.core.user_files import read_text


def check_listed(path: Path, entry: ShardEntry) -> None:
    """Raise `DamagedFileError` if a shard's size, or the digest at its end, differs from the manifest."""
    with reading(path):
        size = path.stat().st_size
    if size != entry.bytes:
        msg = f"{path}: damaged, {size} bytes instead of {entry.bytes}; {rebuild_advice(path.name)}"
        raise DamagedFileError(msg)
    if entry.version > LAST_UNSEALED and seal_digest(path) != entry.sha256:
        msg = (
            f"{path}: damaged or from another store, its digest differs from the one in the manifest; "
            f"{rebuild_advice(path.name)}"
        )
        raise DamagedFileError(msg)


def read_sealed(folder: Path) -> dict[str, str]:
    """Return the digests, by file name, of the shards in a folder that unfinished runs sealed."""
    out: dict[str, str] = {}
    for path in folder.glob(".sealed-*.jsonl"):
        for line in read_text(path, error=StoreError).splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # skip a line that a kill truncated
                record = json.loads(line)
                out[str(record["file"])] = str(record["sha256"])
    return out


def check_sealed(path: Path, digests: Mapping[str, str]) -> None:
    """Raise `DamagedFileError` if a shard differs from the one that an unfinished run sealed under its name."""
    if path.name in digests and seal_digest(path) != digests[path.name]:
        msg = (
            f"{path}: damaged or from another store, its digest differs from the one recorded when this store sealed it; "
            f"{rebuild_advice(path.name)}"
        )
        raise DamagedFileError(msg)


def check_ids(folder: Path, ids: Mapping[str, Sequence[str]]) -> None:
    """Raise `StoreError` if an example is in two shards (by file name, in order), or twice in one."""
    if len({name for names in ids.values() for name in names}) == sum(map(len, ids.values())):
        return
    where: dict[str, str] = {}
    for shard, names in ids.items():
        for name in names:
            if name in where:
                msg = (
                    f"{folder / shard}: the example '{name}' is also in {where[name]}: "
                    f"one of the two shards is a copy or from another store; remove it and run the same trace again"
                )
                raise StoreError(msg)
            where[name] = shard


def read_index(folder: Path, entry: IndexEntry | None) -> dict[str, Column] | None:
    """Read the example table from a folder's index; return None if the index differs from the manifest."""
    path = folder / INDEX
    if entry is None:
        return None
    with contextlib.suppress(StoreError), reading(path):
        if path.stat().st_size == entry.bytes and file_digest(path) == entry.sha256:
            with open_unscreened(path, "activation-index") as file:
                return read_columns(group_at(file, "examples"))
    return None
