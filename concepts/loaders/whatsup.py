"""What'sUp: captions with one changed preposition (Kamath et al. 2023, arXiv 2310.19785)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from concepts.reading.assembly import build_dataset, check_counts
from concepts.reading.caption_questions import CaptionedImage, caption_questions, check_form, count_unused
from concepts.reading.image_folder import ImageFolder
from concepts.reading.json_stream import Entry, stream
from concepts.reading.record import Record, as_record
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.text import format_count, nearest

NAMES: Mapping[str, str] = MappingProxyType({"coco": "%012d.jpg", "vg": "%d.jpg"})
"""Source of the images to the format of their file names, for files of image ids (``coco_qa…``, ``vg_qa…``)."""


_UNUSED = "false captions without a question"


def whatsup(
    captions: Path | str,
    images: Path | str,
    *,
    form: str = "yes_no",
    names: str | None = None,
    limit: int | None = None,
) -> ConceptDataset:
    """Load What'sUp captions as questions: the controlled images, or the sets from COCO and Visual Genome.

    Parameters
    ----------
    captions
        File ``[{image_path, caption_options}]``, where the first of the options is true, or ``[[image id, true caption,
        false caption]]``.
    images
        Folder of the images. If ``image_path`` begins with ``data/`` and the folder has no such file, the rest of the path
        is used.
    form
        ``yes_no``: yes-no questions about the true caption and one false caption; ``choice``: one question with all captions,
        answered by the letter of the true one.
    names
        Format of the file names of image ids: ``coco`` (12 digits) or ``vg``; by default according to the name of the
        caption file.
    limit
        Maximum number of images; the first ones are used.

    Returns
    -------
    ConceptDataset
        Relation questions; groups are images. The labels are ``relation:named`` and, for controlled images,
        ``relation:<preposition>`` according to the file name (``mug_left_of_plate.jpeg``).

    Raises
    ------
    DataError
        Names the file, record and field: for invalid or truncated JSON, a field that is missing or of the wrong type, equal
        captions, or an image that is missing, unreadable or outside the folder.
    ConfigError
        For a limit below 1, an unknown form, or unknown `names`.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "mug_left_of_plate.png")
    >>> options = ["A mug to the left of a plate.", "A mug on a plate."]
    >>> record = {"image_path": "mug_left_of_plate.png", "caption_options": options}
    >>> _ = (folder / "controlled.json").write_text(json.dumps([record]))
    >>> data = gs.loaders.whatsup(folder / "controlled.json", folder)
    >>> [example.answer for example in data], dict(data[0].labels)
    (['yes', 'no'], {'relation:left of': True, 'relation:named': True})
    """
    check_counts(limit=limit)
    check_form(form)
    if names is not None and names not in NAMES:
        msg = f"unknown names='{names}'; choose from {', '.join(NAMES)}{nearest(names, NAMES)}"
        raise ConfigError(msg)
    file, folder = Path(captions), ImageFolder(Path(images))
    entries = stream(file)
    left_out = Counter({_UNUSED: 0})
    source = names or next((n for n in NAMES if file.name.lower().startswith(n)), None)

    def questions() -> Iterator[Example]:
        for number, entry in enumerate(islice(entries, limit), 1):
            path, true, false = _read(entry, source)
            image = folder.find(_existing_name(path, folder), entry.where)
            left_out[_UNUSED] += count_unused(false, form)
            relation = preposition(image.name)
            labels = {f"relation:{relation}": True} if relation and isinstance(entry.value, dict) else {}
            subject = CaptionedImage(str(number), image, image.name, "relation", "relation", labels=labels)
            yield from caption_questions(subject, true, false, form, entry.where)

    examples = tuple(questions())
    left_out["images beyond the limit"] = sum(1 for _ in entries)
    return build_dataset("whatsup", [file], folder, examples, left_out, form=form)


def preposition(path: str) -> str | None:
    """Return the words between the first and the last part of a file name, or None if it has only two parts."""
    parts = PurePosixPath(path).stem.split("_")
    return " ".join(parts[1:-1]).replace("-", " ") or None


def _read(entry: Entry, source: str | None) -> tuple[str, str, tuple[str, ...]]:
    """Return image path, true caption and false captions of an entry."""
    if isinstance(entry.value, list):
        return _read_triple(entry, entry.value, source)
    record = entry.record()
    options = record.texts("caption_options")
    if len(options) < 2:
        msg = f"{record.where}: field 'caption_options' must hold a true caption and at least one false caption"
        raise DataError(msg)
    return record.text("image_path"), options[0], options[1:]


def _read_triple(entry: Entry, value: list[Any], source: str | None) -> tuple[str, str, tuple[str, ...]]:
    if len(value) != 3:
        msg = f"{entry.where}: expected an image id, a true and a false caption, found {format_count(len(value), 'value')}"
        raise DataError(msg)
    record: Record = as_record(entry.where, dict(zip(("image_id", "true", "false"), value, strict=True)))
    number = record.identifier("image_id")
    if source is None or not number.isdecimal():
        msg = f"{entry.where}: image id '{number[:40]}' needs names='coco' or names='vg' to become a file name"
        raise DataError(msg)
    return NAMES[source] % int(number), record.text("true"), (record.text("false"),)


def _existing_name(name: str, folder: ImageFolder) -> str:
    shorter = name.removeprefix("data/")
    return shorter if shorter != name and not folder.has(name) else name
