"""AMBER: is it there, is it so, do they touch (Wang et al. 2023, arXiv 2311.07397)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from concepts.reading.assembly import YES_NO, Pictures, check_counts, dataset
from concepts.reading.records import Record, read_records
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
        A list whose entry number ``id`` (from 1) has ``type`` and ``truth``: yes or no, or for a description the words
        that are true of the image.
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
    known = list(read_records(truths))
    records = read_records(file)
    asked: dict[int, str] = {}
    examples: list[Example] = []
    for record in islice(records, limit):
        number = _number(record, len(known), truths)
        if number in asked:
            msg = f"{record.where}: field 'id': {number} was already used, at {asked[number]}"
            raise DataError(msg)
        asked[number] = record.where
        truth = known[number - 1]
        level, kind, answer = described(truth)
        picture = pictures.find(record.text("image"), record.where)
        examples.append(
            Example(
                id=str(number),
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


def _number(record: Record, count: int, truths: Path) -> int:
    text = record.identifier("id")
    if not text.isdecimal() or not 1 <= int(text) <= count:
        msg = f"{record.where}: field 'id' is '{text[:40]}', but '{truths}' has annotations 1 to {count}"
        raise DataError(msg)
    return int(text)
