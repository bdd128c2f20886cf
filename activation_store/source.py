"""The interface that analyses need of a store, and an implementation for arrays in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from activation_store.format.schema import ArrayInfo
from activation_store.row_input import RowInput, row_input
from groundscope.core.errors import SiteError, StoreError
from groundscope.core.text import format_count, nearest
from lvlm.sites import Site, parse_component
from lvlm.token_selection import TokenSelection

if TYPE_CHECKING:
    import pandas as pd

    from activation_store.reading.rows import RowSelection
    from concepts.schema import ConceptDataset


class ActivationSource(Protocol):
    """Activations by site, token selection and example, with the table of examples.

    `activation_store.ActivationStore` implements it. Probes and derivations of steering vectors accept any object with
    these members.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import ActivationSource, MemorySource
    >>> def count_arrays(source: ActivationSource) -> int:
    ...     return len(source.arrays)
    >>> count_arrays(MemorySource({"resid_post": np.zeros((1, 1, 2))}, {"id": ["a"], "group": ["g"]}))
    1
    """

    @property
    def arrays(self) -> Sequence[ArrayInfo]:
        """The arrays, one per stack, component and token selection."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the contents."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Origin of the activations; ``model`` has the name, the config hash and the weights digest."""
        ...

    def frame(self) -> pd.DataFrame:
        """Return the example table: id, group, and a label column per concept (NaN where undefined)."""
        ...

    def read(self, site: Any, tokens: Any, head: int | None = None, examples: RowSelection | None = None) -> np.ndarray:
        """Return float32 [n, D], or [n, head_dim] with `head`; a row is NaN if its token selection was empty."""
        ...


class MemorySource:
    """Activations in memory as an `ActivationSource`: for arrays that were recorded elsewhere, and for tests.

    Parameters
    ----------
    arrays
        Float [N, L, D] by component (``resid_post``, ``vision.z``, ``projector.out`` with L = 1), or by a tuple of component
        and token selection. A row is NaN where the token selection was empty.
    table
        Columns of N values: ``id`` (unique), ``group`` (the image or scene), and labels by concept, 0, 1 or NaN.
    tokens
        Token selection of arrays whose key names none.
    n_heads
        Number of heads of ``z``, whose D values are divided into heads of equal width.
    provenance
        Plain JSON about the origin; ``input`` says what the rows have seen: ``both``, ``text`` or ``image``.

    Raises
    ------
    SiteError
        If a component or token selection is unknown.
    StoreError
        If `id` or `group` is missing, ids repeat, or sizes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> table = {"id": ["a", "b"], "group": ["image1", "image2"], "object:cat": [1, 0]}
    >>> store = MemorySource({"resid_post": np.arange(8.0).reshape(2, 2, 2)}, table)
    >>> store.read("decoder.L1.resid_post", "last")
    array([[2., 3.],
           [6., 7.]], dtype=float32)
    """

    def __init__(
        self,
        arrays: Mapping[str | tuple[str, str], np.ndarray],
        table: Mapping[str, Any] | pd.DataFrame,
        *,
        tokens: str = "last",
        n_heads: int | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        import pandas as pd

        self._table = pd.DataFrame(table if isinstance(table, pd.DataFrame) else dict(table)).reset_index(drop=True)
        missing = [name for name in ("id", "group") if name not in self._table]
        if missing or self._table["id"].duplicated().any():
            problem = f"misses the column {missing[0]}" if missing else "repeats an id"
            msg = f"the example table {problem}; give a unique id and the group of each example"
            raise StoreError(msg)
        self._table["id"] = self._table["id"].astype(str)
        self._values: dict[tuple[str, str, str], np.ndarray] = {}
        infos = []
        for key, values in arrays.items():
            site, selection = key if isinstance(key, tuple) else (key, tokens)
            stack, component, _ = parse_component(site)
            x = np.asarray(values, dtype=np.float32)
            if x.ndim != 3 or len(x) != len(self._table):
                msg = (
                    f"'{site}' has shape {list(x.shape)}; give [N, layers, width] with N = "
                    f"{format_count(len(self._table), 'example')}"
                )
                raise StoreError(msg)
            heads = n_heads if component.endswith("z") else None
            info = ArrayInfo(stack, component, str(TokenSelection.parse(selection)), x.shape[1], x.shape[2], heads)
            infos.append(info)
            self._values[info.key] = x
        self._arrays = tuple(infos)
        self._provenance = MappingProxyType(dict(provenance or {}))
        digest = hashlib.sha256(str(self._table.to_json(orient="split", double_precision=15)).encode())
        for key, x in self._values.items():
            digest.update(repr((key, x.shape)).encode())
            digest.update(np.ascontiguousarray(x).data)
        self._digest = digest.hexdigest()

    @property
    def arrays(self) -> tuple[ArrayInfo, ...]:
        """The arrays, in the order in which they were given."""
        return self._arrays

    @property
    def digest(self) -> str:
        """SHA-256 of the table and all values."""
        return self._digest

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Origin of the activations."""
        return self._provenance

    @property
    def input(self) -> RowInput:
        """What the rows have seen, ``input`` of the provenance: ``both`` (image and text), ``text`` or ``image`` alone."""
        return row_input(self)

    def __len__(self) -> int:
        return len(self._table)

    def frame(self) -> pd.DataFrame:
        """Return a copy of the example table."""
        return self._table.copy()

    def with_labels(self, labels: pd.DataFrame | ConceptDataset, *, classes: Sequence[str] = ()) -> MemorySource:
        """Return these activations with label columns joined by example id; as `ActivationStore.with_labels`.

        Examples
        --------
        >>> import numpy as np
        >>> import pandas as pd
        >>> from activation_store import MemorySource
        >>> store = MemorySource({"resid_post": np.zeros((2, 1, 2))}, {"id": ["a", "b"], "group": ["x", "y"]})
        >>> labels = pd.DataFrame({"id": ["b", "a"], "blurred": ["yes", "no"]})
        >>> store.with_labels(labels).frame()["blurred"].tolist()
        [False, True]
        """
        from activation_store.joined_labels import join_labels

        columns = join_labels(self._table["id"].tolist(), labels, classes=classes)
        arrays: dict[str | tuple[str, str], np.ndarray] = {
            (f"{i.stack}.{i.component}", i.tokens): self._values[i.key] for i in self._arrays
        }
        heads = next((i.n_heads for i in self._arrays if i.n_heads), None)
        return MemorySource(arrays, self._table.assign(**columns), n_heads=heads, provenance=self._provenance)

    def read(
        self,
        site: str | Site,
        tokens: str | TokenSelection,
        head: int | None = None,
        examples: RowSelection | None = None,
    ) -> np.ndarray:
        """Return float32 [n, D], or [n, head_dim] with `head`; parameters and errors as in `ActivationStore.read`."""
        place = site if isinstance(site, Site) else Site.parse(site)
        component = f"cross.{place.component}" if place.cross else place.component
        key = (place.stack, component, str(tokens))
        info = next((info for info in self._arrays if info.key == key), None)
        if info is None or place.layer not in info.layers:
            names = [f"{i.stack}.{i.component} at {i.tokens}" for i in self._arrays]
            problem = f"layer {place.layer} of {place}" if info else f"{place.stack}.{component} at {tokens}"
            msg = f"{problem} not in this source; choose from {', '.join(names)}{nearest(problem, names)}"
            raise SiteError(msg)
        x = self._values[key][:, place.layer]
        if head is not None:
            if info.n_heads is None or info.head_dim is None or not 0 <= head < info.n_heads:
                msg = f"head {head} of {place} not in this source: it has {info.n_heads or 'no'} heads"
                raise SiteError(msg)
            x = x[:, head * info.head_dim : (head + 1) * info.head_dim]
        return (
            x.copy() if examples is None else x[np.asarray(examples) if not isinstance(examples, slice) else examples]
        )
