"""Making one store out of others: all rows layer by layer (repack), or the shards of several side by side (merge)."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from activation_store.format.buffered_file import Pen
from activation_store.format.compression import need_filter
from activation_store.format.digests import blocks, read_digests
from activation_store.format.manifest import Manifest, ShardEntry, read_manifest
from activation_store.format.model_tensors import tensors_entry, write_tensors
from activation_store.format.schema import MANIFEST, ArrayInfo, Schema, shard_name, shard_numbers
from activation_store.format.screening import screen
from activation_store.format.shard import SHARD_KIND, check_outcome, inspect, rebuild_advice
from activation_store.reading.store import ActivationStore
from activation_store.writing.shard_parts import create_array, describe_array, finish_shard, publish_shard, start_shard
from activation_store.writing.virtual_index import write_index
from groundscope.core.errors import StoreError
from groundscope.core.files import DamagedFileError, explained, part_of, publish_new, same_bytes, sync, write_whole

Progress = Callable[[int, int], None]
"""Called with what is done and the total."""
_BUFFER = 256 << 20


def repack(store: ActivationStore, out: str | Path, progress: Progress | None = None) -> ActivationStore:
    """Write a store anew with every array contiguous [L, N, D]: the fastest to read whole layers from.

    The values are the same to the bit, and so are table, provenance and model-level arrays; compression is undone. The new
    store is one file, and it cannot be continued.

    Parameters
    ----------
    store
        A complete store; several merged ones become one.
    out
        Folder of the new store; made where it is missing, else it must be empty.
    progress
        Called after each layer of each array.

    Raises
    ------
    StoreError
        Where the store is not complete, the folder is not empty, or the disk refuses.
    """
    need_filter(store.schema.compression)
    schema = replace(store.schema, compression=None)
    with _new_folder(store, Path(out)) as folder:
        entries = [_one_shard(store, schema, folder, progress)] if len(store) else []
        _finish(store, folder, schema, entries)
    return ActivationStore(folder)


def merge(stores: ActivationStore, out: str | Path, progress: Progress | None = None) -> ActivationStore:
    """Write several stores, merged by `ActivationStore.merge`, into one folder: their shards as they are, renumbered.

    Parameters
    ----------
    stores
        What `ActivationStore.merge` returned; each of its folders must be complete.
    out
        Folder of the new store; made where it is missing, else it must be empty.
    progress
        Called after each shard.

    Raises
    ------
    StoreError
        Where a store is not complete, the folder is not empty, a shard is not as it was sealed, or the disk refuses.
    """
    with _new_folder(stores, Path(out)) as folder:
        entries: list[ShardEntry] = []
        first = 0
        total = sum(len(part.shards) for part in stores.folders)
        for part in stores.folders:
            listed = read_manifest(part.path / MANIFEST).shards
            originals = [part.path / e.file for e in listed]
            # All at once: files without a seal share a child process.
            for path, outcome, entry in zip(originals, screen(originals, SHARD_KIND), listed, strict=True):
                check_outcome(path, outcome, entry)
            numbers = [shard_numbers(e.file) or (0, 0) for e in listed]
            for entry, (worker, number) in zip(listed, numbers, strict=True):
                name = shard_name(first + worker, number)
                temporary = part_of(folder / name)
                shutil.copyfile(part.path / entry.file, temporary)
                sync(temporary)
                _check_copy(temporary, part.path / entry.file, entry)
                publish_new(temporary, folder / name)
                entries.append(replace(entry, file=name))
                if progress:
                    progress(len(entries), total)
            first += max((worker for worker, _ in numbers), default=0) + 1
        _finish(stores, folder, stores.schema, entries)
    return ActivationStore(folder)


def _one_shard(store: ActivationStore, schema: Schema, folder: Path, progress: Progress | None) -> ShardEntry:
    name = shard_name(0, 0)
    temporary = part_of(folder / name)
    total, done = sum(a.n_layers for a in schema.arrays), 0
    digests: dict[str, str] = {}
    with contextlib.closing(Pen(temporary)) as pen:
        with h5py.File(pen, "w") as file:
            start_shard(file, schema, store.provenance)
            for info in schema.arrays:
                offsets = _offsets(store, info)
                n = len(store) if offsets is None else int(offsets[-1])
                element, values = create_array(file, info, schema.dtype, (info.n_layers, n, info.width))
                for layer in range(info.n_layers):
                    _copy_layer(store, info, values, layer)
                    pen.check()
                    done += 1
                    if progress:
                        progress(done, total)
                file.flush()
                table = read_digests(temporary, blocks(values))
                counts = [shard.array(info).counts for shard in store.shards()]
                overflow, nonfinite = (sum(column) for column in zip(*counts, strict=True))
                digests[info.name] = describe_array(
                    element,
                    values,
                    info,
                    schema.dtype,
                    table,
                    offsets=offsets,
                    overflow=overflow,
                    nonfinite=nonfinite,
                    order="LND",
                )
            finish_shard(file, store.columns, len(store))
        pen.check()
    return publish_shard(temporary, folder / name, digests, tuple(store.columns["id"]))


def _copy_layer(store: ActivationStore, info: ArrayInfo, values: h5py.Dataset, layer: int) -> None:
    at, step = 0, max(1, _BUFFER // (info.width * values.dtype.itemsize))
    for shard in store.shards():
        array = shard.array(info)
        for start in range(0, array.rows, step):
            rows = range(start, min(start + step, array.rows))
            part = np.empty((1, len(rows), info.width), values.dtype)
            array.read_into(part[0], rows, layer, slice(0, info.width))
            values[layer : layer + 1, at : at + len(rows)] = part
            at += len(rows)


def _offsets(store: ActivationStore, info: ArrayInfo) -> np.ndarray | None:
    if not info.ragged:
        return None
    offsets = [np.zeros(1, np.int64)]
    for shard in store.shards():
        own = shard.array(info).offsets
        if own is not None:
            offsets.append(own[1:] + offsets[-1][-1])
    return np.concatenate(offsets)


def _check_copy(copy: Path, original: Path, entry: ShardEntry) -> None:
    if not same_bytes(copy, original):
        msg = f"{original}: its copy has other bytes: the disk fails, or the file was changed while it was copied"
        raise StoreError(msg)
    found = inspect(copy, screened=True)  # raises where its values changed
    if (found.bytes, found.sha256) != (entry.bytes, entry.sha256):
        msg = f"{original}: damaged, its bytes are not those that the manifest lists; {rebuild_advice(original.name)}"
        raise DamagedFileError(msg)


@contextlib.contextmanager
def _new_folder(store: ActivationStore, folder: Path) -> Iterator[Path]:
    """Make a folder for a new store; removes it with all that was written into it should that fail."""
    unfinished = next((part.path for part in store.folders if not part.complete), None)
    if unfinished is not None:
        msg = f"{unfinished} is not complete: run its trace again to the end first"
        raise StoreError(msg)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        msg = f"{folder} is there and not empty: name a folder that is not there yet"
        raise StoreError(msg)
    with explained(lambda reason: f"{folder}: cannot be written: {reason}; nothing is kept of it"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _finish(store: ActivationStore, folder: Path, schema: Schema, entries: list[ShardEntry]) -> None:
    if store.tensors:
        write_tensors(folder, {name: store.tensor(name) for name in store.tensors})
    provenance = dict(store.provenance)
    index = write_index(folder, schema, provenance, [entry.file for entry in entries])
    manifest = Manifest(schema, provenance, tuple(entries), tensors_entry(folder), index)
    write_whole(folder / MANIFEST, manifest.encode())
