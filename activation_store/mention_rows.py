"""The tokens of mentions in a store as a table with one row per mention."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store.format.schema import ArrayInfo
from activation_store.reading.rows import resolve_rows
from groundscope.core.errors import SiteError
from groundscope.core.text import format_count
from lvlm.sites import Site
from lvlm.token_selection import TokenSelection

if TYPE_CHECKING:
    import pandas as pd

    from activation_store.reading.rows import RowSelection
    from activation_store.reading.store import ActivationStore

LABEL = "object:hallucinated"
"""Label of the rows: 1 where the mentioned object is not in the image, 0 where it is, NaN where that is unknown."""


class MentionRows:
    """One row for each object that a written text mentions, as an `ActivationSource`; from `ActivationStore.mentions`.

    The table has the columns ``id`` (that of the example, a slash and the number of the mention), ``group``, the label
    ``object:hallucinated``, and ``mention:example``, ``mention:noun``, ``mention:number`` (counted from 0 in its text),
    ``mention:place`` (its first character divided by the length of the text), ``mention:log_p`` and ``mention:first_log_p``
    (log-probability of its tokens, and of the first of them, in nats).

    Parameters
    ----------
    store
        A store with arrays of ``mention:before``, ``mention:first`` or ``mention:last``.

    Raises
    ------
    SiteError
        If no tokens of mentions were traced.

    Examples
    --------
    >>> import tempfile
    >>> import groundscope as gs
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(20, splits=["caption"])[:2]
    >>> texts = {data[0].id: "a red airplane and a red dog.", data[1].id: "a red dog."}
    >>> written = gs.with_mentions(data, texts, vocabulary=["dog"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = gs.trace(model, written, ["resid_post"], ["mention:first"], folder).mentions()
    ...     x = rows.read("decoder.L3.resid_post", "mention:first")
    >>> x.shape, rows.frame()[["mention:noun", "object:hallucinated"]].values.tolist()
    ((3, 192), [['airplane', 0.0], ['dog', 1.0], ['dog', 1.0]])
    """

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        arrays = (a for a in store.arrays if TokenSelection.parse(a.tokens).role == "mention")
        self._arrays = tuple(replace(a, ragged=False) for a in arrays)
        if not self._arrays:
            msg = (
                f"{store.path} has no tokens of mentions; trace 'mention:before', 'mention:first' or 'mention:last' of examples "
                "from concepts.with_mentions"
            )
            raise SiteError(msg)

    def __repr__(self) -> str:
        return (
            f"MentionRows({format_count(len(self), 'mention')} of {format_count(len(self._store), 'text')}, "
            f"{format_count(len(self._arrays), 'array')})"
        )

    def __len__(self) -> int:
        return len(self._table["id"])

    @property
    def arrays(self) -> tuple[ArrayInfo, ...]:
        """The arrays of mentions, one vector per mention."""
        return self._arrays

    @property
    def digest(self) -> str:
        """SHA-256 that identifies the contents."""
        return hashlib.sha256(f"mentions {self._store.digest}".encode()).hexdigest()

    @property
    def provenance(self) -> Mapping[str, Any]:
        """The provenance of the store."""
        return self._store.provenance

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the rows."""
        return (LABEL,)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the model-level arrays."""
        return self._store.tensors

    def tensor(self, name: str) -> np.ndarray:
        """Return a model-level array, as `ActivationStore.tensor`."""
        return self._store.tensor(name)

    def frame(self) -> pd.DataFrame:
        """Return the table of mentions."""
        import pandas as pd

        return pd.DataFrame({name: values.copy() for name, values in self._table.items()})

    def read(
        self,
        site: str | Site,
        tokens: str | TokenSelection,
        head: int | None = None,
        examples: RowSelection | None = None,
    ) -> np.ndarray:
        """Return float32 [n, D], or [n, head_dim] with `head`: one row per mention; parameters as in `ActivationStore.read`.

        Raises
        ------
        SiteError
            If the site, token selection or head is not in the store.
        """
        values = self._store.ragged(site, tokens, head).values
        rows = resolve_rows(examples, len(self), self._store.path)
        return values if isinstance(rows, range) and len(rows) == len(values) else values[np.asarray(rows, np.int64)]

    @cached_property
    def _table(self) -> dict[str, np.ndarray]:
        columns = self._store.columns
        counts = np.array([len(nouns) for nouns in columns["mention:noun"]], np.int64)
        example = np.repeat(np.arange(len(counts)), counts)
        number = np.concatenate([np.zeros(0, np.int64), *(np.arange(count) for count in counts)])
        present = _joined(columns["mention:present"])
        starts = _joined([np.reshape(span, (-1, 2))[:, 0] for span in columns["mention:characters"]])
        lengths = np.array([max(1, len(text)) for text in columns["prefix"]], np.float64)
        ids, groups = columns["id"][example], columns["group"][example]
        nouns = np.array([noun for listed in columns["mention:noun"] for noun in listed], object)
        return {
            "id": np.array([f"{i}/{k}" for i, k in zip(ids, number, strict=True)], object),
            "group": groups,
            LABEL: (1 - present).astype(np.float32),
            "mention:example": ids,
            "mention:noun": nouns,
            "mention:number": number,
            "mention:place": starts / lengths[example],
            "mention:log_p": _joined(columns["mention:log_p"]),
            "mention:first_log_p": _joined(columns["mention:first_log_p"]),
        }


def _joined(lists: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(np.asarray(items, np.float64).ravel() for items in lists)])
