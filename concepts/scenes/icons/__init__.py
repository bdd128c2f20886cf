"""The icons of scenes: 24 Noto emoji, and their recoloring.

Images: Noto Emoji by Google, Apache-2.0 (see NOTICE); 64 x 64 RGBA, one file a noun.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from io import BytesIO
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groundscope.core.errors import DataError
from groundscope.core.text import nearest

NOUNS: tuple[str, ...] = (
    "airplane", "apple", "balloon", "banana", "bell", "bike", "bird", "boat", "bus", "butterfly", "car", "cat",
    "chair", "dog", "fish", "guitar", "heart", "key", "pear", "star", "tree", "tulip", "turtle", "umbrella",
)  # fmt: skip

COLORS: MappingProxyType[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (214, 32, 36),
        "orange": (255, 132, 0),
        "yellow": (252, 216, 32),
        "green": (38, 160, 52),
        "blue": (36, 92, 220),
        "purple": (142, 48, 178),
    }
)

_LUMA = np.array([0.299, 0.587, 0.114])
_CONTRAST = 0.75
"""Factor of the icon's own light-dark contrast after recoloring; with 1, dark orange would look brown."""


@cache
def icon(noun: str, color: str, pixels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the icon of a noun in a color and size.

    The luminance of each pixel, shifted so that its median is that of the color, selects a point on the line from black over
    the color to white: outlines stay dark, highlights stay light, and all between gets the hue.

    Parameters
    ----------
    noun, color
        Names of `NOUNS` and `COLORS`.
    pixels
        Side of the square icon.

    Returns
    -------
    rgb, alpha
        float32 ``[pixels, pixels, 3]`` from 0 to 255, not multiplied by alpha, and float32 ``[pixels, pixels, 1]`` from 0 to
        1. Both are cached and shared: do not modify them.

    Raises
    ------
    DataError
        For an unknown noun or color.

    Examples
    --------
    >>> from concepts.scenes.icons import icon
    >>> rgb, alpha = icon("apple", "green", 30)
    >>> rgb.shape, alpha.shape
    ((30, 30, 3), (30, 30, 1))
    """
    for kind, name, names in (("icon", noun, NOUNS), ("color", color, tuple(COLORS))):
        if name not in names:
            msg = f"unknown {kind} '{name}'; choose from {', '.join(names)}{nearest(name, names)}"
            raise DataError(msg)
    png = files("concepts.scenes.icons").joinpath(f"{noun}.png").read_bytes()
    with Image.open(BytesIO(png), formats=("PNG",)) as image:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float64)
    alpha = rgba[..., 3:] / 255
    luma = rgba[..., :3] @ _LUMA / 255
    base = np.array(COLORS[color], dtype=np.float64)
    base_luma = float(base @ _LUMA / 255)
    center = float(np.median(luma[alpha[..., 0] > 0.5]))
    target = np.clip(base_luma + _CONTRAST * (luma - center), 0.0, 1.0)[..., None]
    darker = base * np.minimum(target / base_luma, 1.0)
    lighten = np.clip((target - base_luma) / (1 - base_luma), 0.0, 1.0)
    rgb = darker + (255 - darker) * lighten
    # Multiply by alpha before resizing, so that transparent pixels do not change the color at the edge.
    resized = _resize(np.concatenate([rgb * alpha, alpha * 255], axis=-1), pixels)
    resized_alpha = resized[..., 3:] / 255
    resized_rgb = resized[..., :3] / np.maximum(resized_alpha, 1e-6)
    return np.clip(resized_rgb, 0, 255).astype(np.float32), resized_alpha.astype(np.float32)


def _resize(channels: NDArray[np.float64], pixels: int) -> NDArray[np.float64]:
    """Resize each channel of ``[64, 64, C]`` with a box filter, in integers, which are the same on every machine."""
    planes = [
        Image.fromarray(np.rint(channels[..., c]).astype(np.uint8)).resize((pixels, pixels), Image.Resampling.BOX)
        for c in range(channels.shape[-1])
    ]
    return np.stack([np.asarray(p, dtype=np.float64) for p in planes], axis=-1)
