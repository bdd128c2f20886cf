"""Make one store from others: rewrite all rows layer by layer (repack), or copy the shards of several stores (merge)."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from activation_store.format.buffered_file import BufferedFile, open_hdf5
from activation_store.format.compression import require_filter
from activation_store.format.digests import blocks, read_digests
from activation_store.format.hdf5_safety import screen
from activation_store.format.manifest import Manifest, ShardEntry, read_manifest
from activation_store.format.model_tensors import tensors_entry, write_tensors
from activation_store.format.schema import MANIFEST, ArrayInfo, Schema, shard_name, shard_numbers
from activation_store.format.shard import SHARD_KIND, check_outcome, inspect, rebuild_advice
from activation_store.reading.store import ActivationStore
from activation_store.writing.shard_writer import create_array, describe_array, finish_shard, publish_shard, start_shard
from activation_store.writing.virtual_index import write_index
from groundscope.core.errors import StoreError
from groundscope.core.files import DamagedFileError, explained, part_of, publish_new, same_bytes, sync, write_whole
from groundscope.core.progress import step_bar

_BUFFER = 256 << 20


def repack(store: ActivationStore, out: str | Path, *, progress: bool | None = None) -> ActivationStore:
    """Rewrite a store with every array contiguous [L, N, D], for the fastest reads of whole layers.

    Values, table, provenance and model-level arrays stay bitwise equal; the new arrays are not compressed. The new store
    is one file and cannot be continued.

    Parameters
    ----------
    store
        A complete store; a merge of several stores becomes one.
    out
        Folder of the new store; created if missing, otherwise it must be empty.
    progress
        Whether to show a progress bar; by default only on a terminal.

    Raises
    ------
    StoreError
        If the store is not complete, the folder is not empty, or a write fails.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter, repack
    >>> info = ArrayInfo("decoder", "resid_post", "last", n_layers=2, width=3)
    >>> table = {"id": ["a", "b"], "group": ["image1", "image2"], "question": ["Is it a cat?"] * 2}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with StoreWriter(folder, Schema((info,)), {"model": "example"}) as writer:
    ...         writer.append({info.key: np.ones((2, 2, 3), np.float32)}, {**table, "object:cat": [1, 0]})
    ...     packed = repack(ActivationStore(folder), f"{folder}/packed")
    ...     packed.read("decoder.L0.resid_post", "last").shape
    (2, 3)
    """
    require_filter(store.schema.compression)
    schema = replace(store.schema, compression=None)
    with _new_folder(store, Path(out)) as folder:
        entries = [_one_shard(store, schema, folder, progress)] if len(store) else []
        _finish(store, folder, schema, entries)
    return ActivationStore(folder)


def merge(stores: ActivationStore, out: str | Path, *, progress: bool | None = None) -> ActivationStore:
    """Copy the shards of several stores, merged by `ActivationStore.merge`, into one folder, with new numbers.

    Parameters
    ----------
    stores
        The result of `ActivationStore.merge`; each of its folders must be complete.
    out
        Folder of the new store; created if missing, otherwise it must be empty.
    progress
        Whether to show a progress bar; by default only on a terminal.

    Raises
    ------
    StoreError
        If a store is not complete, the folder is not empty, a shard is damaged, or a write fails.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter, merge
    >>> info = ArrayInfo("decoder", "resid_post", "last", n_layers=2, width=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("first", "second"):
    ...         with StoreWriter(Path(folder) / name, Schema((info,)), {"model": "example"}) as writer:
    ...             table = {"id": [name], "group": [name], "question": ["?"]}
    ...             writer.append({info.key: np.ones((1, 2, 3), np.float32)}, table)
    ...     store = ActivationStore(Path(folder) / "first")
    ...     merged = merge(store.merge(Path(folder) / "second"), Path(folder) / "merged")
    ...     merged.columns["id"].tolist()
    ['first', 'second']
    """
    total = sum(len(part.shards) for part in stores.folders)
    with _new_folder(stores, Path(out)) as folder, step_bar("merging", total, show=progress) as advance:
        entries: list[ShardEntry] = []
        first = 0
        for part in stores.folders:
            listed = read_manifest(part.path / MANIFEST).shards
            originals = [part.path / e.file for e in listed]
            # One call: files without a seal share a child process.
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
                advance()
            first += max((worker for worker, _ in numbers), default=0) + 1
        _finish(stores, folder, stores.schema, entries)
    return ActivationStore(folder)


def _one_shard(store: ActivationStore, schema: Schema, folder: Path, progress: bool | None) -> ShardEntry:
    name = shard_name(0, 0)
    temporary = part_of(folder / name)
    digests: dict[str, str] = {}
    total = sum(a.n_layers for a in schema.arrays)
    with (
        contextlib.closing(BufferedFile(temporary)) as raw_file,
        step_bar("repacking", total, show=progress) as advance,
    ):
        with open_hdf5(raw_file, "w") as file:
            start_shard(file, schema, store.provenance)
            for info in schema.arrays:
                offsets = _offsets(store, info)
                n = len(store) if offsets is None else int(offsets[-1])
                element, values = create_array(file, info, schema.storage(info), (info.n_layers, n, info.width))
                for layer in range(info.n_layers):
                    _copy_layer(store, info, values, layer)
                    raw_file.check()
                    advance()
                file.flush()
                table = read_digests(temporary, blocks(values))
                counts = [shard.array(info).counts for shard in store.shards()]
                overflow, nonfinite = (sum(column) for column in zip(*counts, strict=True))
                digests[info.name] = describe_array(
                    element,
                    values,
                    info,
                    schema.storage(info),
                    table,
                    offsets=offsets,
                    overflow=overflow,
                    nonfinite=nonfinite,
                    order="LND",
                )
            finish_shard(file, store.columns, len(store))
        raw_file.check()
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
        shard_offsets = shard.array(info).offsets
        if shard_offsets is not None:
            offsets.append(shard_offsets[1:] + offsets[-1][-1])
    return np.concatenate(offsets)


def _check_copy(copy: Path, original: Path, entry: ShardEntry) -> None:
    if not same_bytes(copy, original):
        msg = f"{original}: its copy differs: the disk fails, or the file changed during the copy; run it again"
        raise StoreError(msg)
    copied = inspect(copy, screened=True)  # raises an error if its values changed
    if (copied.bytes, copied.sha256) != (entry.bytes, entry.sha256):
        msg = f"{original}: damaged, its bytes differ from the manifest's entry; {rebuild_advice(original.name)}"
        raise DamagedFileError(msg)


@contextlib.contextmanager
def _new_folder(store: ActivationStore, folder: Path) -> Iterator[Path]:
    """Create a folder for a new store; remove it with all its contents on an error."""
    unfinished = next((part.path for part in store.folders if not part.complete), None)
    if unfinished is not None:
        msg = f"{unfinished} is not complete: run its trace to the end first"
        raise StoreError(msg)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        msg = f"{folder} exists and is not empty: choose a new or empty folder"
        raise StoreError(msg)
    with explained(lambda reason: f"{folder}: cannot be written: {reason}; its contents were removed"):
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
