"""Reading a store: float32 arrays by site, token selection, head and rows, and the table of examples."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from activation_store.catalog import Catalog
from activation_store.columns import join_columns
from activation_store.encoding import Column
from activation_store.layout import ArrayInfo, Schema, canonical_json, is_label
from activation_store.opened import Folder, OpenShard, open_folder
from activation_store.query import matching
from activation_store.ragged import Ragged
from activation_store.rows import Rows, as_range, resolve_rows, token_rows
from activation_store.shard import DAMAGE, reading
from activation_store.tensors import read_tensor, tensor_names
from activation_store.together import check_together, provenance_of
from concepts.errors import SiteError, StoreError
from lvlm.sites import Site, TokenSelection

if TYPE_CHECKING:
    import pandas as pd

    from activation_store.torch_view import TorchView

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
        self._hold((open_folder(Path(path)),))

    def _hold(self, folders: tuple[Folder, ...]) -> None:
        self._folders = folders
        self._path = folders[0].path
        self._schema = folders[0].schema
        self._provenance = MappingProxyType(provenance_of(folders))
        self._shards = tuple(shard for folder in folders for shard in folder.shards)
        # [shards + 1]: first row of each, and the end; plain numbers, as finding a head takes no longer than looking here.
        self._starts = list(accumulate((rows for _, rows in self._shards), initial=0))
        self._catalog = Catalog(self._schema.arrays)
        self._open: dict[int, OpenShard] = {}

    def merge(self, *others: ActivationStore | str | Path) -> ActivationStore:
        """Return this store and others as one, this one's rows first; nothing is copied.

        ``python -m activation_store merge`` writes what this returns into a folder of its own.

        Raises
        ------
        StoreError
            Where they differ in arrays, dtype, model or anything else but the dataset (names the field), or an example
            is in two of them.
        """
        stores = [self, *(o if isinstance(o, ActivationStore) else ActivationStore(o) for o in others)]
        check_together([(s._folders[0], s.columns["id"].tolist() if len(s) else []) for s in stores])
        merged = ActivationStore.__new__(ActivationStore)
        merged._hold(tuple(folder for store in stores for folder in store._folders))
        return merged

    # ---- what there is

    @property
    def path(self) -> Path:
        """Folder of the store; of several merged ones the first."""
        return self._path

    @property
    def folders(self) -> tuple[Folder, ...]:
        """What each folder holds: one, but for several merged stores."""
        return self._folders

    @property
    def complete(self) -> bool:
        """Whether the run that wrote it finished; otherwise only the shards sealed so far are read."""
        return all(folder.complete for folder in self._folders)

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
    def schema(self) -> Schema:
        """Arrays, dtype and compression, as a writer takes them."""
        return self._schema

    def shards(self) -> Iterator[OpenShard]:
        """Yield the sealed shards in order, each open until many others were asked for."""
        return (self._shard(index) for index in range(len(self._shards)))

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest; of a store not complete, of the digests of its arrays; of merged ones, of theirs."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digests = [folder.digest() for folder in self._folders]
        return digests[0] if len(digests) == 1 else hashlib.sha256(canonical_json(digests).encode()).hexdigest()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the model-level arrays kept beside the examples."""
        return tensor_names(self._beside())

    @cached_property
    def columns(self) -> Mapping[str, Column]:
        """The example table as read-only columns [N]: text as objects, labels float32 with NaN where undefined."""
        parts = []
        for index, (path, rows) in enumerate(self._shards):
            shard = self._shard(index)
            with reading(path):
                parts.append((rows, shard.columns()))
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

    def select(self, where: Mapping[str, Any] | None = None, /, **columns: Any) -> np.ndarray:
        """Return the rows of the examples whose columns have the given values, to be used as `examples`.

        Parameters
        ----------
        where
            Value by column, for names that Python has no keyword for: ``{"attribute:green": True}``.
        columns
            Value by column: ``split="neutral"``. A list of values means any of them; None means undefined (of text:
            empty). All conditions must hold.

        Returns
        -------
        int64 [n], increasing.

        Raises
        ------
        StoreError
            Where a label or column is not in the store, or cannot be compared with the value.
        """
        return matching(self.columns, {**(where or {}), **columns}, len(self), self._path)

    def has(self, stack: str, component: str, tokens: str | TokenSelection) -> bool:
        """Whether an array was traced."""
        return self._catalog.has(stack, component, tokens)

    def layers(self, stack: str, component: str) -> int:
        """Return how many layers were traced; raises `SiteError` where none."""
        return self._catalog.family(stack, component)[0].n_layers

    def width(self, stack: str, component: str) -> int:
        """Return the values kept for each layer and example; raises `SiteError` where the component was not traced."""
        return self._catalog.family(stack, component)[0].width

    def n_heads(self, stack: str) -> int:
        """Return the number of attention heads of a stack; raises `SiteError` where no z was traced in it."""
        return self._catalog.n_heads(stack)

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
        info, layer, columns = self._catalog.find(site, tokens, head)
        if info.ragged:
            msg = f"'{info.tokens}' of site '{site}' has many tokens an example: read it with ragged(…)"
            raise SiteError(msg)
        rows = resolve_rows(examples, len(self), self._path)
        out = np.empty((len(rows), columns.stop - columns.start), np.float32)
        path = self._path
        try:
            for index, within, place in self._by_shard(rows):
                path = self._shards[index][0]
                array = self._shard(index).array(info)
                if isinstance(place, slice):
                    array.read_into(out[place], within, layer, columns)
                else:
                    part = np.empty((len(place), out.shape[1]), np.float32)
                    array.read_into(part, within, layer, columns)
                    out[place] = part
        except (OSError, RuntimeError, *DAMAGE):
            with reading(path):  # says what it means for the shard
                raise
        return out

    def ragged(
        self,
        site: str | Site,
        tokens: str | TokenSelection,
        head: int | None = None,
        examples: Rows | None = None,
    ) -> Ragged:
        """Read every token of a selection that keeps them all (``image:all``); parameters and errors as of `read`.

        Returns
        -------
        Ragged
            ``values`` float32 [T, D] (or head_dim) and ``offsets`` [n+1]; item i is the array [T_i, D] of example i.
        """
        info, layer, columns = self._catalog.find(site, tokens, head)
        if not info.ragged:
            msg = f"'{info.tokens}' of site '{site}' is one vector an example: read it with read(…)"
            raise SiteError(msg)
        rows = resolve_rows(examples, len(self), self._path)
        parts: dict[int, np.ndarray] = {}
        lengths = np.zeros(len(rows), np.int64)
        for index, within, place in self._by_shard(rows):
            with reading(self._shards[index][0]):
                array = self._shard(index).array(info)
                if array.offsets is None:
                    raise KeyError(info.name)
                examples_here, at = np.asarray(within), np.arange(len(rows))[place]
                tokens_here = token_rows(array.offsets, examples_here)
                part = np.empty((len(tokens_here), columns.stop - columns.start), np.float32)
                array.read_into(part, as_range(tokens_here), layer, columns)
                lengths[at] = counts = np.diff(array.offsets)[examples_here]
                parts |= dict(zip(at.tolist(), np.split(part, np.cumsum(counts)[:-1]), strict=True))
        ordered = [parts[i] for i in range(len(rows))]
        empty = np.empty((0, columns.stop - columns.start), np.float32)
        return Ragged(np.concatenate([empty, *ordered]), np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))

    def batches(
        self,
        site: str | Site,
        tokens: str | TokenSelection,
        size: int = 1024,
        head: int | None = None,
        examples: Rows | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield rows int64 [b] and their activations float32 [b, D], `size` examples at a time; as `read` otherwise."""
        if size < 1:
            msg = f"size={size}: a batch needs at least 1 example"
            raise StoreError(msg)
        self._catalog.find(site, tokens, head)
        rows = np.asarray(resolve_rows(examples, len(self), self._path), np.int64)
        parts = (rows[at : at + size] for at in range(0, len(rows), size))
        return ((some, self.read(site, tokens, head, some)) for some in parts)

    def torch(
        self,
        site: str | Site,
        tokens: str | TokenSelection,
        labels: Sequence[str] = (),
        head: int | None = None,
        examples: Rows | None = None,
    ) -> TorchView:
        """Return the store as a `torch.utils.data.Dataset` of (activation float32 [D], labels float32 [K]).

        Nothing is read before an item is asked for; a `DataLoader` asks for a batch at once.

        Raises
        ------
        SiteError, StoreError
            As `read`; also where a label is not in the store.
        """
        from activation_store.torch_view import TorchView

        self._catalog.find(site, tokens, head)
        matching(self.columns, dict.fromkeys(labels), len(self), self._path)  # raises where one is not there
        rows = np.asarray(resolve_rows(examples, len(self), self._path), np.int64)
        return TorchView(self, str(site), str(tokens), tuple(labels), head, rows)

    def tensor(self, name: str) -> np.ndarray:
        """Return a model-level array as it was given; raises `StoreError` naming those there are."""
        return read_tensor(self._beside(), name)

    def close(self) -> None:
        """Let go of the files; reading opens them again."""
        self._open.clear()

    def __len__(self) -> int:
        return self._starts[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self.complete else ", not complete: only what is sealed so far"
        where = str(self._path) if len(self._folders) == 1 else f"{self._path} and {len(self._folders) - 1} more"
        sizes = f"{len(self)} examples, {len(self.arrays)} arrays, {self.dtype}"
        return f"ActivationStore({where!r}, {sizes}{state})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Open files stay in their process: a worker of a DataLoader opens its own.
        return _open_all, (tuple(str(folder.path) for folder in self._folders),)

    def _beside(self) -> Path:
        return next((f.path for f in self._folders if tensor_names(f.path)), self._path)

    def _by_shard(self, rows: np.ndarray | range) -> Iterator[tuple[int, np.ndarray | range, slice | np.ndarray]]:
        """Yield shard, its rows, and where these stand among `rows`."""
        if not len(rows):
            return
        starts = self._starts
        if isinstance(rows, range):
            for index in range(bisect_right(starts, rows.start) - 1, len(self._shards)):
                begin, end = max(rows.start, starts[index]), min(rows.stop, starts[index + 1])
                if begin >= rows.stop:
                    return
                if begin < end:
                    within = range(begin - starts[index], end - starts[index])
                    yield index, within, slice(begin - rows.start, end - rows.start)
            return
        shard_of = np.searchsorted(starts, rows, side="right") - 1
        for index in np.unique(shard_of).tolist():
            wanted = np.flatnonzero(shard_of == index)
            yield index, as_range(rows[wanted] - starts[index]), wanted

    def _shard(self, index: int) -> OpenShard:
        shard = self._open.pop(index, None) or OpenShard(self._shards[index][0], self._schema)
        self._open[index] = shard  # last used, last in the dictionary
        while len(self._open) > _OPEN_FILES:
            self._open.pop(next(iter(self._open)))
        return shard


def _open_all(paths: Sequence[str]) -> ActivationStore:
    first, *others = paths
    return ActivationStore(first).merge(*others) if others else ActivationStore(first)
