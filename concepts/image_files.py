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
from typing import IO, TYPE_CHECKING, cast

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from groundscope.core.errors import DataError, GroundscopeError
from groundscope.core.user_files import open_regular

if TYPE_CHECKING:
    from io import BufferedReader

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""File formats that are decoded, all by Pillow itself; for others, as PostScript, Pillow would start another program."""
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


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


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image file says of its pixels before they are decoded."""

    size: tuple[int, int]
    """Width and height of the pixels as stored."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 where the stored pixels are upright."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height of the image as `FileImage.load` returns it."""
        width, height = self.size
        return (height, width) if self.orientation >= 5 else (width, height)


@dataclass(frozen=True)
class FileImage:
    """An image file as an `ImageSource`; nothing is read before it is asked for."""

    path: Path
    name: str
    """What to call it: its path under the image folder, the same on every machine."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, read once."""
        with _explained(self.path), open_regular(self.path) as file:
            return hashlib.file_digest(cast("BufferedReader", file), "sha256").hexdigest()

    @property
    def identity(self) -> str:
        """The name and the file's digest as JSON: equal for equal images, whatever folder they are in."""
        return json.dumps({"file": self.name, "sha256": self.digest})

    @cached_property
    def header(self) -> ImageHeader:
        """Size and EXIF orientation, read once, without the pixels; raises `DataError` as `check`."""
        with open_image(self.path) as image:
            return ImageHeader(image.size, _orientation(image))

    def check(self) -> None:
        """Read the header only; raises `DataError` for a file that `load` refuses without decoding its pixels."""
        _ = self.header

    def load(self) -> Image.Image:
        """Return the image as RGB, upright as its EXIF orientation says, over white where it is transparent.

        Raises
        ------
        DataError
            Where it cannot be read, is of a format not in `FORMATS`, has values that `to_rgb` cannot show, or more pixels
            than Pillow's limit against decompression bombs.
        """
        with open_image(self.path) as image:
            return to_rgb(image)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file of a user: its header is read and checked, its pixels are not decoded.

    Every image of a user is opened here. Errors of the block are explained too, as pixels are decoded in it.

    Raises
    ------
    DataError
        Where there is no regular file, it is no picture of one of `FORMATS`, or its header shows what `FileImage.load`
        refuses.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        msg = f"image '{path}' {what}"
        raise DataError(msg)
    with _explained(path), open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
        kind = _unknown_range(image)
        if kind:
            msg = f"image '{path}' holds {kind}: convert it to 8 or 16 bits a channel, gray or RGB"
            raise DataError(msg)
        yield image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an open image as 8-bit RGB, upright as its EXIF orientation says.

    Gray of 16 bits (9 to 16 in TIFF) is scaled by its range to 0 to 255. What is transparent, by an alpha channel, a
    palette or one transparent color, shows white. Of an animation the first frame is returned.

    Parameters
    ----------
    image
        Opened by `open_image`.
    """
    white = _sixteen_bit_white(image)
    inverted = white is not None and _tiff_tag(image, 262) == 0  # WhiteIsZero, which Pillow inverts for 8 bits only
    upright = ImageOps.exif_transpose(image)
    if white is not None:
        import numpy as np

        values = np.asarray(upright)
        clear = upright.info.get("transparency")
        alpha = values != clear if isinstance(clear, int) else None
        gray = np.rint(np.clip(values.astype(np.float64) / white, 0, 1) * 255).astype(np.uint8)
        gray = 255 - gray if inverted else gray
        return Image.fromarray(gray if alpha is None else np.where(alpha, gray, 255).astype(np.uint8)).convert("RGB")
    if upright.mode in {"La", "RGBa"}:  # premultiplied
        upright = upright.convert({"La": "LA", "RGBa": "RGBA"}[upright.mode])
    if upright.mode in {"LA", "PA", "RGBA"} or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        canvas = Image.new("RGB", rgba.size, "white")
        canvas.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        return canvas
    return upright.convert("RGB")


def _sixteen_bit_white(image: Image.Image) -> int | None:
    """Return the value of white of 16-bit gray; None for other images."""
    if image.mode in _SIXTEEN_BITS:
        bits = _tiff_tag(image, 258)  # BitsPerSample
        return 2 ** (bits if isinstance(bits, int) else 16) - 1
    # Pillow reads some 16-bit files as 32-bit integers; PNG and PGM hold no more than 16 bits.
    return 65535 if image.mode == "I" and image.format in {"PNG", "PPM"} else None


def _tiff_tag(image: Image.Image, number: int) -> object:
    tags = getattr(image, "tag_v2", {})
    value = tags.get(number)
    return value[0] if isinstance(value, tuple) and value else value


def _unknown_range(image: Image.Image) -> str | None:
    """Name the kind of values for which it is not known what is black and what is white."""
    if image.mode in _EIGHT_BITS or _sixteen_bit_white(image) is not None:
        return None
    kinds = {"I": "32-bit integers", "F": "32-bit floating-point numbers"}
    return f"{kinds.get(image.mode, f'pixels of mode {image.mode}')}, which have no defined black and white"


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that `ImageOps.exif_transpose` applies, without decoding pixels."""
    late = image.format == "PNG" and "exif" not in image.info and _has_late_metadata(getattr(image, "fp", None))
    exif = image.getexif() if late or image.format != "PNG" else Image.Image.getexif(image)
    value = exif.get(ExifTags.Base.Orientation, 1)
    return value if value in range(2, 9) else 1


def _has_late_metadata(file: IO[bytes] | None) -> bool:
    """Whether chunks that may hold EXIF follow the pixels of a PNG file, where Pillow finds them by decoding."""
    if file is None:
        return True
    place, pixels = file.tell(), False
    try:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", start)
            if pixels and name in {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}:
                return True
            pixels = pixels or name == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(place)


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
    except GroundscopeError:
        raise
    except UnidentifiedImageError as error:
        msg = f"image '{path}' cannot be read: it is no picture of the formats {', '.join(FORMATS)}"
        raise DataError(msg) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        msg = f"image '{path}' is refused as a decompression bomb: {error}"
        raise DataError(msg) from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        msg = f"image '{path}' cannot be read: {error}"
        raise DataError(msg) from error
