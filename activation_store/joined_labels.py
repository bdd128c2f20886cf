"""Join a user's labels to the examples of a store by id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from activation_store.format.encoding import Column, as_column
from concepts.reading.label_columns import label_names, parse_labels
from concepts.schema import ConceptDataset
from groundscope.core.errors import StoreError

if TYPE_CHECKING:
    import pandas as pd


def join_labels(
    ids: Sequence[str], labels: pd.DataFrame | ConceptDataset, *, classes: Sequence[str] = ()
) -> dict[str, Column]:
    """Return a label column for each concept, with a value for each example of a store: as a trace of these labels writes it.

    Parameters
    ----------
    ids
        Ids of the store's examples.
    labels
        A data frame with a column ``id`` and label columns, or a dataset with labels; see `ActivationStore.with_labels`.
    classes
        Columns whose numbers are names of classes.

    Raises
    ------
    StoreError
        If the frame has no ids or no labels, repeats an id, or has none of the store's.
    DataError, ConfigError
        As `concepts.reading.label_columns.parse_labels`.
    """
    if isinstance(labels, ConceptDataset):
        labels_by_id = {e.id: e.labels for e in labels}
        names = sorted({name for e in labels for name in e.labels})
        columns: Mapping[str, Mapping[str, Any]] = {
            n: {i: own[n] for i, own in labels_by_id.items() if n in own} for n in names
        }
        rows = list(labels_by_id)
    else:
        if "id" not in labels:
            msg = "the table of labels has no column 'id'; add one with the ids of the store's examples (store.frame()['id'])"
            raise StoreError(msg)
        rows = [str(i) for i in labels["id"].tolist()]
        names = label_names([str(column) for column in labels.columns])
        texts = {name: labels[name].tolist() for name in names}
        parsed = parse_labels(texts, [f"labels: example '{i}'" for i in rows], classes)
        columns = {name: dict(zip(rows, values, strict=True)) for name, values in sorted(parsed.items())}
    repeated = next((i for i, count in _counts(rows).items() if count > 1), None)
    if repeated is not None:
        msg = f"the table of labels has the id '{repeated}' twice; give one row for each example"
        raise StoreError(msg)
    if not columns:
        msg = "the table has no label column: every column is a field of an example, or empty; add a column with labels"
        raise StoreError(msg)
    if rows and not set(rows) & set(ids):
        msg = (
            f"no id of the table of labels is in the store: its ids are like '{rows[0]}', the store's like "
            f"'{ids[0] if ids else ''}'"
        )
        raise StoreError(msg)
    return {name: as_column(name, [values.get(i) for i in ids]) for name, values in columns.items()}


def _counts(rows: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    return counts
