"""Image files that people bring: kept inside their folder, checked before they are used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageOps

from groundscope.core.errors import DataError


def inside(folder: Path, name: str, root: Path | None = None) -> Path:
    """Return the path of a file that a list names, under the folder that the list was given with.

    Parameters
    ----------
    folder
        The folder; may itself be a link.
    name
        Relative path as the list has it, with either kind of slash. What it names need not exist.
    root
        The folder with all links followed, where that is known: lists name a hundred thousand files of one folder.

    Raises
    ------
    DataError
        Where the name is empty, absolute, or leads out of the folder, through ``..`` or through a link.
    """
    plain = name.replace("\\", "/")
    # What begins with a slash, or with a letter and a colon, is absolute on some system.
    if not plain.strip() or "\0" in plain or plain.startswith("/") or plain[1:2] == ":":
        msg = f"image path '{name}' must be relative to the image folder '{folder}'"
        raise DataError(msg)
    try:
        root = folder.resolve() if root is None else root
        path = _without_links(root, plain) or (root / plain).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, a name longer than the system allows
        msg = f"image path '{name}' cannot be followed under '{folder}': {error}"
        raise DataError(msg) from error
    if not path.is_relative_to(root) or path == root:
        msg = f"image path '{name}' leaves the image folder '{folder}': put the file itself there"
        raise DataError(msg)
    return path


def _without_links(root: Path, plain: str) -> Path | None:
    """Return a path under the root, one look a part; None where a part is a link or ``..``, or nothing is left."""
    at, parts = str(root), [part for part in plain.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        return None
    for part in parts:
        at = os.path.join(at, part)  # noqa: PTH118  # a Path for each part takes longer than all the rest
        try:
            if stat.S_ISLNK(os.lstat(at).st_mode):
                return None
        except (FileNotFoundError, NotADirectoryError):
            break
    return Path(root, *parts)


@dataclass(frozen=True)
class FileImage:
    """An image file as an `ImageSource`; nothing is read before it is asked for."""

    path: Path
    name: str
    """What to call it: its path under the image folder, the same on every machine."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, read once."""
        with _explained(self.path), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def identity(self) -> str:
        """The name and the file's digest as JSON: equal for equal images, whatever folder they are in."""
        return json.dumps({"file": self.name, "sha256": self.digest})

    def check(self) -> None:
        """Read the header only; raises `DataError` where there is no file, no image or too many pixels."""
        if not self.path.is_file():
            what = "is not a file" if self.path.exists() else "does not exist"
            msg = f"image '{self.path}' {what}"
            raise DataError(msg)
        with _explained(self.path), Image.open(self.path):
            pass

    def load(self) -> Image.Image:
        """Return the image as RGB, upright as its EXIF orientation says.

        Raises
        ------
        DataError
            Where it cannot be read, or has more pixels than Pillow's limit against decompression bombs.
        """
        self.check()
        with _explained(self.path), Image.open(self.path) as image:
            upright = ImageOps.exif_transpose(image)
            if "transparency" in upright.info:
                upright = upright.convert("RGBA")  # a palette with transparent entries warns on its way to RGB
            return upright.convert("RGB")


@dataclass(frozen=True)
class Cropped:
    """A box of an image as an `ImageSource`."""

    base: FileImage
    box: tuple[float, float, float, float]
    """Left, upper, right and lower edge in pixels; what reaches over the image is black."""

    @property
    def identity(self) -> str:
        """The box, and the identity of the whole image."""
        return json.dumps({"crop": list(self.box), "of": json.loads(self.base.identity)})

    def load(self) -> Image.Image:
        """Return the box as RGB, its edges rounded as Pillow's `crop` does; raises `DataError` as the whole does."""
        whole = self.base.load()
        left, upper, right, lower = (round(edge) for edge in self.box)
        if left >= whole.width or upper >= whole.height or right <= 0 or lower <= 0:
            msg = f"image '{self.base.path}' of {whole.width} x {whole.height} pixels has nothing in box {self.box}"
            raise DataError(msg)
        return whole.crop((left, upper, right, lower))


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever Pillow or the system raises on a bad file into a `DataError` that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        msg = f"image '{path}' is refused as a decompression bomb: {error}"
        raise DataError(msg) from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        msg = f"image '{path}' cannot be read: {error}"
        raise DataError(msg) from error
