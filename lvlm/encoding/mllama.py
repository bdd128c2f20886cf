"""Llama-3.2-Vision: cross-attention layers read the image, which is not in the decoder's sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lvlm.encoding.image_processing import patch_size, process_image, whole_frame
from lvlm.interfaces import EncodedImage, Model
from lvlm.token_map import ImageView

if TYPE_CHECKING:
    from PIL import Image


def mllama(model: Model, image: Image.Image) -> EncodedImage:
    """Llama-3.2-Vision: tiles of a canvas with the image in its top left corner; every tile keeps its class token."""
    out = process_image(model, image)
    pixels: Tensor = out["pixel_values"]  # [1, 1, most tiles, C, side, side]
    side, slots = int(pixels.shape[-1]), int(pixels.shape[2])
    shapes = model.hf.config.vision_config.supported_aspect_ratios
    high, wide = shapes[int(out["aspect_ratio_ids"][0, 0]) - 1]
    width, height = image.size
    canvas = whole_frame(image.size, *resized_size(width, height, wide * side, high * side, side))
    small = side // patch_size(model)
    grids = [canvas.part(c * side, r * side).grid(small, small, side, side) for r in range(high) for c in range(wide)]
    count = small**2 + 1
    padded = -(-count // 8) * 8  # the tower pads each tile to a multiple of 8
    vision, projector = [], []
    for n, grid in enumerate(grids):
        kind = "tile" if len(grids) > 1 else "view"
        vision.append(ImageView(tuple(range(n * padded + 1, n * padded + count)), grid, kind))
        projector.append(ImageView(tuple(range(n * count + 1, n * count + count)), grid, kind))
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    return EncodedImage(
        model.content_token,
        {name: out[name] for name in names},
        {"vision": tuple(vision), "projector": tuple(projector)},
        {"vision": slots * padded, "projector": slots * count},
    )


def resized_size(width: int, height: int, wide: int, high: int, side: int) -> tuple[int, int]:
    """Return the (width, height) of the resized image: at most the canvas, at least one tile."""
    target_x, target_y = min(max(width, side), wide), min(max(height, side), high)
    scale_x, scale_y = target_x / width, target_y / height
    if scale_x < scale_y:
        return target_x, min(int(height * scale_x) or 1, target_y)
    return min(int(width * scale_y) or 1, target_x), target_y
