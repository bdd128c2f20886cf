"""Reading a store: float32 arrays by site, token selection, head and rows, and the table of examples."""

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
from activation_store.reading.combined_folders import check_together
from activation_store.reading.contents import Contents
from activation_store.reading.folder import open_folder
from activation_store.reading.query import matching
from activation_store.reading.rows import Rows, as_range, resolve_rows, token_rows
from groundscope.core.errors import SiteError, StoreError
from lvlm.sites import Site, TokenSelection

if TYPE_CHECKING:
    from activation_store.torch_dataset import TorchView


class ActivationStore(Contents):
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
        super().__init__((open_folder(Path(path).absolute()),))

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
        Contents.__init__(merged, tuple(folder for store in stores for folder in store._folders))
        return merged

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
            As `read`; also where a label is not in the store, or holds text or lists.
        """
        from activation_store.torch_dataset import TorchView

        self._catalog.find(site, tokens, head)
        matching(self.columns, dict.fromkeys(labels), len(self), self._path)  # raises where one is not there
        texts = [name for name in labels if len(self) and self.columns[name].dtype == object]
        if texts:
            msg = (
                f"{self._path}: column '{texts[0]}' holds text or lists, and labels are numbers; "
                f"choose from {', '.join(self.labels) or 'the columns of numbers'}"
            )
            raise StoreError(msg)
        rows = np.asarray(resolve_rows(examples, len(self), self._path), np.int64)
        return TorchView(self, str(site), str(tokens), tuple(labels), head, rows)

    def tensor(self, name: str) -> np.ndarray:
        """Return a model-level array as it was given; raises `StoreError` naming those there are."""
        return read_tensor(self._beside(), name)

    def close(self) -> None:
        """Let go of the files; reading opens them again."""
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # Open files stay in their process: a worker of a DataLoader opens its own.
        return _open_all, (tuple(str(folder.path) for folder in self._folders),)

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


def _open_all(paths: Sequence[str]) -> ActivationStore:
    first, *others = paths
    return ActivationStore(first).merge(*others) if others else ActivationStore(first)
