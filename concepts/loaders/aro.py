"""ARO: captions with swapped relations and attributes of Visual Genome (Yuksekgonul et al. 2023, arXiv 2210.01936)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from concepts.concept import Level
from concepts.image_files import CroppedImage
from concepts.reading.assembly import build_dataset, check_counts
from concepts.reading.box_frames import box_numbers
from concepts.reading.caption_questions import CaptionedImage, caption_questions, check_form
from concepts.reading.image_folder import ImageFolder
from concepts.reading.record import Record
from concepts.reading.records import read_json_records
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError


def aro(captions: Path | str, images: Path | str, *, form: str = "yes_no", limit: int | None = None) -> ConceptDataset:
    """Load ARO captions as questions; images are cropped to the box of the two objects.

    Parameters
    ----------
    captions
        File ``[{image_path, bbox_x, bbox_y, bbox_w, bbox_h, true_caption, false_caption}]``, with ``relation_name`` or
        ``attributes`` (two) in each record.
    images
        Folder of the images.
    form
        ``yes_no``: a yes-no question about each caption; ``choice``: one question, answered by the letter of the true caption.
    limit
        Maximum number of records; the first ones are used.

    Returns
    -------
    ConceptDataset
        Relation or attribute questions; groups are images. The labels are ``<level>:named``, and for both captions
        ``relation:<relation_name>`` or ``attribute:<value>``. Records whose image has an EXIF orientation are left out,
        because it is unknown whether their boxes refer to the rotated image.

    Raises
    ------
    DataError
        Names the file, record and field: for invalid or truncated JSON, a field that is missing or of the wrong type, an
        empty box, equal captions, or an image that is missing, unreadable or outside the folder.
    ConfigError
        For a limit below 1 or an unknown form.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> record = {"image_path": "a.png", "bbox_x": 0, "bbox_y": 0, "bbox_w": 90, "bbox_h": 90, "relation_name": "above",
    ...           "true_caption": "the cup is above the table", "false_caption": "the table is above the cup"}
    >>> _ = (folder / "relations.json").write_text(json.dumps([record]))
    >>> data = gs.loaders.aro(folder / "relations.json", folder)
    >>> data[1].question, data[1].answer
    ('Is the statement "the table is above the cup" true of the image?', 'no')
    """
    check_counts(limit=limit)
    check_form(form)
    file, folder = Path(captions), ImageFolder(Path(images))
    records = read_json_records(file)
    left_out: Counter[str] = Counter()

    def questions() -> Iterator[Example]:
        for number, record in enumerate(islice(records, limit), 1):
            image = folder.find(record.text("image_path"), record.where, "image_path")
            level, kind, labels = _topic(record)
            if folder.is_rotated(image):
                left_out["records whose image has an EXIF orientation, which the box may refer to or not"] += 1
                continue
            crop = CroppedImage(image, _box(record))
            subject = CaptionedImage(str(number), crop, image.name, level, kind, labels=labels)
            yield from caption_questions(
                subject, record.text("true_caption"), [record.text("false_caption")], form, record.where
            )

    examples = tuple(questions())
    left_out["records beyond the limit"] = sum(1 for _ in records)
    return build_dataset("aro", [file], folder, examples, left_out, form=form)


def _topic(record: Record) -> tuple[Level, str, dict[str, bool]]:
    """Return level, kind and labels of a record."""
    if "relation_name" in record.values:
        return "relation", "relation", {f"relation:{record.text('relation_name').strip().lower()}": True}
    values = record.texts("attributes")
    return "attribute", "attribute", {f"attribute:{value.strip().lower()}": True for value in values}


def _box(record: Record) -> tuple[float, float, float, float]:
    x, y, width, height = box_numbers(record, "bbox_x", "bbox_y", "bbox_w", "bbox_h")
    if not width or not height:
        msg = f"{record.where}: field 'bbox_w' or 'bbox_h': a box of {width:g} x {height:g} pixels is empty"
        raise DataError(msg)
    return x, y, x + width, y + height
