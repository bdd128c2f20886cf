"""The contents of a store: its arrays, example table and provenance, and its shards, opened on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store.format.columns import join_columns
from activation_store.format.encoding import Column
from activation_store.format.model_tensors import tensor_names
from activation_store.format.schema import ArrayInfo, Schema, is_label
from activation_store.format.screening import screen
from activation_store.format.shard import LAST_UNSEALED, SHARD_KIND, reading
from activation_store.reading.catalog import Catalog
from activation_store.reading.combined_folders import provenance_of
from activation_store.reading.folder import Folder, OpenShard
from activation_store.reading.query import find_rows
from groundscope.core.errors import StoreError
from groundscope.core.files import canonical_json, too_many_files
from lvlm.token_selection import TokenSelection

if TYPE_CHECKING:
    import pandas as pd

try:
    import resource
except ImportError:  # not a Unix
    resource = None

_OPEN_FILES = 64
"""Maximum number of open shards of a store; a quarter of the process's file limit if that is less."""


class Contents:
    """The contents of a store in one or several folders; `ActivationStore` adds reading."""

    def __init__(self, folders: tuple[Folder, ...]) -> None:
        self._folders = folders
        self._path = folders[0].path
        self._schema = folders[0].schema
        self._provenance = MappingProxyType(provenance_of(folders))
        self._shards = tuple(shard for folder in folders for shard in folder.shards)
        # [shards + 1]: first row of each, and the end; plain numbers, because this lookup must be as fast as a head read.
        self._starts = list(accumulate((rows for _, rows in self._shards), initial=0))
        self._catalog = Catalog(self._schema.arrays)
        self._entries = tuple(folder.entries.get(path.name) for folder in folders for path, _ in folder.shards)
        self._open: dict[int, OpenShard] = {}
        self._screened = False

    @property
    def path(self) -> Path:
        """Folder of the store; for a merged store the first folder."""
        return self._path

    @property
    def folders(self) -> tuple[Folder, ...]:
        """The store's folders: one, or several for a merged store."""
        return self._folders

    @property
    def complete(self) -> bool:
        """Whether the run that wrote the store finished; otherwise only the shards sealed so far are read."""
        return all(folder.complete for folder in self._folders)

    @property
    def arrays(self) -> tuple[ArrayInfo, ...]:
        """The arrays of the store, sorted by stack, component and token selection."""
        return self._schema.arrays

    @property
    def dtype(self) -> str:
        """The storage dtype: float32, float16 or bfloat16; reading returns float32."""
        return self._schema.dtype

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The provenance that the tracer recorded."""
        return self._provenance

    @property
    def schema(self) -> Schema:
        """Arrays, dtype and compression, as a writer requires them."""
        return self._schema

    def shards(self) -> Iterator[OpenShard]:
        """Yield the sealed shards in order; the least recently used are closed when too many are open."""
        return (self._shard(index) for index in range(len(self._shards)))

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest; for an incomplete store, of its array digests; for a merged store, of its folders' digests."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digests = [folder.digest() for folder in self._folders]
        return digests[0] if len(digests) == 1 else hashlib.sha256(canonical_json(digests).encode()).hexdigest()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the model-level arrays."""
        return tensor_names(self._tensor_folder())

    @cached_property
    def columns(self) -> Mapping[str, Column]:
        """The example table as read-only columns [N]: text as objects, labels float32 with NaN where undefined."""
        parts: list[tuple[int, Mapping[str, Column]]] = []
        index = 0
        for folder in self._folders:
            table = folder.table()  # one file: opening thousands of shards takes minutes
            if table is not None:
                parts.append((sum(rows for _, rows in folder.shards), table))
            else:
                for number, (path, rows) in enumerate(folder.shards, start=index):
                    shard = self._shard(number)
                    with reading(path):
                        parts.append((rows, shard.columns()))
            index += len(folder.shards)
        columns = join_columns(parts)
        for values in columns.values():
            values.setflags(write=False)
        return MappingProxyType(columns)

    @property
    def labels(self) -> tuple[str, ...]:
        """Concepts with a label column, in order."""
        return tuple(name for name in self.columns if is_label(name))

    @property
    def examples(self) -> pd.DataFrame:
        """The example table, one row per example; the same as `frame()`."""
        return self.frame()

    def frame(self) -> pd.DataFrame:
        """Return the example table: id, group, question, …, a float32 column per concept (NaN: undefined)."""
        import pandas as pd

        return pd.DataFrame({name: values.copy() for name, values in self.columns.items()})

    def select(self, where: Mapping[str, Any] | None = None, /, **columns: Any) -> np.ndarray:
        """Return the rows of the examples whose columns have the given values, for use as `examples`.

        Parameters
        ----------
        where
            Value by column, for names that are not Python identifiers: ``{"attribute:green": True}``.
        columns
            Value by column: ``split="neutral"``. A list matches any of its values; None matches undefined values (for text:
            empty). All conditions must hold.

        Returns
        -------
        int64 [n], increasing.

        Raises
        ------
        StoreError
            If a label or column is not in the store, or cannot be compared with the value.
        """
        return find_rows(self.columns, {**(where or {}), **columns}, len(self), self._path)

    def has(self, stack: str, component: str, tokens: str | TokenSelection) -> bool:
        """Whether an array was traced."""
        return self._catalog.has(stack, component, tokens)

    def layers(self, stack: str, component: str) -> int:
        """Return the number of traced layers; raise `SiteError` if the component was not traced."""
        return self._catalog.family(stack, component)[0].n_layers

    def width(self, stack: str, component: str) -> int:
        """Return the number of values per layer and example; raise `SiteError` if the component was not traced."""
        return self._catalog.family(stack, component)[0].width

    def n_heads(self, stack: str) -> int:
        """Return the number of attention heads of a stack; raise `SiteError` if no z was traced in it."""
        return self._catalog.n_heads(stack)

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        state = "" if self.complete else ", not complete: only sealed shards"
        where = str(self._path) if len(self._folders) == 1 else f"{self._path} and {len(self._folders) - 1} more"
        sizes = f"{len(self)} examples, {len(self.arrays)} arrays, {self.dtype}"
        return f"ActivationStore({where!r}, {sizes}{state})"

    def _tensor_folder(self) -> Path:
        return next((f.path for f in self._folders if tensor_names(f.path)), self._path)

    def _shard(self, index: int) -> OpenShard:
        shard = self._open.pop(index, None)
        while shard is None:
            self._screen_unsealed_shards()
            path, entry = self._shards[index][0], self._entries[index]
            try:
                shard = OpenShard(path, self._schema, entry)
            except StoreError as error:
                if not self._open or not too_many_files(error.__cause__):
                    raise
                self._close_shards(len(self._open) // 2)
        self._open[index] = shard  # the dictionary is ordered by last use
        self._close_shards(_open_files())
        return shard

    def _close_shards(self, keep: int) -> None:
        while len(self._open) > keep:
            self._open.pop(next(iter(self._open)))

    def _screen_unsealed_shards(self) -> None:
        # One call for all files of older layout versions: they share one child process.
        if not self._screened:
            self._screened = True
            pairs = zip(self._shards, self._entries, strict=True)
            old = [path for (path, _), entry in pairs if entry is not None and entry.version <= LAST_UNSEALED]
            if old:
                with reading(old[0]):
                    screen(old, SHARD_KIND)


def _open_files() -> int:
    if resource is None:
        return _OPEN_FILES
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _OPEN_FILES if limit == resource.RLIM_INFINITY else max(1, min(_OPEN_FILES, limit // 4))
