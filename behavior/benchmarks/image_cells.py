"""Images inside a question file: bytes in a Parquet table, as Hugging Face stores them, or base64 in a table or JSON.

Reading questions records where an image is (`ImageCell`), not its bytes; `read_images` reads the images of the questions that a
model is asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from behavior.benchmarks.questions import ImageCell
from concepts.image_source import ImageSource
from concepts.loaders.table import read_rows
from concepts.reading.record import Record, is_text
from concepts.reading.table_examples import LONGEST_NAME, Pictures
from groundscope.core.errors import DataError

COLUMN = "image"
"""Field in which releases, Hugging Face tables and VLMEvalKit store the image."""


def image_name(record: Record, *names: str) -> str:
    """Return the first of these fields that holds the name of an image; empty if none does, such as for the image itself.

    >>> from behavior.benchmarks.image_cells import image_name
    >>> from concepts.reading.record import Record
    >>> image_name(Record("row 1", {"image": 17})), image_name(Record("row 1", {"image": {"bytes": b"abc"}}))
    ('17', '')
    """
    for name in names or (COLUMN,):
        value = record.values.get(name)
        if isinstance(value, Mapping) and value.get("bytes") is None:  # a Hugging Face table that names files
            value = value.get("path")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if is_text(value) and value.strip() and not _is_content(value):
            return value
    return ""


def find_image(record: Record, path: Path, row: int, column: str = COLUMN) -> ImageCell | None:
    """Return the place of an image that a record holds itself; None if it holds a name or nothing.

    Parameters
    ----------
    record
        A record of the file.
    path, row
        The file, and the number of the record in it, from 0.
    column
        Field with the image.

    Examples
    --------
    >>> from pathlib import Path
    >>> from behavior.benchmarks.image_cells import find_image
    >>> from concepts.reading.record import Record
    >>> record = Record("row 1", {"image": {"bytes": b"abc", "path": "a.png"}})
    >>> find_image(record, Path("q.parquet"), 0).name
    'a.png'
    """
    value: Any = record.values.get(column)
    name = ""
    if isinstance(value, Mapping):
        name, value = value.get("path") or "", value.get("bytes")
    if isinstance(value, str) and _is_content(value):
        value = value.encode(errors="replace")
    if not isinstance(value, bytes | bytearray):
        return None
    return ImageCell(path, row, column, name if is_text(name) and name else hashlib.sha256(value).hexdigest()[:16])


def _is_content(value: str) -> bool:
    return len(value) > LONGEST_NAME and not Path(value[:LONGEST_NAME]).is_absolute()


def read_images(cells: Iterable[ImageCell]) -> dict[ImageCell, ImageSource]:
    """Return the images of some cells, in memory as the files' bytes; each file is read once, to the last of its cells.

    Raises
    ------
    DataError
        Names the file, row and column: for a cell that is not an image, or an image that cannot be read.
    """
    wanted: dict[Path, dict[int, list[ImageCell]]] = {}
    for cell in cells:
        wanted.setdefault(cell.file, {}).setdefault(cell.row, []).append(cell)
    pictures = Pictures(None)
    images: dict[ImageCell, ImageSource] = {}
    for path, rows in wanted.items():
        last = max(rows)
        for number, record in enumerate(read_rows(path)):
            for cell in dict.fromkeys(rows.get(number, ())):
                images[cell] = pictures.find(record.field(cell.column), record.where, cell.column)
            if number == last:
                break
    pictures.check()
    return images


def check_image_folder(images: Path, files: Mapping[str, Path]) -> None:
    """Raise `DataError` unless `images` is a folder, or one of the question files, which then has the images inside."""
    if images.is_dir() or (
        images.is_file() and any(path.is_file() and path.samefile(images) for path in files.values())
    ):
        return
    if images.exists():
        msg = (
            f"'{images}' is a file: give the folder of the images; if the questions have their images inside, give the same file "
            "as 'questions' and as images"
        )
    else:
        msg = f"image folder '{images}' does not exist"
    raise DataError(msg)
