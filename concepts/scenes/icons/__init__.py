"""The pictures scenes are made of: 24 Noto emoji, and how one is given another color.

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
"""Share of the icon's own light-dark contrast that survives recoloring; all of it would turn dark orange brown."""


@cache
def icon(noun: str, color: str, pixels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a noun in a color at a size.

    The icon's luminance, centred on the luminance of the wanted color, picks a point on the line black - color -
    white: outlines stay dark, highlights stay light, everything between takes the hue.

    Parameters
    ----------
    noun, color
        Names of `NOUNS` and `COLORS`.
    pixels
        Side of the square result.

    Returns
    -------
    rgb, alpha
        float32 ``[pixels, pixels, 3]`` in 0..255, not multiplied by alpha, and float32 ``[pixels, pixels, 1]`` in 0..1.
        Shared between callers: do not write into them.

    Raises
    ------
    DataError
        For a noun or color that does not exist.
    """
    if noun not in NOUNS:
        msg = f"no icon for '{noun}': there are {', '.join(NOUNS)}"
        raise DataError(msg)
    if color not in COLORS:
        msg = f"no color '{color}': there are {', '.join(COLORS)}"
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
    # Resize premultiplied, so that the transparent surround does not bleed into the edge.
    small = _resize(np.concatenate([rgb * alpha, alpha * 255], axis=-1), pixels)
    out_alpha = small[..., 3:] / 255
    out_rgb = small[..., :3] / np.maximum(out_alpha, 1e-6)
    return np.clip(out_rgb, 0, 255).astype(np.float32), out_alpha.astype(np.float32)


def _resize(channels: NDArray[np.float64], pixels: int) -> NDArray[np.float64]:
    """Box-resize each channel of ``[64, 64, C]``; integers, so every machine gets the same pixels."""
    planes = [
        Image.fromarray(np.rint(channels[..., c]).astype(np.uint8)).resize((pixels, pixels), Image.Resampling.BOX)
        for c in range(channels.shape[-1])
    ]
    return np.stack([np.asarray(p, dtype=np.float64) for p in planes], axis=-1)
