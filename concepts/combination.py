"""Several datasets as one, such as the nine question files of POPE: their questions are asked in one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from concepts.schema import ConceptDataset
from groundscope.core.errors import DataError

PARTS = "parts"
"""Field of the provenance of a combined dataset: name of a part to the provenance of the part."""


def combine_datasets(datasets: Mapping[str, ConceptDataset], name: str | None = None) -> ConceptDataset:
    """Combine datasets into one, in order.

    Groups are not renamed: images with the same name in two datasets are one group, so that no image is on both sides of a
    split, and intervals are not too narrow.

    Parameters
    ----------
    datasets
        Name to dataset. The ids of the examples become ``<name>/<id>``, so a name is one word without a slash.
    name
        Name of the result; by default the names joined by ``+``.

    Returns
    -------
    ConceptDataset
        All examples. The provenance has that of each dataset in the field ``parts``; `dataset_parts` divides it again.

    Raises
    ------
    DataError
        If there are no datasets, a name is empty or has a slash, or a dataset is combined already.

    Examples
    --------
    >>> import groundscope as gs
    >>> first, second = gs.scenes.dataset(10, seed=0), gs.scenes.dataset(10, seed=1)
    >>> both = gs.combine_datasets({"first": first, "second": second})
    >>> len(both) == len(first) + len(second), both[0].id == f"first/{first[0].id}"
    (True, True)
    """
    if not datasets:
        msg = "no datasets to combine; give at least one"
        raise DataError(msg)
    for part, data in datasets.items():
        if not part or "/" in part:
            msg = f"'{part}' is not a name of a dataset to combine: give a name that is not empty and has no '/'"
            raise DataError(msg)
        if PARTS in data.provenance:
            msg = f"dataset '{part}' is combined already; combine its parts (dataset_parts) with the others in one call"
            raise DataError(msg)
    examples = tuple(replace(e, id=f"{part}/{e.id}") for part, data in datasets.items() for e in data)
    provenance = {PARTS: {part: dict(data.provenance) for part, data in datasets.items()}}
    return ConceptDataset(name or "+".join(datasets), examples, provenance)


def dataset_parts(data: ConceptDataset) -> dict[str, ConceptDataset]:
    """Return the datasets that were combined, by name; a dataset that was not combined is its only part.

    The examples have the ids of the combined dataset, and each part has the provenance of its dataset. Parts of which no
    example is left, for example after `ConceptDataset.filter`, are missing.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(10)
    >>> both = gs.combine_datasets({"all": data, "conflict": data.where(split="conflict")})
    >>> {name: len(part) for name, part in gs.dataset_parts(both).items()}
    {'all': 75, 'conflict': 6}
    >>> list(gs.dataset_parts(data)) == [data.name]
    True
    """
    provenances = data.provenance.get(PARTS)
    if not isinstance(provenances, Mapping):
        return {data.name: data}
    examples = {part: tuple(e for e in data if e.id.startswith(f"{part}/")) for part in provenances}
    return {part: ConceptDataset(part, rows, provenances[part]) for part, rows in examples.items() if rows}
