"""Read a store: float32 arrays by site, token selection, head and rows, and the example table."""

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

from activation_store.format.columns import column_digest, join_columns
from activation_store.format.encoding import Column
from activation_store.format.hdf5_safety import screen
from activation_store.format.model_tensors import read_tensor, tensor_names
from activation_store.format.ragged import Ragged
from activation_store.format.schema import ArrayInfo, Schema, is_label
from activation_store.format.shard import DAMAGE, LAST_UNSEALED, SHARD_KIND, reading
from activation_store.reading.catalog import Catalog
from activation_store.reading.folder import Folder, OpenShard, check_mergeable, open_folder, provenance_of
from activation_store.reading.query import find_rows
from activation_store.reading.rows import RowSelection, as_range, resolve_rows, token_rows
from activation_store.row_input import RowInput, row_input
from concepts.label_names import is_label_name
from groundscope.core.errors import SiteError, StoreError
from groundscope.core.files import canonical_json, too_many_files
from groundscope.core.text import format_count
from lvlm.sites import Site
from lvlm.token_selection import TokenSelection

if TYPE_CHECKING:
    import pandas as pd

    from activation_store.mention_rows import MentionRows
    from activation_store.torch_dataset import StoreDataset
    from concepts.schema import ConceptDataset

try:
    import resource
except ImportError:  # not a Unix
    resource = None

_OPEN_FILES = 64
"""Maximum number of open shards of a store; a quarter of the process's file limit if that is less."""


