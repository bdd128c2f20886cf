"""Combine several folders into one store: arrays and model must be equal, only the dataset can differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from activation_store.format.schema import Schema, comparable, difference
from activation_store.forms import same_form
from activation_store.reading.folder import Folder
from groundscope.core.errors import StoreError

_DATASET = "dataset"
_MERGED = "merged"


def check_mergeable(parts: Sequence[tuple[Folder, Sequence[str]]]) -> None:
    """Raise `StoreError` unless several folders, each with its example ids, can form one store."""
    first = parts[0][0]
    where: dict[str, Folder] = {}
    for folder, ids in parts:
        expected = same_form(first.provenance, folder.provenance, str(folder.path))
        provenance = same_form(folder.provenance, first.provenance, str(first.path))
        change = difference(_shared_record(first.schema, expected), _shared_record(folder.schema, provenance))
        if change is not None:
            field, old, new = change
            msg = (
                f"{folder.path} cannot be merged with {first.path}: field '{field}' differs: {new!r} instead of {old!r}; "
                f"one store holds one model, selection and dtype"
            )
            raise StoreError(msg)
        for name in ids:
            if name in where:
                msg = (
                    f"{folder.path} cannot be merged with {where[name].path}: "
                    f"the example '{name}' is in both; ids must be unique"
                )
                raise StoreError(msg)
            where[name] = folder


def provenance_of(folders: Sequence[Folder]) -> dict[str, Any]:
    """Return the provenance of several folders: that of the first, with all datasets if they differ."""
    provenance = dict(folders[0].provenance)
    datasets: list[Any] = []
    for folder in folders:
        entry = folder.provenance.get(_DATASET)
        entries = entry[_MERGED] if isinstance(entry, Mapping) and set(entry) == {_MERGED} else [entry]
        datasets += [dataset for dataset in entries if dataset not in datasets]
    if len(datasets) > 1:
        provenance[_DATASET] = {_MERGED: datasets}
    return provenance


def _shared_record(schema: Schema, provenance: Mapping[str, Any]) -> dict[str, Any]:
    return comparable(schema, {key: value for key, value in provenance.items() if key != _DATASET})
