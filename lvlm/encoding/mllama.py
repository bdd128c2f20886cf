"""Llama-3.2-Vision: the image is not in the decoder's sequence; cross-attention layers read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lvlm.encoding.encoded_image import Look, patch_size, processed, stretched
from lvlm.token_map import Lattice

if TYPE_CHECKING:
    from PIL import Image

    from lvlm.model import Lvlm


def mllama(model: Lvlm, image: Image.Image) -> Look:
    """Tiles of a canvas in whose upper left corner the image lies, its shape kept; every tile keeps its class token."""
    out = processed(model, image)
    pixels: Tensor = out["pixel_values"]  # [1, 1, most tiles, C, side, side]
    side, slots = int(pixels.shape[-1]), int(pixels.shape[2])
    shapes = model.hf.config.vision_config.supported_aspect_ratios
    high, wide = shapes[int(out["aspect_ratio_ids"][0, 0]) - 1]
    width, height = image.size
    shown_x, shown_y = fitted(width, height, wide * side, high * side, side)
    canvas = stretched(image.size, shown_x, shown_y)
    small = side // patch_size(model)
    grids = [canvas.part(c * side, r * side).grid(small, small, side, side) for r in range(high) for c in range(wide)]
    count = small**2 + 1
    padded = -(-count // 8) * 8  # the tower fills each tile up to a multiple of 8
    vision, projector = [], []
    for n, grid in enumerate(grids):
        kind = "tile" if len(grids) > 1 else "view"
        vision.append(Lattice(tuple(range(n * padded + 1, n * padded + count)), grid, kind))
        projector.append(Lattice(tuple(range(n * count + 1, n * count + count)), grid, kind))
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    return Look(
        model.content_token,
        {name: out[name] for name in names},
        {"vision": tuple(vision), "projector": tuple(projector)},
        {"vision": slots * padded, "projector": slots * count},
    )


def fitted(width: int, height: int, wide: int, high: int, side: int) -> tuple[int, int]:
    """Return the size at which an image lies in a canvas: no larger than the canvas, no smaller than a tile."""
    target_x, target_y = min(max(width, side), wide), min(max(height, side), high)
    scale_x, scale_y = target_x / width, target_y / height
    if scale_x < scale_y:
        return target_x, min(int(height * scale_x) or 1, target_y)
    return min(int(width * scale_y) or 1, target_x), target_y
