"""Images of HA-DPO's files: whole-number ids, resolved by Visual Genome's ``image_data.json``.

The released code reads ``image_data.json`` in the folder ``--vg_path``, a list of ``{"image_id", "url"}``, and opens the last two
parts of the URL below that folder. The folder of the written file is such a folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from concepts.image_files import FileImage
from concepts.reading.image_folder import ImageFolder
from concepts.reading.json_stream import stream_list
from concepts.reading.record import Record
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.paths import is_file
from groundscope.core.text import nearest
from mitigation.preference.data import PreferenceData
from mitigation.preference.formats.files import write_images, write_json

INDEX = "image_data.json"
Variant = Literal["llava", "minigpt4", "instructblip"]
VARIANTS: tuple[Variant, ...] = ("llava", "minigpt4", "instructblip")
"""The models of the release, whose code reads different forms."""


def check_variant(variant: str) -> None:
    """Raise `ConfigError` for an unknown variant."""
    if variant not in VARIANTS:
        msg = f"unknown variant '{variant}'; choose from {', '.join(VARIANTS)}{nearest(variant, VARIANTS)}"
        raise ConfigError(msg)


def write_index(data: PreferenceData, folder: Path) -> dict[str, int]:
    """Write the images and ``image_data.json``; return the id of each image by its identity.

    Ids are derived from the image files, so that both files of HA-DPO can be written into one folder.
    """
    names = write_images(data, folder)
    ids = {identity: int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) for identity, name in names.items()}
    earlier = index_of(folder) if is_file(folder / INDEX) else {}
    index = {**earlier, **{ids[identity]: name for identity, name in names.items()}}
    write_json(folder / INDEX, [{"image_id": number, "url": name} for number, name in index.items()])
    return ids


def index_of(folder: Path) -> dict[int, str]:
    """Return the path of each image below a folder by its id, from ``image_data.json``."""
    index: dict[int, str] = {}
    for record in stream_list(folder / INDEX):
        number = image_id(record)
        parts = record.text("url").split("/")
        if len(parts) < 2:
            msg = f"{record.where}: field 'url' must end in a folder and a file, not '{parts[0][:40]}'"
            raise DataError(msg)
        index[number] = "/".join(parts[-2:])
    return index


class IndexedImages:
    """The images of a folder with an ``image_data.json``."""

    def __init__(self, folder: Path) -> None:
        self.folder = ImageFolder(folder)
        if not is_file(folder / INDEX):
            msg = f"'{folder}' has no {INDEX}, which gives the file of each image id; pass Visual Genome's folder as images="
            raise DataError(msg)
        self._index = index_of(folder)

    def find(self, number: int, where: str) -> FileImage:
        """Return an image; raises `DataError`, naming the record, for an unknown id."""
        if number not in self._index:
            msg = f"{where}: image_id {number} is not in '{self.folder.path / INDEX}'"
            raise DataError(msg)
        return self.folder.find(self._index[number], where, "image_id")


def image_id(record: Record) -> int:
    """Return the image id of a record, a whole number or its text."""
    return as_id(record.identifier("image_id"), record.where)


def as_id(text: str, where: str) -> int:
    """Return an image id; raises `DataError`, naming the record, for other texts."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        msg = f"{where}: image_id '{text[:40]}' is not a whole number"
        raise DataError(msg)
    return int(text)
