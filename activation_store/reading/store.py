"""Read a store: float32 arrays by site, token selection, head and rows, and the example table."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from activation_store.format.model_tensors import read_tensor
from activation_store.format.ragged import Ragged
from activation_store.format.shard import DAMAGE, reading
from activation_store.reading.combined_folders import check_mergeable
from activation_store.reading.contents import Contents
from activation_store.reading.folder import open_folder
from activation_store.reading.query import find_rows
from activation_store.reading.rows import RowSelection, as_range, resolve_rows, token_rows
from groundscope.core.errors import SiteError, StoreError
from lvlm.sites import Site
from lvlm.token_selection import TokenSelection

if TYPE_CHECKING:
    from activation_store.torch_dataset import TorchView


class ActivationStore(Contents):
    """A store opened for reading; it needs no model, and memory only for the requested arrays.

    Parameters
    ----------
    path
        Folder of the store. If its run is in progress or was killed, only its sealed shards are read; `complete` is
        then False.

    Raises
    ------
    StoreError
        If there is no store, a file is missing or damaged, or the layout version is newer.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__((open_folder(Path(path).absolute()),))

    def merge(self, *others: ActivationStore | str | Path) -> ActivationStore:
        """Return this store and others as one, this one's rows first; nothing is copied.

        ``python -m activation_store merge`` writes the merged store into a new folder.

        Raises
        ------
        StoreError
            If they differ in arrays, dtype, model or any other field except the dataset (the message names the field), or
            an example is in two of them.
        """
        stores = [self, *(o if isinstance(o, ActivationStore) else ActivationStore(o) for o in others)]
        check_mergeable([(s._folders[0], s.columns["id"].tolist() if len(s) else []) for s in stores])
        merged = ActivationStore.__new__(ActivationStore)
        Contents.__init__(merged, tuple(folder for store in stores for folder in store._folders))
        return merged

    def read(
        self,
        site: str | Site,
        tokens: str | TokenSelection,
        head: int | None = None,
        examples: RowSelection | None = None,
    ) -> np.ndarray:
        """Read the activations of one site; only the requested layer, head and rows are read from the files.

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
            If the site, token selection or head is not in the store.
        StoreError
            If `examples` does not fit the store, or a shard cannot be read.
        """
        info, layer, columns = self._catalog.find(site, tokens, head)
        if info.ragged:
            msg = f"'{info.tokens}' of site '{site}' has many tokens per example; use ragged(…)"
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
            with reading(path):  # converts the error into one that names the shard
                raise
        return out

    def ragged(
        self,
        site: str | Site,
        tokens: str | TokenSelection,
        head: int | None = None,
        examples: RowSelection | None = None,
    ) -> Ragged:
        """Read every token of an ``:all`` selection (``image:all``); parameters and errors as in `read`.

        Returns
        -------
        Ragged
            ``values`` float32 [T, D] (or head_dim) and ``offsets`` [n+1]; item i is the array [T_i, D] of example i.
        """
        info, layer, columns = self._catalog.find(site, tokens, head)
        if not info.ragged:
            msg = f"'{info.tokens}' of site '{site}' has one vector per example; use read(…)"
            raise SiteError(msg)
        rows = resolve_rows(examples, len(self), self._path)
        parts: dict[int, np.ndarray] = {}
        lengths = np.zeros(len(rows), np.int64)
        for index, within, place in self._by_shard(rows):
            with reading(self._shards[index][0]):
                array = self._shard(index).array(info)
                if array.offsets is None:
                    raise KeyError(info.name)
                shard_rows, at = np.asarray(within), np.arange(len(rows))[place]
                shard_tokens = token_rows(array.offsets, shard_rows)
                part = np.empty((len(shard_tokens), columns.stop - columns.start), np.float32)
                array.read_into(part, as_range(shard_tokens), layer, columns)
                lengths[at] = counts = np.diff(array.offsets)[shard_rows]
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
        examples: RowSelection | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield rows int64 [b] and their activations float32 [b, D], `size` examples at a time; other options as in `read`."""
        if size < 1:
            msg = f"size={size}: the batch size must be at least 1"
            raise StoreError(msg)
        self._catalog.find(site, tokens, head)
        rows = np.asarray(resolve_rows(examples, len(self), self._path), np.int64)
        parts = (rows[at : at + size] for at in range(0, len(rows), size))
        return ((part, self.read(site, tokens, head, part)) for part in parts)

    def torch(
        self,
        site: str | Site,
        tokens: str | TokenSelection,
        labels: Sequence[str] = (),
        head: int | None = None,
        examples: RowSelection | None = None,
    ) -> TorchView:
        """Return the store as a `torch.utils.data.Dataset` of (activation float32 [D], labels float32 [K]).

        Items are read on access; a `DataLoader` reads a whole batch at once.

        Raises
        ------
        SiteError, StoreError
            As `read`; also where a label is not in the store, or holds text or lists.
        """
        from activation_store.torch_dataset import TorchView

        self._catalog.find(site, tokens, head)
        find_rows(self.columns, dict.fromkeys(labels), len(self), self._path)  # raises an error if one is missing
        texts = [name for name in labels if len(self) and self.columns[name].dtype == object]
        if texts:
            msg = (
                f"{self._path}: column '{texts[0]}' holds text or lists, but labels must be numbers; "
                f"choose from {', '.join(self.labels) or 'the columns of numbers'}"
            )
            raise StoreError(msg)
        rows = np.asarray(resolve_rows(examples, len(self), self._path), np.int64)
        return TorchView(self, str(site), str(tokens), tuple(labels), head, rows)

    def tensor(self, name: str) -> np.ndarray:
        """Return a model-level array; raise `StoreError`, which lists the names, if it is missing."""
        return read_tensor(self._tensor_folder(), name)

    def close(self) -> None:
        """Close all files; the next read opens them again."""
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # Open files are not shared between processes: each DataLoader worker opens its own.
        return _open_all, (tuple(str(folder.path) for folder in self._folders),)

    def _by_shard(self, rows: np.ndarray | range) -> Iterator[tuple[int, np.ndarray | range, slice | np.ndarray]]:
        """Yield each shard's index, its rows within the shard, and their positions among `rows`."""
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
            positions = np.flatnonzero(shard_of == index)
            yield index, as_range(rows[positions] - starts[index]), positions


def _open_all(paths: Sequence[str]) -> ActivationStore:
    first, *others = paths
    return ActivationStore(first).merge(*others) if others else ActivationStore(first)
