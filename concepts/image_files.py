"""Image files of users: paths confined to their folder, headers checked before decoding, pixels converted to RGB."""

from __future__ import annotations

import contextlib
import hashlib
import io
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
"""Accepted file formats. Pillow decodes these itself; for others, such as PostScript, it would start another program."""
_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def resolve_inside(folder: Path, name: str, root: Path | None = None) -> Path:
    """Return the absolute path of a file below a folder, for a relative path from a user's file.

    Parameters
    ----------
    folder
        The folder; may be a symbolic link.
    name
        Relative path, with slashes or backslashes. The file need not exist.
    root
        The folder with all symbolic links resolved, if known; saves time for lists of many files.

    Raises
    ------
    DataError
        If the name is empty, absolute, or leads out of the folder by ``..`` or a symbolic link.
    """
    plain = name.replace("\\", "/")
    # A leading slash, or a letter and a colon, makes a path absolute on some systems.
    if not plain.strip() or "\0" in plain or plain.startswith("/") or plain[1:2] == ":":
        msg = f"image path '{name}' must be relative to the image folder '{folder}'"
        raise DataError(msg)
    try:
        root = folder.resolve() if root is None else root
        path = _without_links(root, plain) or (root / plain).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, or a name longer than the system allows
        msg = f"image path '{name}' cannot be resolved in '{folder}': {error}"
        raise DataError(msg) from error
    if not path.is_relative_to(root) or path == root:
        msg = f"image path '{name}' leaves the image folder '{folder}'; copy the file into the folder"
        raise DataError(msg)
    return path


def _without_links(root: Path, plain: str) -> Path | None:
    """Return a path below the root; None if a part of it is a link or ``..``, or it has no parts."""
    current, parts = str(root), [part for part in plain.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        return None
    for part in parts:
        current = os.path.join(current, part)  # noqa: PTH118  # a Path for each part takes most of the time
        try:
            if stat.S_ISLNK(os.lstat(current).st_mode):
                return None
        except (FileNotFoundError, NotADirectoryError):
            break
    return Path(root, *parts)


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Size and orientation of an image file, read without decoding its pixels."""

    size: tuple[int, int]
    """Width and height of the stored pixels."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 if the stored pixels are upright."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height of the image as `FileImage.load` returns it."""
        width, height = self.size
        return (height, width) if self.orientation >= 5 else (width, height)


@dataclass(frozen=True)
class FileImage:
    """An image file as an `ImageSource`; the file is read on first use.

    Examples
    --------
    >>> from concepts import FileImage
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> path = Path(tempfile.mkdtemp()) / "a.png"
    >>> Image.new("L", (4, 3)).save(path)
    >>> image = FileImage(path, "a.png")
    >>> image.header.upright_size, image.load().mode
    ((4, 3), 'RGB')
    """

    path: Path
    name: str = ""
    """Path relative to the image folder, the same on every machine; empty: the file's own name."""

    def __post_init__(self) -> None:
        path = Path(self.path)
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "name", self.name or path.name)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, read once."""
        with _convert_errors(self.path), open_regular(self.path) as file:
            return hashlib.file_digest(cast("BufferedReader", file), "sha256").hexdigest()

    @property
    def identity(self) -> str:
        """Name and digest of the file as JSON; independent of the image folder."""
        return json.dumps({"file": self.name, "sha256": self.digest})

    @cached_property
    def header(self) -> ImageHeader:
        """Size and EXIF orientation, read once; raises `DataError` as `check` does."""
        with open_image(self.path) as image:
            return ImageHeader(image.size, _orientation(image))

    def check(self) -> None:
        """Read the header; raises `DataError` if `load` would refuse the file before decoding its pixels."""
        _ = self.header

    def load(self) -> Image.Image:
        """Return the image as RGB, rotated by its EXIF orientation, with transparent pixels on white.

        Raises
        ------
        DataError
            If the file cannot be read, its format is not in `FORMATS`, `to_rgb` cannot convert its pixels, or it has more
            pixels than Pillow's limit against decompression bombs.
        """
        with open_image(self.path) as image:
            return to_rgb(image)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open a user's image file and check its header without decoding its pixels.

    All images of users are opened by this function. Errors inside the ``with`` block, which decodes the pixels, become a
    `DataError` too.

    Raises
    ------
    DataError
        If the path is not a regular file or not an image in one of `FORMATS`, or if `FileImage.load` would refuse it
        because of its header.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        msg = f"image '{path}' {what}"
        raise DataError(msg)
    with _convert_errors(path), open_regular(path) as file, _opened(file, path) as image:
        yield image


@contextlib.contextmanager
def _opened(file: IO[bytes], name: Path | str) -> Iterator[Image.Image]:
    """Open an image from a file object; raises `DataError` for pixels without a defined range."""
    with Image.open(file, formats=FORMATS) as image:
        problem = _undefined_range(image)
        if problem:
            msg = f"image '{name}' contains {problem}; convert it to gray or RGB with 8 or 16 bits per channel"
            raise DataError(msg)
        yield image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an open image as 8-bit RGB, rotated by its EXIF orientation.

    Gray values of 16 bits (9 to 16 in TIFF) are scaled to 0 to 255. Transparent pixels (alpha channel, palette, or one
    transparent color) become white. Of an animation, the first frame is returned.

    Parameters
    ----------
    image
        Opened by `open_image`.
    """
    white = _sixteen_bit_white(image)
    inverted = white is not None and _tiff_tag(image, 262) == 0  # WhiteIsZero, which Pillow inverts only for 8 bits
    upright = ImageOps.exif_transpose(image)
    if white is not None:
        import numpy as np

        values = np.asarray(upright)
        transparent = upright.info.get("transparency")
        opaque = values != transparent if isinstance(transparent, int) else None
        gray = np.rint(np.clip(values.astype(np.float64) / white, 0, 1) * 255).astype(np.uint8)
        gray = 255 - gray if inverted else gray
        return Image.fromarray(gray if opaque is None else np.where(opaque, gray, 255).astype(np.uint8)).convert("RGB")
    if upright.mode in {"La", "RGBa"}:  # premultiplied
        upright = upright.convert({"La": "LA", "RGBa": "RGBA"}[upright.mode])
    if upright.mode in {"LA", "PA", "RGBA"} or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        canvas = Image.new("RGB", rgba.size, "white")
        canvas.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        return canvas
    return upright.convert("RGB")


