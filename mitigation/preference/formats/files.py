"""What the formats share: images next to the file, and checks of what a format cannot represent."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from concepts.image_files import FileImage, open_image
from concepts.image_source import ImageSource
from concepts.reading.image_folder import ImageFolder
from concepts.reading.text_files import sha256
from groundscope.core import artifacts
from groundscope.core.errors import DataError
from groundscope.core.paths import below
from groundscope.core.text import format_reasons
from mitigation.preference.data import PreferenceData
from mitigation.preference.pair import PreferencePair

IMAGES = "images"
"""Folder of the images."""
PLACEHOLDER = "<image>"
"""Placeholder of an image in the texts of LLaVA-like formats."""
_COPIED = {"PNG": ".png", "JPEG": ".jpg"}
"""Formats of files that are copied byte by byte if every reader shows the same pixels."""


def write_images(data: PreferenceData, folder: Path) -> dict[str, str]:
    """Write every image once, and return its path relative to the folder by its identity.

    Upright RGB files in PNG or JPEG are copied; every other image is written as PNG with the pixels that models see.

    Raises
    ------
    DataError
        If an image cannot be read, or ``images`` is a link.
    """
    names: dict[str, str] = {}
    for pair in data:
        for image in pair.images:
            if image.identity not in names:
                content, suffix = image_bytes(image)
                name = f"{IMAGES}/{hashlib.sha256(content).hexdigest()[:20]}{suffix}"
                artifacts.write_bytes(below(folder, name), content, "image")
                names[image.identity] = name
    return names


def image_bytes(image: ImageSource) -> tuple[bytes, str]:
    """Return the bytes of an image file with the pixels that models see, and the suffix of its name."""
    if isinstance(image, FileImage):
        with open_image(image.path) as file:
            suffix = _COPIED.get(str(file.format))
            plain = file.mode == "RGB" and "transparency" not in file.info
        if suffix and plain and image.header.orientation == 1:
            return image.path.read_bytes(), suffix
    buffer = io.BytesIO()
    image.load().save(buffer, format="PNG")
    return buffer.getvalue(), ".png"


def write_json(path: Path, document: Any) -> Path:
    """Write a JSON document atomically."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    artifacts.write_bytes(path, f"{text}\n".encode(), "preference file")
    return path


def require_one_image(data: PreferenceData, form: str) -> None:
    """Raise `DataError` for the first pair that a format with one image, one prompt and no system prompt cannot represent."""
    for pair in data:
        problem = None
        if len(pair.images) != 1:
            problem = f"it has {len(pair.images) or 'no'} images, the format exactly one"
        elif pair.system is not None:
            problem = "it has a system prompt, which the format does not have"
        elif any(PLACEHOLDER in text for text in (pair.prompt, pair.chosen, pair.rejected)):
            problem = f"its text contains '{PLACEHOLDER}', the format's placeholder of an image"
        if problem:
            msg = f"preference '{pair.id}' cannot be written as '{form}': {problem}; leave it out, or write it as 'trl'"
            raise DataError(msg)


def build(
    form: str, file: Path, folder: ImageFolder | None, pairs: Iterable[PreferencePair], **counts: int
) -> PreferenceData:
    """Return the data of a file after all checks of its records, then of its images."""
    rows = tuple(pairs)
    if not rows:
        reasons = format_reasons({name.replace("_", " "): n for name, n in counts.items()})
        msg = f"{file}: the file has no preference pairs{reasons and f'; left out: {reasons}'}"
        raise DataError(msg)
    provenance = {"format": form, "files": {str(file): sha256(file)}, "left_out": dict(counts)}
    data = PreferenceData(file.stem, rows, provenance)
    if folder is not None:
        folder.check()
    return data


def checked_pair(where: str, *arguments: Any, **fields: Any) -> PreferencePair:
    """Return a pair; its errors also name the record."""
    try:
        return PreferencePair(*arguments, **fields)
    except DataError as error:
        msg = f"{where}: {error}"
        raise DataError(msg) from error
