"""Reading a store: float32 arrays by site, token selection, head and rows, and the table of examples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np

from activation_store.elements import attribute, dataset_at, group_at
from activation_store.encoding import STORAGE, Column, decode, join_columns, read_columns
from activation_store.layout import (
    MANIFEST,
    ArrayInfo,
    Schema,
    canonical_json,
    comparable,
    difference,
    is_label,
    shard_numbers,
)
from activation_store.manifest import read_manifest
from activation_store.rows import Rows, gather, resolve_rows
from activation_store.shard import open_shard, read_json, read_rows, reading, rebuild_advice
from activation_store.tensors import read_tensor, tensor_names
from concepts.errors import SiteError, StoreError
from lvlm.sites import Site, TokenSelection

if TYPE_CHECKING:
    import pandas as pd

_OPEN_FILES = 64


class ActivationStore:
    """A store opened for reading; needs no model, and no more memory than what is asked for.

    Parameters
    ----------
    path
        Folder of the store. One that is still being written, or whose run was killed, reads as far as it is sealed;
        `complete` says so.

    Raises
    ------
    StoreError
        Where there is no store, a file of it is missing or damaged, or it is of a newer layout version.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._files: dict[str, h5py.File] = {}
        shards = _sealed_shards(self._path)
        manifest_path = self._path / MANIFEST
        manifest = read_manifest(manifest_path) if manifest_path.exists() else None
        listed = {e.file: e for e in manifest.shards} if manifest else {}
        for name, entry in listed.items():
            if name not in shards:
                msg = (
                    f"{self._path / name}: this shard with {entry.rows} examples ('{entry.examples[0]}' to "
                    f"'{entry.examples[-1]}') is missing; run the same trace again: only they are traced anew"
                )
                raise StoreError(msg)
            size = (self._path / name).stat().st_size
            if size != entry.bytes:
                msg = f"{self._path / name}: damaged, {size} bytes instead of {entry.bytes}; {rebuild_advice(name)}"
                raise StoreError(msg)
        self._complete = manifest is not None and listed.keys() == set(shards)
        schema, provenance = (manifest.schema, manifest.provenance) if manifest else (None, {})
        rows: dict[str, int] = {name: e.rows for name, e in listed.items()}
        for name in shards:
            if name in listed:
                continue
            file = self._file(name)
            with reading(self._path / name):
                found, source = Schema.from_record(read_json(file, "schema")), read_json(file, "provenance")
                rows[name] = read_rows(file)
            if schema is None:
                schema, provenance = found, source
            _check_same(self._path / name, (schema, provenance), (found, source))
        if schema is None:
            msg = f"{self._path}: no shard is sealed yet and there is no manifest; nothing to read until one is"
            raise StoreError(msg)
        self._schema = schema
        self._provenance = MappingProxyType(dict(provenance))
        self._shards = tuple(shards)
        self._starts = np.cumsum([0, *(rows[name] for name in shards)])  # [shards + 1]: first row of each, and the end
        self._by_key = {a.key: a for a in schema.arrays}

    # ---- what there is

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return self._path

    @property
    def complete(self) -> bool:
        """Whether the run that wrote it finished; otherwise only the shards sealed so far are read."""
        return self._complete

    @property
    def arrays(self) -> tuple[ArrayInfo, ...]:
        """What is kept for each example, sorted by stack, component and token selection."""
        return self._schema.arrays

    @property
    def dtype(self) -> str:
        """The dtype values are kept in: float32, float16 or bfloat16; reading gives float32."""
        return self._schema.dtype

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where it came from, as the tracer recorded it."""
        return self._provenance

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest; of a store that is not complete, of the digests of the arrays sealed so far."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        if self._complete:
            return hashlib.sha256((self._path / MANIFEST).read_bytes()).hexdigest()
        sealed = []
        for name in self._shards:
            file = self._file(name)
            with reading(self._path / name):
                arrays = [dataset_at(file, f"arrays/{a.name}") for a in self.arrays]
                sealed.append([name, *(str(attribute(array, "sha256")) for array in arrays)])
        return hashlib.sha256(canonical_json(sealed).encode()).hexdigest()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the model-level arrays kept beside the examples."""
        return tensor_names(self._path)

    @cached_property
    def columns(self) -> Mapping[str, Column]:
        """The example table as read-only columns [N]: text as objects, labels float32 with NaN where undefined."""
        parts = []
        for index, name in enumerate(self._shards):
            file = self._file(name)
            with reading(self._path / name):
                rows = int(self._starts[index + 1] - self._starts[index])
                parts.append((rows, read_columns(group_at(file, "examples"))))
        columns = join_columns(parts)
        for values in columns.values():
            values.setflags(write=False)
        return MappingProxyType(columns)

    @property
    def labels(self) -> tuple[str, ...]:
        """Concepts that have a label column, in order."""
        return tuple(name for name in self.columns if is_label(name))

    @property
    def examples(self) -> pd.DataFrame:
        """The table of examples, one row for each; the same as `frame()`."""
        return self.frame()

    def frame(self) -> pd.DataFrame:
        """Return the table of examples: id, group, question, …, a float32 column for each concept (NaN: undefined)."""
        import pandas as pd

        return pd.DataFrame({name: values.copy() for name, values in self.columns.items()})

    def has(self, stack: str, component: str, tokens: str | TokenSelection) -> bool:
        """Whether an array was traced."""
        return (stack, component, str(tokens)) in self._by_key

    def layers(self, stack: str, component: str) -> int:
        """Return how many layers were traced; raises `SiteError` where none."""
        return self._family(stack, component)[0].n_layers

    def width(self, stack: str, component: str) -> int:
        """Return the values kept for each layer and example; raises `SiteError` where the component was not traced."""
        return self._family(stack, component)[0].width

    def n_heads(self, stack: str) -> int:
        """Return the number of attention heads of a stack; raises `SiteError` where no z was traced in it."""
        heads = [a.n_heads for a in self.arrays if a.stack == stack and a.component == "z" and a.n_heads]
        if not heads:
            msg = (
                f"heads of '{stack}' not in store: z was not traced there; {self._what_there_is()}; trace again with z"
            )
            raise SiteError(msg)
        return heads[0]

    # ---- reading

    def read(
        self,
        site: str | Site,
        tokens: str | TokenSelection,
        head: int | None = None,
        examples: Rows | None = None,
    ) -> np.ndarray:
        """Read the activations of one site: only the layer, head and rows asked for are taken from the files.

        Parameters
        ----------
        site
            A site, ``decoder.L3.z``.
        tokens
            A token selection, ``last``.
        head
            One head of z (or of q, k, v).
        examples
            Rows: a slice, a boolean mask of all examples, or row numbers in any order; all by default.

        Returns
        -------
        float32 [n, D]; [n, head_dim] with `head`. A row is NaN where the token selection was empty.

        Raises
        ------
        SiteError
            Where the site, token selection or head is not in the store.
        StoreError
            Where `examples` does not fit the store, or a shard cannot be read.
        """
        info, layer = self._find(site, tokens)
        columns = _head_slice(info, str(site), head)
        rows = resolve_rows(examples, len(self), self._path)
        out = np.empty((len(rows), columns.stop - columns.start), np.float32)
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(shard_of):
            name = self._shards[shard]
            wanted = np.flatnonzero(shard_of == shard)
            file = self._file(name)
            with reading(self._path / name):
                dataset = dataset_at(file, f"arrays/{info.name}")
                stored = gather(dataset, rows[wanted] - self._starts[shard], layer, columns, STORAGE[self.dtype])
            out[wanted] = decode(stored, self.dtype)
        return out

    def tensor(self, name: str) -> np.ndarray:
        """Return a model-level array as it was given; raises `StoreError` naming those there are."""
        return read_tensor(self._path, name)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._complete else ", not complete: only what is sealed so far"
        sizes = f"{len(self)} examples, {len(self.arrays)} arrays, {self.dtype}"
        return f"ActivationStore({str(self._path)!r}, {sizes}{state})"

    def _file(self, name: str) -> h5py.File:
        file = self._files.pop(name, None) or open_shard(self._path / name)
        self._files[name] = file  # last used, last in the dictionary
        while len(self._files) > _OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        return file

    def _find(self, site: str | Site, tokens: str | TokenSelection) -> tuple[ArrayInfo, int]:
        place = site if isinstance(site, Site) else Site.parse(site)
        component = f"cross.{place.component}" if place.cross else place.component
        family = self._family(place.stack, component)
        selection = str(tokens if isinstance(tokens, TokenSelection) else TokenSelection.parse(tokens))
        info = self._by_key.get((place.stack, component, selection))
        if info is None:
            there = ", ".join(f"'{a.tokens}'" for a in family)
            msg = (
                f"token selection '{selection}' of site '{place}' not in store: {there} were traced; "
                f"trace again with tokens=['{selection}']"
            )
            raise SiteError(msg)
        if place.layer not in info.layers:
            msg = (
                f"site '{place}' not in store: layers {_ranges(info.layers)} were traced; "
                f"trace again with sites=['{place}'] if the model has it"
            )
            raise SiteError(msg)
        return info, info.layers.index(place.layer)

    def _family(self, stack: str, component: str) -> list[ArrayInfo]:
        family = [a for a in self.arrays if (a.stack, a.component) == (stack, component)]
        if not family:
            name = f"{stack}.{component}"
            msg = f"'{name}' not in store: {self._what_there_is()}; trace again with sites=['{component}']"
            raise SiteError(msg)
        return family

    def _what_there_is(self) -> str:
        names = dict.fromkeys(f"{a.stack}.{a.component}" for a in self.arrays)
        return f"{', '.join(names)} were traced"


