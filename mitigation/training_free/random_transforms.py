"""Random transforms of images in Pillow, equal to their definitions in torchvision, which is not needed.

`draw` chooses the parameters, `Transform.apply` changes an image; so each transform can be compared with a written definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance

from concepts.image_source import ImageSource

Kind = Literal["horizontal flip", "vertical flip", "rotation", "color jitter", "gaussian blur", "crop"]
KINDS: tuple[Kind, ...] = ("horizontal flip", "vertical flip", "rotation", "color jitter", "gaussian blur", "crop")
_JITTERS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Transform:
    """A transform with its parameters.

    Examples
    --------
    >>> from PIL import Image
    >>> from mitigation.training_free.random_transforms import Transform
    >>> image = Image.new("RGB", (2, 1), "red")
    >>> image.putpixel((1, 0), (0, 0, 255))
    >>> Transform("horizontal flip").apply(image).getpixel((0, 0))
    (0, 0, 255)
    """

    kind: Kind
    values: tuple[float, ...] = ()
    """Rotation: angle in degrees, counterclockwise. Blur: kernel size, sigma. Crop: left, top, width, height, size of the result.
    Color jitter: factors of brightness, contrast, saturation and the shift of the hue."""
    order: tuple[int, ...] = ()
    """Order of the four parts of color jitter."""

    def apply(self, image: Image.Image) -> Image.Image:
        """Return the transformed RGB image."""
        if self.kind == "horizontal flip":
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.kind == "vertical flip":
            return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if self.kind == "rotation":
            return image.rotate(self.values[0], Image.Resampling.NEAREST, expand=False, fillcolor=0)
        if self.kind == "color jitter":
            for part in self.order:
                image = _jitter(image, _JITTERS[part], self.values[part])
            return image
        if self.kind == "gaussian blur":
            return _blur(image, int(self.values[0]), self.values[1])
        left, top, width, height, size = (int(value) for value in self.values)
        part = image.crop((left, top, left + width, top + height))
        return part.resize((size, size), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class TransformedImage:
    """A transformed image as an `ImageSource`."""

    source: ImageSource
    transform: Transform

    @property
    def identity(self) -> str:
        """Identity of the source and the transform."""
        return f"{self.source.identity} {self.transform}"

    def load(self) -> Image.Image:
        """Return the transformed image."""
        return self.transform.apply(self.source.load())


def draw(kind: Kind, size: tuple[int, int], rng: np.random.Generator, *, crop_size: int = 336) -> Transform:
    """Draw the parameters of a transform for an image of a width and height.

    The distributions are those of RITUAL's release: ``RandomRotation(180)``, ``ColorJitter(1, 1, 1, 0.5)``,
    ``GaussianBlur(13, (1.5, 2))`` and ``RandomResizedCrop(336)`` of torchvision.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation.training_free.random_transforms import draw
    >>> draw("gaussian blur", (112, 112), np.random.default_rng(0)).values[0]
    13.0
    """
    if kind == "rotation":
        return Transform(kind, (float(rng.uniform(-180, 180)),))
    if kind == "color jitter":
        order = tuple(int(part) for part in rng.permutation(4))
        return Transform(kind, (*(float(x) for x in rng.uniform(0, 2, 3)), float(rng.uniform(-0.5, 0.5))), order)
    if kind == "gaussian blur":
        return Transform(kind, (13.0, float(rng.uniform(1.5, 2.0))))
    if kind == "crop":
        return Transform(kind, (*_crop(size, rng), float(crop_size)))
    return Transform(kind)


def _crop(size: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Return left, top, width and height of a crop with 0.08 to 1 of the area and a ratio of 3:4 to 4:3."""
    width, height = size
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return float(rng.integers(0, width - w + 1)), float(rng.integers(0, height - h + 1)), float(w), float(h)
    # As in torchvision: the largest central crop whose ratio is in the range.
    if width / height < low:
        w, h = width, round(width / low)
    elif width / height > high:
        w, h = round(height * high), height
    else:
        w, h = width, height
    return float((width - w) // 2), float((height - h) // 2), float(w), float(h)


def _jitter(image: Image.Image, part: str, value: float) -> Image.Image:
    if part == "brightness":
        return ImageEnhance.Brightness(image).enhance(value)
    if part == "contrast":
        return ImageEnhance.Contrast(image).enhance(value)
    if part == "saturation":
        return ImageEnhance.Color(image).enhance(value)
    hue, saturation, lightness = image.convert("HSV").split()
    shifted = (np.asarray(hue).astype(np.int64) + int(value * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(shifted.astype(np.uint8)), saturation, lightness)).convert("RGB")


def _blur(image: Image.Image, size: int, sigma: float) -> Image.Image:
    """Convolve with a Gaussian kernel of `size` columns and rows; the border is reflected, results are rounded."""
    offsets = np.arange(size) - (size - 1) / 2
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    values = np.asarray(image).astype(np.float64)
    margin = size // 2
    for axis in (0, 1):
        pad = [(margin, margin) if i == axis else (0, 0) for i in range(3)]
        padded = np.pad(values, pad, mode="reflect")
        parts = (np.take(padded, range(i, i + values.shape[axis]), axis) * kernel[i] for i in range(size))
        values = np.sum(list(parts), axis=0)
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