def _sixteen_bit_white(image: Image.Image) -> int | None:
    """Return the value of white in a 16-bit gray image; None for other images."""
    if image.mode in _SIXTEEN_BITS:
        bits = _tiff_tag(image, 258)  # BitsPerSample
        return 2 ** (bits if isinstance(bits, int) else 16) - 1
    # Pillow reads some 16-bit files as 32-bit integers; PNG and PGM have at most 16 bits.
    return 65535 if image.mode == "I" and image.format in {"PNG", "PPM"} else None


def _tiff_tag(image: Image.Image, number: int) -> object:
    tags = getattr(image, "tag_v2", {})
    value = tags.get(number)
    return value[0] if isinstance(value, tuple) and value else value


def _undefined_range(image: Image.Image) -> str | None:
    """Describe pixel values whose black and white are not defined; None if they are."""
    if image.mode in _EIGHT_BITS or _sixteen_bit_white(image) is not None:
        return None
    kinds = {"I": "32-bit integers", "F": "32-bit floating-point numbers"}
    return f"{kinds.get(image.mode, f'pixels of mode {image.mode}')}, which have no defined black and white"


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that `ImageOps.exif_transpose` applies, without decoding pixels where possible."""
    after_pixels = image.format == "PNG" and "exif" not in image.info and _may_have_exif_after_pixels(image)
    exif = image.getexif() if after_pixels or image.format != "PNG" else Image.Image.getexif(image)
    value = exif.get(ExifTags.Base.Orientation, 1)
    return value if value in range(2, 9) else 1


def _may_have_exif_after_pixels(image: Image.Image) -> bool:
    """Whether a PNG file may have EXIF chunks after its pixels, which Pillow reads only when it decodes them."""
    file: IO[bytes] | None = getattr(image, "fp", None)
    if file is None:
        return True
    position, pixels = file.tell(), False
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
        file.seek(position)


@dataclass(frozen=True)
class BytesImage:
    """The content of an image file in memory as an `ImageSource`: from a column of a table, a request, or an archive.

    Examples
    --------
    >>> import io
    >>> from PIL import Image
    >>> import groundscope as gs
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (4, 3), "red").save(file, format="PNG")
    >>> image = gs.BytesImage(file.getvalue(), "row 7")
    >>> image.load().size, image.header.upright_size
    ((4, 3), (4, 3))
    """

    data: bytes
    """The file's bytes, in one of `FORMATS`."""
    name: str = "image in memory"
    """Name in error messages, such as a file name or the row of a table."""

    def __repr__(self) -> str:
        return f"BytesImage({len(self.data):,} bytes, {self.name!r})"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def identity(self) -> str:
        """The digest as JSON; independent of the name."""
        return json.dumps({"sha256": self.digest})

    @cached_property
    def header(self) -> ImageHeader:
        """Size and EXIF orientation; raises `DataError` as `check` does."""
        with self._open() as image:
            return ImageHeader(image.size, _orientation(image))

    def check(self) -> None:
        """Read the header; raises `DataError` if `load` would refuse the bytes before decoding their pixels."""
        _ = self.header

    def load(self) -> Image.Image:
        """Return the image as RGB, as `FileImage.load` does; raises `DataError` for the same problems."""
        with self._open() as image:
            return to_rgb(image)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Image.Image]:
        with _convert_errors(self.name), _opened(io.BytesIO(self.data), self.name) as image:
            yield image


@dataclass(frozen=True)
class CroppedImage:
    """A box of an image file as an `ImageSource`."""

    base: FileImage
    box: tuple[float, float, float, float]
    """Left, upper, right and lower edge in pixels; parts of the box outside the image are black."""

    @property
    def identity(self) -> str:
        """The box and the identity of the whole image as JSON."""
        return json.dumps({"crop": list(self.box), "of": json.loads(self.base.identity)})

    def load(self) -> Image.Image:
        """Return the box as RGB, with its edges rounded to whole pixels as by Pillow's `crop`.

        Raises
        ------
        DataError
            As `FileImage.load`; also if the box does not overlap the image.
        """
        whole = self.base.load()
        left, upper, right, lower = (round(edge) for edge in self.box)
        if left >= whole.width or upper >= whole.height or right <= 0 or lower <= 0:
            msg = (
                f"image '{self.base.path}' of {whole.width} x {whole.height} pixels does not overlap the box {self.box}"
            )
            raise DataError(msg)
        return whole.crop((left, upper, right, lower))


@contextlib.contextmanager
def _convert_errors(path: Path | str) -> Iterator[None]:
    """Convert the errors of Pillow and of the system for a bad file into a `DataError` that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except GroundscopeError:
        raise
    except UnidentifiedImageError as error:
        msg = f"image '{path}' cannot be read: not an image in one of the formats {', '.join(FORMATS)}"
        raise DataError(msg) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        msg = f"image '{path}' is refused as a decompression bomb: {error}"
        raise DataError(msg) from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        msg = f"image '{path}' cannot be read: {error}"
        raise DataError(msg) from error
