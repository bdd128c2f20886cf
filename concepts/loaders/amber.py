"""AMBER: is it there, is it so, do they touch (Wang et al. 2023, arXiv 2311.07397)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from concepts.reading.assembly import YES_NO, Pictures, check_counts, dataset
from concepts.reading.record import Record
from concepts.reading.records import read_records
from concepts.schema import ConceptDataset, Example, Level
from groundscope.core.errors import DataError

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
"""Type of an annotation to its level and kind."""
GENERATIVE = "generative"


def amber(
    queries: Path | str, images: Path | str, annotations: Path | str, *, limit: int | None = None
) -> ConceptDataset:
    """Read AMBER queries with their truth.

    Parameters
    ----------
    queries
        ``[{id, image, query}]``.
    images
        The folder that the image names are relative to.
    annotations
        A list of ``{id, type, truth}``, joined by ``id`` in any order; without ids, the first entry is that of id 1. The
        truth is yes or no, or for a description the words that are true of the image.
    limit
        Keep this many queries, the first.

    Returns
    -------
    ConceptDataset
        Yes-no questions of every level, and descriptions with the true words as their answer; ids are the benchmark's,
        grouped by image.

    Raises
    ------
    DataError
        Naming file, record and field: a file that is cut or broken, a field that is missing or of the wrong kind, an id
        used twice or without an annotation, an unknown type, a truth that is neither yes nor no, an image that is
        missing, unreadable or outside the folder.
    ConfigError
        For a limit below 1.
    """
    check_counts(limit=limit)
    file, truths, pictures = Path(queries), Path(annotations), Pictures(Path(images))
    known = annotations_by_id(truths)
    records = read_records(file)
    asked: dict[str, str] = {}
    examples: list[Example] = []
    for record in islice(records, limit):
        number = _number(record, known, truths)
        if number in asked:
            msg = f"{record.where}: field 'id': {number} was already used, at {asked[number]}"
            raise DataError(msg)
        asked[number] = record.where
        truth = known[number]
        level, kind, answer = described(truth)
        picture = pictures.find(record.text("image"), record.where)
        examples.append(
            Example(
                id=number,
                image=picture,
                question=record.text("query"),
                answer=answer,
                candidates=() if kind == "caption" else YES_NO,
                level=level,
                kind=kind,
                split="caption" if kind == "caption" else "neutral",
                group=picture.name,
                labels={} if kind == "caption" else {f"{level}:named": answer == "yes"},
            )
        )
    left_out = Counter({"queries beyond the limit": sum(1 for _ in records)})
    return dataset("amber", [file, truths], pictures, examples, left_out)


def described(truth: Record) -> tuple[Level, str, str]:
    """Return level, kind and true answer of an annotation; raises `DataError` naming the record."""
    kind = truth.text("type").strip()
    if kind == GENERATIVE:
        return "object", "caption", ", ".join(truth.words("truth"))
    if kind not in DISCRIMINATIVE:
        msg = f"{truth.where}: field 'type' is '{kind[:60]}', known are {GENERATIVE}, {', '.join(DISCRIMINATIVE)}"
        raise DataError(msg)
    answer = truth.text("truth").strip().lower()
    if answer not in YES_NO:
        msg = f"{truth.where}: field 'truth' is '{answer[:60]}', neither 'yes' nor 'no'"
        raise DataError(msg)
    return (*DISCRIMINATIVE[kind], answer)


def annotations_by_id(path: Path) -> dict[str, Record]:
    """Return AMBER's annotations by id.

    The release takes entry number ``id - 1``, which is the same for its own file; here an annotation belongs to the id
    that it names, whatever its place. In a file without ids the place counts.

    Raises
    ------
    DataError
        Naming file and record: what cannot be read, an id that occurs twice, or in some annotations only.
    """
    records: dict[str, Record] = {}
    named: bool | None = None
    for place, record in enumerate(read_records(path), 1):
        if named is None:
            named = "id" in record.values
        if named != ("id" in record.values):
            msg = f"{record.where}: some annotations have a field 'id' and some have none; give one to each, or to none"
            raise DataError(msg)
        number = record.identifier("id") if named else str(place)
        if number in records:
            msg = f"{record.where}: field 'id': {number} was already used, at {records[number].where}"
            raise DataError(msg)
        records[number] = record
    return records


def _number(record: Record, known: Mapping[str, Record], truths: Path) -> str:
    text = record.identifier("id")
    if text not in known:
        ids = sorted(int(number) for number in known if number.isdecimal() and len(number) < 20)
        msg = f"{record.where}: field 'id' is '{text[:40]}', but '{truths}' has " + (
            f"annotations {ids[0]} to {ids[-1]}" if ids else "no annotation with a number"
        )
        raise DataError(msg)
    return text