def _sealed_shards(path: Path) -> list[str]:
    if path.is_file():
        msg = f"{path} is a file: an activation store is a folder of shard-<worker>-<n>.h5 files with a manifest"
        raise StoreError(msg)
    if not path.is_dir():
        msg = f"no activation store at {path}: there is no such folder; trace into it first"
        raise StoreError(msg)
    there = sorted(p.name for p in path.iterdir())
    shards = sorted((n for n in there if shard_numbers(n)), key=lambda n: shard_numbers(n) or (0, 0))
    if not shards and MANIFEST not in there:
        unfinished = [n for n in there if n.startswith("shard-")]
        other = [n for n in there if n.endswith((".h5", ".hdf5"))]
        found = "the folder is empty" if not there else f"the folder holds {', '.join(there[:5])}"
        if unfinished:
            found = f"a run has begun, but sealed no shard yet ({unfinished[0]}); run it again to the end"
        elif other:
            found = f"{other[0]} is plain HDF5 that is not a store's"
        msg = f"no activation store at {path}: {found}"
        raise StoreError(msg)
    return shards


def _check_same(path: Path, first: tuple[Schema, Mapping[str, Any]], this: tuple[Schema, Mapping[str, Any]]) -> None:
    found = difference(comparable(*first), comparable(*this))
    if found is not None:
        field, old, new = found
        msg = f"{path}: field '{field}' is {new!r}, but {old!r} in the rest of the store; this shard is from elsewhere"
        raise StoreError(msg)


def _head_slice(info: ArrayInfo, site: str, head: int | None) -> slice:
    if head is None:
        return slice(0, info.width)
    dim = info.head_dim
    if dim is None or info.n_heads is None:
        msg = f"site '{site}' has no heads, so head={head} cannot be read; heads are in 'z'"
        raise SiteError(msg)
    if not 0 <= head < info.n_heads:
        msg = f"head {head} of site '{site}' not in store: it has heads 0-{info.n_heads - 1}"
        raise SiteError(msg)
    return slice(head * dim, (head + 1) * dim)


def _ranges(layers: Sequence[int]) -> str:
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))
