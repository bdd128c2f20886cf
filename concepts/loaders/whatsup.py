"""What'sUp: images that differ in one preposition (Kamath et al. 2023, arXiv 2310.19785)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from concepts.reading.assembly import Pictures, check_counts, dataset
from concepts.reading.caption_questions import Captioned, asked, check_form, further
from concepts.reading.json_stream import Entry, stream
from concepts.reading.record import Record, as_record
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError

NAMES: Mapping[str, str] = MappingProxyType({"coco": "%012d.jpg", "vg": "%d.jpg"})
"""How ``coco_qa`` and ``vg_qa`` files mean an image id."""


def whatsup(
    captions: Path | str,
    images: Path | str,
    *,
    form: str = "yes_no",
    names: str | None = None,
    limit: int | None = None,
) -> ConceptDataset:
    """Read What'sUp captions: controlled images, or the sets made from COCO and Visual Genome.

    Parameters
    ----------
    captions
        ``[{image_path, caption_options[]}]``, the first option true, or ``[[image id, true, false]]``.
    images
        The folder that the paths are relative to; of ``image_path`` the folder ``data/`` in front is left off where the
        rest is there.
    form
        ``yes_no``: the true caption and one false one are asked about; ``choice``: which of all, by letter.
    names
        How an image id is a file name: ``coco`` (twelve digits) or ``vg``; by default as the captions' file is called.
    limit
        Keep this many images, the first.

    Returns
    -------
    ConceptDataset
        Relation questions, grouped by image; the labels are ``relation:named``, and ``relation:<preposition>`` as the
        file name of a controlled image has it (``mug_left_of_plate.jpeg``).

    Raises
    ------
    DataError
        Naming file, record and field: a file that is cut or broken, a field that is missing or of the wrong kind,
        captions that do not differ, an image that is missing, unreadable or outside the folder.
    ConfigError
        For a limit below 1, an unknown form or kind of names.
    """
    check_counts(limit=limit)
    check_form(form)
    if names is not None and names not in NAMES:
        msg = f"names='{names}': there are {', '.join(NAMES)}"
        raise ConfigError(msg)
    file, pictures = Path(captions), Pictures(Path(images))
    entries = stream(file)
    left_out = Counter({"false captions, where one is asked about": 0})
    pattern = names or next((n for n in NAMES if file.name.lower().startswith(n)), None)

    def questions() -> Iterator[Example]:
        for number, entry in enumerate(islice(entries, limit), 1):
            image, true, false = _read(entry, pattern)
            picture = pictures.find(_there(image, pictures), entry.where)
            left_out["false captions, where one is asked about"] += further(false, form)
            named = preposition(picture.name)
            labels = {f"relation:{named}": True} if named and isinstance(entry.value, dict) else {}
            subject = Captioned(str(number), picture, picture.name, "relation", "relation", labels=labels)
            yield from asked(subject, true, false, form, entry.where)

    examples = tuple(questions())
    left_out["images beyond the limit"] = sum(1 for _ in entries)
    return dataset("whatsup", [file], pictures, examples, left_out, form=form)


def preposition(path: str) -> str | None:
    """Return the words between the first and last part of a file name; None where there are none."""
    parts = PurePosixPath(path).stem.split("_")
    return " ".join(parts[1:-1]).replace("-", " ") or None


def _read(entry: Entry, pattern: str | None) -> tuple[str, str, tuple[str, ...]]:
    if isinstance(entry.value, list):
        return _triple(entry, entry.value, pattern)
    record = entry.record()
    options = record.words("caption_options")
    if len(options) < 2:
        msg = f"{record.where}: field 'caption_options' must hold a true caption and false ones"
        raise DataError(msg)
    return record.text("image_path"), options[0], options[1:]


def _triple(entry: Entry, value: list[Any], pattern: str | None) -> tuple[str, str, tuple[str, ...]]:
    if len(value) != 3:
        msg = f"{entry.where}: expected an image id, a true and a false caption, found {len(value)} values"
        raise DataError(msg)
    record: Record = as_record(entry.where, dict(zip(("image_id", "true", "false"), value, strict=True)))
    number = record.identifier("image_id")
    if pattern is None or not number.isdecimal():
        msg = f"{entry.where}: image id '{number[:40]}' needs names='coco' or names='vg' to be a file name"
        raise DataError(msg)
    return NAMES[pattern] % int(number), record.text("true"), (record.text("false"),)


def _there(name: str, pictures: Pictures) -> str:
    shorter = name.removeprefix("data/")
    return shorter if shorter != name and not pictures.has(name) else name
