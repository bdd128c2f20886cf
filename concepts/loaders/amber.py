"""AMBER: existence, attributes and relations, and descriptions (Wang et al. 2023, arXiv 2311.07397)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from concepts.concept import Level
from concepts.question import YES_NO
from concepts.reading.assembly import build_dataset, check_counts
from concepts.reading.image_folder import ImageFolder
from concepts.reading.record import Record
from concepts.reading.records import read_json_records
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError
from groundscope.core.text import nearest

DISCRIMINATIVE: Mapping[str, tuple[Level, str]] = MappingProxyType(
    {
        "discriminative-hallucination": ("object", "existence"),
        "discriminative-attribute-state": ("attribute", "state"),
        "discriminative-attribute-number": ("attribute", "number"),
        "discriminative-attribute-action": ("attribute", "action"),
        "discriminative-relation": ("relation", "relation"),
        "relation": ("relation", "relation"),
    }
)
"""Type of an annotation to the level and kind of its question."""
GENERATIVE = "generative"


def amber(
    queries: Path | str, images: Path | str, annotations: Path | str, *, limit: int | None = None
) -> ConceptDataset:
    """Load the queries of AMBER with their true answers.

    Parameters
    ----------
    queries
        File ``[{id, image, query}]``.
    images
        Folder of the images.
    annotations
        File ``[{id, type, truth}]``, in any order; without ids, entries are numbered from 1. The truth is yes or no; for a
        description, the list of words that are true of the image.
    limit
        Maximum number of queries; the first ones are used.

    Returns
    -------
    ConceptDataset
        Yes-no questions of all levels, and descriptions with the true words as their answer. Ids are those of the benchmark;
        groups are images.

    Raises
    ------
    DataError
        Names the file, record and field: for invalid or truncated JSON, a field that is missing or of the wrong type, an id
        that is repeated or has no annotation, an unknown type, a truth that is neither yes nor no, or an image that is
        missing, unreadable or outside the folder.
    ConfigError
        For a limit below 1.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> queries, annotations = folder / "queries.json", folder / "annotations.json"
    >>> _ = queries.write_text(json.dumps([{"id": 1, "image": "a.png", "query": "Is the chair yellow?"}]))
    >>> _ = annotations.write_text(json.dumps([{"id": 1, "type": "discriminative-attribute-state", "truth": "yes"}]))
    >>> data = gs.loaders.amber(queries, folder, annotations)
    >>> data[0].level, data[0].question, data[0].answer
    ('attribute', 'Is the chair yellow?', 'yes')
    """
    check_counts(limit=limit)
    file, annotation_file, folder = Path(queries), Path(annotations), ImageFolder(Path(images))
    annotation_of_id = annotations_by_id(annotation_file)
    records = read_json_records(file)
    places: dict[str, str] = {}
    examples: list[Example] = []
    for record in islice(records, limit):
        number = _number(record, annotation_of_id, annotation_file)
        if number in places:
            msg = f"{record.where}: field 'id': {number} was already used, at {places[number]}"
            raise DataError(msg)
        places[number] = record.where
        level, kind, answer = read_annotation(annotation_of_id[number])
        image = folder.find(record.text("image"), record.where)
        examples.append(
            Example(
                id=number,
                image=image,
                question=record.text("query"),
                answer=answer,
                candidates=() if kind == "caption" else YES_NO,
                level=level,
                kind=kind,
                split="caption" if kind == "caption" else "neutral",
                group=image.name,
                labels={} if kind == "caption" else {f"{level}:named": answer == "yes"},
            )
        )
    left_out = Counter({"queries beyond the limit": sum(1 for _ in records)})
    return build_dataset("amber", [file, annotation_file], folder, examples, left_out)


def read_annotation(record: Record) -> tuple[Level, str, str]:
    """Return level, kind and true answer of an annotation; raises `DataError` for invalid fields."""
    kind = record.text("type").strip()
    if kind == GENERATIVE:
        return "object", "caption", ", ".join(record.texts("truth"))
    if kind not in DISCRIMINATIVE:
        types = [GENERATIVE, *DISCRIMINATIVE]
        msg = f"{record.where}: field 'type' is '{kind[:60]}'; choose from {', '.join(types)}{nearest(kind, types)}"
        raise DataError(msg)
    answer = record.text("truth").strip().lower()
    if answer not in YES_NO:
        msg = f"{record.where}: field 'truth' is '{answer[:60]}', neither 'yes' nor 'no'"
        raise DataError(msg)
    return (*DISCRIMINATIVE[kind], answer)


def annotations_by_id(path: Path) -> dict[str, Record]:
    """Return AMBER's annotations by id; entries of a file without ids are numbered from 1.

    The release uses the entry at index ``id - 1``, which has this id in the release's file; here the order is arbitrary.

    Raises
    ------
    DataError
        Names the file and record: for content that cannot be read, an id that occurs twice, or ids in only some annotations.
    """
    records: dict[str, Record] = {}
    has_ids: bool | None = None
    for place, record in enumerate(read_json_records(path), 1):
        if has_ids is None:
            has_ids = "id" in record.values
        if has_ids != ("id" in record.values):
            msg = f"{record.where}: only some annotations have a field 'id'; write it in all annotations or in none"
            raise DataError(msg)
        number = record.identifier("id") if has_ids else str(place)
        if number in records:
            msg = f"{record.where}: field 'id': {number} was already used, at {records[number].where}"
            raise DataError(msg)
        records[number] = record
    return records


def _number(record: Record, annotation_of_id: Mapping[str, Record], annotations: Path) -> str:
    """Return the id of a query; raises `DataError` if it has no annotation."""
    number = record.identifier("id")
    if number not in annotation_of_id:
        ids = sorted(int(n) for n in annotation_of_id if n.isdecimal() and len(n) < 20)
        available = f"the annotations {ids[0]} to {ids[-1]}" if ids else "no annotation with a number as its id"
        msg = (
            f"{record.where}: no annotation with id '{number[:40]}'; '{annotations}' has {available}; use the annotations of "
            "the same release"
        )
        raise DataError(msg)
    return number
