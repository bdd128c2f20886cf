"""An image that a user passes as a path, a Pillow image, an array or an image source, as an RGB image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groundscope.core.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False)
class MemoryImage:
    """An RGB image in memory as a `concepts.image_source.ImageSource`.

    Examples
    --------
    >>> from PIL import Image
    >>> from lvlm.images import MemoryImage
    >>> red, same = (MemoryImage.of(Image.new("RGB", (4, 3), "red")) for _ in range(2))
    >>> red.identity == same.identity, red.load().size
    (True, (4, 3))
    """

    image: Image.Image
    identity: str
    """Digest of the pixels and their shape."""

    @classmethod
    def of(cls, image: Image.Image) -> MemoryImage:
        """Return the source of an RGB image."""
        return cls(image, hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest())

    def load(self) -> Image.Image:
        """Return the image."""
        return self.image


def as_rgb(image: Any) -> Image.Image:
    """Return an image as 8-bit RGB, upright, with transparent pixels on white.

    Parameters
    ----------
    image
        Path, Pillow image, array of unsigned bytes ``[height, width]``, ``[height, width, 3]`` or ``[height, width, 4]``, or a
        `concepts.image_source.ImageSource`.

    Raises
    ------
    DataError
        If the file cannot be read, or the values or the shape of an array could be read in several ways.

    Examples
    --------
    >>> import numpy as np
    >>> from lvlm.images import as_rgb
    >>> as_rgb(np.zeros((4, 6), np.uint8)).size  # width, height
    (6, 4)
    """
    from PIL import Image

    from concepts.image_files import FileImage, to_rgb

    if isinstance(image, str | Path):
        return FileImage(Path(image), str(image)).load()
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if hasattr(image, "load") and hasattr(image, "identity"):
        return image.load()
    values = np.asarray(image)
    if values.dtype != np.uint8:
        msg = (
            f"an image of type {type(image).__name__} with values of type {values.dtype}; give a path, a Pillow image, or an "
            "array of uint8 from 0 to 255"
        )
        raise DataError(msg)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or not values.size:
        msg = (
            f"an image array of shape {list(values.shape)}; it must be [height, width], [height, width, 3] or "
            "[height, width, 4]"
        )
        raise DataError(msg)
    return to_rgb(Image.fromarray(np.ascontiguousarray(values)))
