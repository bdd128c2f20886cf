"""ARO: Visual Genome relations and attributes, with captions that swap them (Yuksekgonul et al. 2023, arXiv 2210.01936)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from concepts.image_files import CroppedImage
from concepts.reading.assembly import Pictures, check_counts, dataset
from concepts.reading.box_frames import box_numbers
from concepts.reading.caption_questions import Captioned, asked, check_form
from concepts.reading.record import Record
from concepts.reading.records import read_records
from concepts.schema import ConceptDataset, Example, Level
from groundscope.core.errors import DataError


def aro(captions: Path | str, images: Path | str, *, form: str = "yes_no", limit: int | None = None) -> ConceptDataset:
    """Read ARO captions; images are cropped to the box of the two things.

    Parameters
    ----------
    captions
        ``[{image_path, bbox_x, bbox_y, bbox_w, bbox_h, true_caption, false_caption}]`` with ``relation_name`` or
        ``attributes[2]``.
    images
        The folder that the paths are relative to.
    form
        ``yes_no``: both captions are asked about; ``choice``: which of the two, by letter.
    limit
        Keep this many records, the first.

    Returns
    -------
    ConceptDataset
        Relation or attribute questions, grouped by image; the labels are ``<level>:named``, and
        ``relation:<relation_name>`` or ``attribute:<value>`` for both. A record whose image has an EXIF orientation is
        left out, as it is not known whether its box was drawn before or after the turn.

    Raises
    ------
    DataError
        Naming file, record and field: a file that is cut or broken, a field that is missing or of the wrong kind, a box
        that is empty, captions that do not differ, an image that is missing, unreadable or outside the folder.
    ConfigError
        For a limit below 1 or an unknown form.
    """
    check_counts(limit=limit)
    check_form(form)
    file, pictures = Path(captions), Pictures(Path(images))
    records = read_records(file)
    left_out: Counter[str] = Counter()

    def questions() -> Iterator[Example]:
        for number, record in enumerate(islice(records, limit), 1):
            picture = pictures.find(record.text("image_path"), record.where, "image_path")
            level, kind, labels = _about(record)
            if pictures.is_turned(picture):
                left_out["records whose image has an EXIF orientation, in which the box may be drawn or not"] += 1
                continue
            crop = CroppedImage(picture, _box(record))
            subject = Captioned(str(number), crop, picture.name, level, kind, labels=labels)
            yield from asked(subject, record.text("true_caption"), [record.text("false_caption")], form, record.where)

    examples = tuple(questions())
    left_out["records beyond the limit"] = sum(1 for _ in records)
    return dataset("aro", [file], pictures, examples, left_out, form=form)


def _about(record: Record) -> tuple[Level, str, dict[str, bool]]:
    if "relation_name" in record.values:
        return "relation", "relation", {f"relation:{record.text('relation_name').strip().lower()}": True}
    values = record.words("attributes")
    return "attribute", "attribute", {f"attribute:{value.strip().lower()}": True for value in values}


def _box(record: Record) -> tuple[float, float, float, float]:
    x, y, width, height = box_numbers(record, "bbox_x", "bbox_y", "bbox_w", "bbox_h")
    if not width or not height:
        msg = f"{record.where}: field 'bbox_w' or 'bbox_h': a box of {width:g} x {height:g} pixels shows nothing"
        raise DataError(msg)
    return x, y, x + width, y + height
