"""SugarCrepe: true captions, and fluent false captions with one change (Hsieh et al. 2023, arXiv 2306.14610)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from concepts.concept import LEVELS, Level
from concepts.reading.assembly import build_dataset, check_counts
from concepts.reading.caption_questions import CaptionedImage, caption_questions, check_form
from concepts.reading.image_folder import ImageFolder
from concepts.reading.json_stream import stream
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError
from groundscope.core.text import nearest

LEVEL_OF: dict[str, Level] = {"obj": "object", "ent": "object", "att": "attribute", "rel": "relation"}
"""Last part of the file's name, such as ``replace_att.json``, to the level."""


def sugarcrepe(
    captions: Path | str,
    images: Path | str,
    *,
    form: str = "yes_no",
    level: Level | None = None,
    limit: int | None = None,
) -> ConceptDataset:
    """Load SugarCrepe captions as questions.

    Parameters
    ----------
    captions
        File ``{"0": {filename, caption, negative_caption}}``.
    images
        Folder of the images.
    form
        ``yes_no``: a yes-no question about each caption; ``choice``: one question, answered by the letter of the true caption.
    level
        Level of the change; by default according to the file's name (``_obj``, ``_att`` or ``_rel`` at its end).
    limit
        Maximum number of caption pairs; the first ones are used.

    Returns
    -------
    ConceptDataset
        Questions of this level; their kind is the file's name (``replace_att``), their groups are images.

    Raises
    ------
    DataError
        Names the file, record and field: for invalid or truncated JSON, a field that is missing or of the wrong type, equal
        captions, or an image that is missing, unreadable or outside the folder.
    ConfigError
        For a limit below 1, an unknown form or level, or a file name that does not show the level.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> record = {"filename": "a.png", "caption": "A red cup.", "negative_caption": "A blue cup."}
    >>> _ = (folder / "replace_att.json").write_text(json.dumps({"0": record}))
    >>> data = gs.loaders.sugarcrepe(folder / "replace_att.json", folder)
    >>> data[0].level, data[1].question, data[1].answer
    ('attribute', 'Is the statement "A blue cup." true of the image?', 'no')
    """
    check_counts(limit=limit)
    check_form(form)
    file, folder = Path(captions), ImageFolder(Path(images))
    if level is not None and level not in LEVELS:
        msg = f"unknown level '{level}'; choose from {', '.join(LEVELS)}{nearest(str(level), LEVELS)}"
        raise ConfigError(msg)
    pair_level = level or LEVEL_OF.get(file.stem.rpartition("_")[2].lower())
    if pair_level is None:
        msg = f"the name of '{file.name}' does not end in _obj, _att or _rel; give the level, for example level='attribute'"
        raise ConfigError(msg)
    entries = stream(file, whole=True)

    def questions(level: Level) -> Iterator[Example]:
        for number, entry in enumerate(islice(entries, limit)):
            record = entry.record()
            image = folder.find(record.text("filename"), record.where, "filename")
            name = entry.key if entry.key is not None else str(number)
            subject = CaptionedImage(f"{file.stem}/{name}", image, image.name, level, file.stem.lower())
            yield from caption_questions(
                subject, record.text("caption"), [record.text("negative_caption")], form, record.where
            )

    examples = tuple(questions(pair_level))
    left_out = {"pairs beyond the limit": sum(1 for _ in entries)}
    return build_dataset("sugarcrepe", [file], folder, examples, left_out, form=form)
