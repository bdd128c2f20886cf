"""VSR: captions about how two things stand, true or false (Liu et al. 2023, arXiv 2205.00363)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from concepts.reading.assembly import Pictures, check_counts, dataset
from concepts.reading.caption_questions import Captioned, statement
from concepts.reading.record import Record
from concepts.reading.records import read_records
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError


def vsr(captions: Path | str, images: Path | str, *, limit: int | None = None) -> ConceptDataset:
    """Read VSR captions; each is asked about, yes or no.

    Parameters
    ----------
    captions
        JSON lines ``image, caption, label, relation``, the label 1 or 0. Other fields are ignored.
    images
        The folder that the image names are relative to.
    limit
        Keep this many captions, the first.

    Returns
    -------
    ConceptDataset
        Relation questions, grouped by image; the labels are ``relation:named`` and ``relation:<relation>``.

    Raises
    ------
    DataError
        Naming file, line and field: broken JSON, a field that is missing or of the wrong kind, a label that is neither
        0 nor 1, an image that is missing, unreadable or outside the folder.
    ConfigError
        For a limit below 1.
    """
    check_counts(limit=limit)
    file, pictures = Path(captions), Pictures(Path(images))
    records = read_records(file)

    def questions() -> Iterator[Example]:
        for number, record in enumerate(islice(records, limit), 1):
            truth = _label(record)
            picture = pictures.find(record.text("image"), record.where)
            relation = record.text("relation").strip().lower()
            subject = Captioned(
                str(number), picture, picture.name, "relation", "relation", labels={f"relation:{relation}": truth}
            )
            yield statement(subject, record.text("caption"), truth, "caption")

    examples = tuple(questions())
    left_out = {"captions beyond the limit": sum(1 for _ in records)}
    return dataset("vsr", [file], pictures, examples, left_out)


def _label(record: Record) -> bool:
    label = record.field("label")
    if isinstance(label, bool) or label not in (0, 1):
        msg = f"{record.where}: field 'label' is {str(label)[:60]!r}, neither 0 nor 1"
        raise DataError(msg)
    return label == 1