class ActivationStore:
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

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter
    >>> info = ArrayInfo("decoder", "resid_post", "last", n_layers=2, width=3)
    >>> table = {"id": ["a", "b"], "group": ["image1", "image2"], "question": ["Is it a cat?"] * 2}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with StoreWriter(folder, Schema((info,)), {"model": "example"}) as writer:
    ...         writer.append({info.key: np.ones((2, 2, 3), np.float32)}, {**table, "object:cat": [1, 0]})
    ...     store = ActivationStore(folder)
    ...     print(store.read("decoder.L1.resid_post", "last", examples=store.select({"object:cat": 1})))
    ...     print(store.frame()["group"].tolist(), store.labels)
    [[1. 1. 1.]]
    ['image1', 'image2'] ('object:cat',)
    """

    def __init__(self, path: str | Path) -> None:
        self._set_folders((open_folder(Path(path).absolute()),))

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
        """The arrays of activations, sorted by stack, component and token selection; those of reductions are `reductions`."""
        return tuple(a for a in self._schema.arrays if not a.reduction)

    @property
    def reductions(self) -> tuple[ArrayInfo, ...]:
        """The arrays of reduced tokens (``trace(…, reduce=…)``); `ArrayInfo.values` names the values along their width."""
        return tuple(a for a in self._schema.arrays if a.reduction)

    @property
    def dtype(self) -> str:
        """The storage dtype: float32, float16 or bfloat16; reading returns float32."""
        return self._schema.dtype

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The provenance that the tracer recorded."""
        return self._provenance

    @property
    def input(self) -> RowInput:
        """What the rows have seen: ``both`` (image and text), ``text`` or ``image`` alone; ``both`` for older stores."""
        return row_input(self)

    @property
    def schema(self) -> Schema:
        """Arrays, dtype and compression, as a writer requires them."""
        return self._schema

    def shards(self) -> Iterator[OpenShard]:
        """Yield the sealed shards in order; the least recently used are closed when too many are open."""
        return (self._shard(index) for index in range(len(self._shards)))

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest; for an incomplete store, of its array digests; for a merged store, of its folders' digests.

        After `with_labels`, of this digest and the labels.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digests = [folder.digest() for folder in self._folders]
        own = digests[0] if len(digests) == 1 else hashlib.sha256(canonical_json(digests).encode()).hexdigest()
        if not self._joined:
            return own
        labels = {name: column_digest(values) for name, values in self._joined.items()}
        return hashlib.sha256(canonical_json([own, labels]).encode()).hexdigest()

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
        columns = {**join_columns(parts), **self._joined}
        for values in columns.values():
            values.setflags(write=False)
        return MappingProxyType(columns)

    @property
    def labels(self) -> tuple[str, ...]:
        """Concepts with a label column, in order: columns of numbers that are no field of an example."""
        return tuple(
            name
            for name, values in self.columns.items()
            if is_label(name) or (is_label_name(name) and values.dtype != object)
        )

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

    def with_labels(self, labels: pd.DataFrame | ConceptDataset, *, classes: Sequence[str] = ()) -> ActivationStore:
        """Return this store with label columns joined by example id; nothing is traced or written.

        The result equals a store that was traced with these labels.

        Parameters
        ----------
        labels
            A data frame with a column ``id`` and label columns as in `concepts.loaders.table`: yes or no, texts (classes) or
            numbers, empty for examples without a label; columns that are fields of an example are ignored. Or a dataset with
            labels. Rows of other examples are ignored, examples without a row have no label, and columns of the same name are
            replaced.
        classes
            Columns whose numbers are names of classes.

        Raises
        ------
        StoreError
            If the frame has no column ``id``, no label column, a repeated id, or no id of this store.
        DataError, ConfigError
            As `concepts.loaders.table`, for a column of mixed types and unknown `classes`.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np
        >>> import pandas as pd
        >>> from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter
        >>> info = ArrayInfo("decoder", "resid_post", "last", n_layers=1, width=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with StoreWriter(folder, Schema((info,)), {"model": "example"}) as writer:
        ...         writer.append({info.key: np.ones((2, 1, 3), np.float32)}, {"id": ["a", "b"], "group": ["x", "y"]})
        ...     mine = pd.DataFrame({"id": ["b", "a"], "place": ["street", "room"], "blurred": ["yes", None]})
        ...     store = ActivationStore(folder).with_labels(mine)
        ...     print(store.labels, store.frame()["place:room"].tolist(), store.frame()["blurred"].tolist())
        ('blurred', 'place:room', 'place:street') [True, False] [nan, 1.0]
        """
        from activation_store.joined_labels import join_labels

        ids = [str(i) for i in self.columns["id"]] if len(self) else []
        return self._with_columns(join_labels(ids, labels, classes=classes))

    def _with_columns(self, columns: Mapping[str, Column]) -> ActivationStore:
        joined = ActivationStore.__new__(ActivationStore)
        joined._set_folders(self._folders)
        joined._joined = {**self._joined, **columns}
        return joined

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
        """Return the number of traced attention heads of a stack; raise `SiteError` if no z was traced in it."""
        return len(self._catalog.heads(stack))

    def heads(self, stack: str) -> tuple[int, ...]:
        """Return the numbers of the traced attention heads of a stack; raise `SiteError` if no z was traced in it."""
        return self._catalog.heads(stack)

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
        if any(store._joined for store in stores):
            msg = "stores with joined labels cannot be merged; merge the stores first, then join the labels by with_labels"
            raise StoreError(msg)
        check_mergeable([(s._folders[0], s.columns["id"].tolist() if len(s) else []) for s in stores])
        merged = ActivationStore.__new__(ActivationStore)
        merged._set_folders(tuple(folder for store in stores for folder in store._folders))
        return merged

    def read(
        self,
        site: str | Site,
        tokens: str | TokenSelection,
        head: int | None = None,
        examples: RowSelection | None = None,
        *,
        reduction: str = "",
    ) -> np.ndarray:
        """Read the activations of one site; only the requested layer, head and rows are read from the files.

        Parameters
        ----------
        site
            A site, ``decoder.L3.z``.
        tokens
            A token selection, ``last``.
        head
            The number of one head of z (or of q, k, v), as in the model also if only some heads were traced.
        examples
            Rows: a slice, a boolean mask of all examples, or row numbers in any order; all by default.
        reduction
            Name of a reduction: read its K values (`reductions`) instead of activations.

        Returns
        -------
        float32 [n, D]; [n, head_dim] with `head`, [n, K] with `reduction`. A row is NaN where the token selection was empty.

        Raises
        ------
        SiteError
            If the site, token selection, head or reduction is not in the store.
        StoreError
            If `examples` does not fit the store, or a shard cannot be read.
        """
        info, layer, columns = self._catalog.find(site, tokens, head, reduction)
        if info.ragged:
            rows = "mentions().read(…)" if TokenSelection.parse(info.tokens).role == "mention" else "ragged(…)"
            msg = f"'{info.tokens}' of site '{site}' has many tokens per example; use {rows}"
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
        *,
        reduction: str = "",
    ) -> Ragged:
        """Read every token of an ``:all`` selection (``image:all``); parameters and errors as in `read`.

        Returns
        -------
        Ragged
            ``values`` float32 [T, D] (head_dim with `head`, K with `reduction`) and ``offsets`` [n+1];
            item i is the array [T_i, D] of example i.
        """
        info, layer, columns = self._catalog.find(site, tokens, head, reduction)
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

    def mentions(self) -> MentionRows:
        """Return the tokens of mentions (``mention:first``, …) as a table with one row per mention, for probes.

        Raises
        ------
        SiteError
            If no tokens of mentions were traced.
        """
        from activation_store.mention_rows import MentionRows

        return MentionRows(self)

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
    ) -> StoreDataset:
        """Return the store as a `torch.utils.data.Dataset` of (activation float32 [D], labels float32 [K]).

        Items are read on access; a `DataLoader` reads a whole batch at once.

        Raises
        ------
        SiteError, StoreError
            As `read`; also where a label is not in the store, or holds text or lists.
        """
        from activation_store.torch_dataset import StoreDataset

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
        return StoreDataset(self, str(site), str(tokens), tuple(labels), head, rows)

    def tensor(self, name: str) -> np.ndarray:
        """Return a model-level array; raise `StoreError`, which lists the names, if it is missing."""
        return read_tensor(self._tensor_folder(), name)

    def close(self) -> None:
        """Close all files; the next read opens them again."""
        self._open.clear()

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        state = "" if self.complete else ", not complete: only sealed shards"
        where = str(self._path) if len(self._folders) == 1 else f"{self._path} and {len(self._folders) - 1} more"
        sizes = f"{format_count(len(self), 'example')}, {format_count(len(self.arrays), 'array')}, {self.dtype}"
        return f"ActivationStore({where!r}, {sizes}{state})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # Open files are not shared between processes: each DataLoader worker opens its own.
        return _open_all, (tuple(str(folder.path) for folder in self._folders), self._joined)

    def _set_folders(self, folders: tuple[Folder, ...]) -> None:
        self._folders = folders
        self._joined: Mapping[str, Column] = {}
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


def _open_all(paths: Sequence[str], joined: Mapping[str, Column]) -> ActivationStore:
    first, *others = paths
    store = ActivationStore(first).merge(*others) if others else ActivationStore(first)
    return store._with_columns(joined) if joined else store


def _open_files() -> int:
    if resource is None:
        return _OPEN_FILES
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _OPEN_FILES if limit == resource.RLIM_INFINITY else max(1, min(_OPEN_FILES, limit // 4))
