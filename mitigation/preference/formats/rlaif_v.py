"""RLAIF-V: a Parquet table with ``question, chosen, rejected`` and the bytes of the image.

Columns of the released data set and of the code that reads it (RLHF-V/RLAIF-V ``muffin/data/datasets.py``): ``ds_name``,
``image`` (``bytes`` and ``path``), ``question``, ``chosen``, ``rejected``, ``origin_dataset``, ``origin_split`` (JSON), ``idx``,
``image_path``. That code loads every Parquet file of a folder whose name does not contain ``logp``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from concepts.image_files import BytesImage
from concepts.image_source import ImageSource
from concepts.reading.image_folder import ImageFolder
from concepts.reading.record import Record
from concepts.reading.text_files import readable
from groundscope.core.errors import DataError
from groundscope.core.files import whole
from mitigation.preference.data import PreferenceData
from mitigation.preference.formats.files import build, checked_pair, image_bytes, require_one_image
from mitigation.preference.pair import PreferencePair

FILE = "preferences.parquet"
_TEXTS = ("question", "chosen", "rejected")


def write(data: PreferenceData, folder: Path) -> Path:
    """Write one row per pair, each about one image, whose bytes are in the file."""
    require_one_image(data, "rlaif_v")
    arrow, parquet = _pyarrow()
    contents: dict[str, tuple[bytes, str]] = {}
    rows = []
    for number, pair in enumerate(data):
        image = pair.images[0]
        if image.identity not in contents:
            contents[image.identity] = image_bytes(image)
        content, suffix = contents[image.identity]
        name = f"{number}{suffix}"
        rows.append(
            {
                "ds_name": data.name,
                "image": {"bytes": content, "path": name},
                "question": pair.prompt,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "origin_dataset": pair.source,
                "origin_split": json.dumps({"group": pair.group, "id": pair.id}),
                "idx": number,
                "image_path": name,
            }
        )
    with whole(folder / FILE) as temporary:
        parquet.write_table(arrow.Table.from_pylist(rows), temporary)
    return folder / FILE


def read(file: Path, images: Path) -> PreferenceData:
    """Read a file; an image without bytes is read from its path in the folder."""
    folder = ImageFolder(images)
    contents: list[tuple[str, BytesImage]] = []
    data = build("rlaif_v", file, folder, _pairs(file, folder, contents))
    for where, image in contents:
        try:
            image.check()
        except DataError as error:
            msg = f"{where}: {error}"
            raise DataError(msg) from error
    return data


def _pairs(file: Path, folder: ImageFolder, contents: list[tuple[str, BytesImage]]) -> Iterator[PreferencePair]:
    _, parquet = _pyarrow()
    from pyarrow import ArrowException

    number = 0
    with readable(file):
        try:
            with parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=256):
                    for values in batch.to_pylist():
                        number += 1
                        yield _pair(Record(f"{file}: row {number}", values), number, folder, contents)
        except ArrowException as error:
            msg = f"{file}: the Parquet file cannot be read: {str(error).splitlines()[0]}"
            raise DataError(msg) from error


def _pair(record: Record, number: int, folder: ImageFolder, contents: list[tuple[str, BytesImage]]) -> PreferencePair:
    texts = [record.text(name) for name in _TEXTS]
    value: Any = record.field("image")
    image: ImageSource
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        image = BytesImage(value["bytes"], f"{record.where}, image")
        contents.append((record.where, image))
    else:
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str):
            msg = f"{record.where}: field 'image' must hold 'bytes' and 'path' of an image, or its path"
            raise DataError(msg)
        image = folder.find(path, record.where)
    identity = str(record.values.get("idx", number))
    return checked_pair(record.where, identity, (image,), *texts, "file")


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        msg = "the format 'rlaif_v' is a Parquet file and needs the package pyarrow; pip install 'groundscope[parquet]'"
        raise DataError(msg) from error
    return pa, parquet
