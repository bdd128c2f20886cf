"""SugarCrepe: captions with one fluent change (Hsieh et al. 2023, arXiv 2306.14610)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import get_args

from concepts.reading.assembly import Pictures, check_counts, dataset
from concepts.reading.caption_questions import Captioned, asked, check_form
from concepts.reading.json_stream import stream
from concepts.schema import ConceptDataset, Example, Level
from groundscope.core.errors import ConfigError

LEVEL_OF: dict[str, Level] = {"obj": "object", "ent": "object", "att": "attribute", "rel": "relation"}
"""What the file's name ends in to its level: ``replace_att.json``."""


def sugarcrepe(
    captions: Path | str,
    images: Path | str,
    *,
    form: str = "yes_no",
    level: Level | None = None,
    limit: int | None = None,
) -> ConceptDataset:
    """Read SugarCrepe captions.

    Parameters
    ----------
    captions
        ``{"0": {filename, caption, negative_caption}}``.
    images
        The folder that the file names are relative to.
    form
        ``yes_no``: both captions are asked about; ``choice``: which of the two, by letter.
    level
        What the change concerns; by default what the file's name says.
    limit
        Keep this many pairs, the first.

    Returns
    -------
    ConceptDataset
        Questions of that level, of the kind that the file is called (``replace_att``), grouped by image.

    Raises
    ------
    DataError
        Naming file, record and field: a file that is cut or broken, a field that is missing or of the wrong kind,
        captions that do not differ, an image that is missing, unreadable or outside the folder.
    ConfigError
        For a limit below 1, an unknown form, or a level that neither the option nor the file's name gives.
    """
    check_counts(limit=limit)
    check_form(form)
    file, pictures = Path(captions), Pictures(Path(images))
    about = level or LEVEL_OF.get(file.stem.rpartition("_")[2].lower())
    if about is None or about not in get_args(Level):
        msg = f"level={level}: the name of '{file.name}' does not end in _obj, _att or _rel; say level='attribute', say"
        raise ConfigError(msg)
    chosen: Level = about
    entries = stream(file, whole=True)

    def questions() -> Iterator[Example]:
        for number, entry in enumerate(islice(entries, limit)):
            record = entry.record()
            picture = pictures.find(record.text("filename"), record.where, "filename")
            name = entry.key if entry.key is not None else str(number)
            subject = Captioned(f"{file.stem}/{name}", picture, picture.name, chosen, file.stem.lower())
            yield from asked(subject, record.text("caption"), [record.text("negative_caption")], form, record.where)

    examples = tuple(questions())
    left_out = {"pairs beyond the limit": sum(1 for _ in entries)}
    return dataset("sugarcrepe", [file], pictures, examples, left_out, form=form)
