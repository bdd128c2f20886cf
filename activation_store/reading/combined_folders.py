"""When several folders are one store: same arrays, same model; only the dataset may be another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from activation_store.format.schema import Schema, comparable, difference
from activation_store.forms import same_form
from activation_store.reading.folder import Folder
from groundscope.core.errors import StoreError

_DATASET = "dataset"
_MERGED = "merged"


def check_together(parts: Sequence[tuple[Folder, Sequence[str]]]) -> None:
    """Raise `StoreError` unless folders, each with its example ids, can be one store."""
    first = parts[0][0]
    where: dict[str, Folder] = {}
    for folder, ids in parts:
        one = same_form(first.provenance, folder.provenance, str(folder.path))
        other = same_form(folder.provenance, first.provenance, str(first.path))
        found = difference(_same(first.schema, one), _same(folder.schema, other))
        if found is not None:
            field, old, new = found
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
    """Return where several folders came from: as the first, with the dataset of each where they differ."""
    provenance = dict(folders[0].provenance)
    datasets: list[Any] = []
    for folder in folders:
        given = folder.provenance.get(_DATASET)
        several = given[_MERGED] if isinstance(given, Mapping) and set(given) == {_MERGED} else [given]
        datasets += [dataset for dataset in several if dataset not in datasets]
    if len(datasets) > 1:
        provenance[_DATASET] = {_MERGED: datasets}
    return provenance


def _same(schema: Schema, provenance: Mapping[str, Any]) -> dict[str, Any]:
    return comparable(schema, {key: value for key, value in provenance.items() if key != _DATASET})
