"""Llama 4: an image fitted into a canvas of equal tiles, then a thumbnail; its own image processor needs torchvision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from lvlm.encoding.image_processing import patch_size, tower_views, whole_frame
from lvlm.interfaces import EncodedImage, Model
from lvlm.sites import Stack
from lvlm.token_map import ImageView

if TYPE_CHECKING:
    from PIL import Image


TILES = 16
"""Largest number of tiles of an image."""


def llama4(model: Model, image: Image.Image) -> EncodedImage:
    """Llama 4: tiles row by row, with a separator between tiles and after each row; a thumbnail if there are several."""
    config = model.hf.config.vision_config
    side = int(config.image_size)
    most = int(getattr(getattr(model.processor, "image_processor", None), "max_patches", None) or TILES)
    high, wide = best_canvas(image.size, side, most)
    resized = resized_size(image.size, side, high, wide)
    canvas = whole_frame(image.size, *resized)
    frames = [canvas.part(c * side, r * side) for r in range(high) for c in range(wide)]
    kinds = ["tile" if len(frames) > 1 else "view"] * len(frames)
    if len(frames) > 1:
        frames.append(whole_frame(image.size, side, side))
        kinds.append("thumbnail")
    small = side // patch_size(model)
    across = round(small * float(config.pixel_shuffle_ratio))
    token = model.content_token * across**2
    text = "<|image_start|>"
    if len(frames) > 1:
        rows = ["<|tile_x_separator|>".join([token] * wide) + "<|tile_y_separator|>" for _ in range(high)]
        text += "".join(rows)
    text += f"<|image|>{token}<|image_end|>"
    grids = [f.grid(small, small, side, side) for f in frames]
    view_kinds: Any = kinds
    decoder_views = tuple(
        ImageView(tuple(range(n * across**2, (n + 1) * across**2)), f.grid(across, across, side, side), view_kinds[n])
        for n, f in enumerate(frames)
    )
    length = small**2 + 1  # the class token comes last
    views: dict[Stack, tuple[ImageView, ...]] = {
        **tower_views(list(zip(grids, kinds, strict=True)), 0, length),
        "projector": decoder_views,
        "decoder": decoder_views,
    }
    sequence: dict[Stack, int] = {"vision": len(frames) * length, "projector": len(frames) * across**2}
    return EncodedImage(text, {"pixel_values": tile_pixels(image, side, high, wide, resized)}, views, sequence)


def best_canvas(size: tuple[int, int], side: int, most: int) -> tuple[int, int]:
    """Return rows and columns of tiles for an image of size (width, height).

    The canvas that enlarges the image least; if all canvases reduce it, the one that reduces it least; of equal ones the
    smallest. As in Llama 4's image processor in transformers.
    """
    width, height = size
    shapes = [(h, n // h) for n in range(most, 0, -1) for h in range(1, n + 1) if n % h == 0]
    scales = {(h, w): min(np.float32(h * side / height), np.float32(w * side / width)) for h, w in shapes}
    larger = [s for s in scales.values() if s >= 1]
    best = min(larger) if larger else max(scales.values())
    return min((shape for shape in shapes if scales[shape] == best), key=lambda shape: shape[0] * shape[1])


def resized_size(size: tuple[int, int], side: int, high: int, wide: int) -> tuple[int, int]:
    """Return the (width, height) of the resized image in the top left corner of its canvas; its aspect ratio is preserved."""
    width, height = size
    target_x, target_y = min(max(width, side), wide * side), min(max(height, side), high * side)
    scale_x, scale_y = target_x / width, target_y / height
    if scale_x < scale_y:
        return target_x, max(min(int(height * scale_x), target_y), 1)
    return max(min(int(width * scale_y), target_x), 1), target_y


def tile_pixels(image: Image.Image, side: int, high: int, wide: int, resized: tuple[int, int]) -> Tensor:
    """Return the tiles and the thumbnail as float32 ``[tiles, 3, side, side]`` between -1 and 1."""
    picture = image.convert("RGB")
    canvas = Pillow.new("RGB", (wide * side, high * side))
    canvas.paste(picture.resize(resized, Pillow.Resampling.BILINEAR), (0, 0))
    tiles = [
        canvas.crop((c * side, r * side, (c + 1) * side, (r + 1) * side)) for r in range(high) for c in range(wide)
    ]
    if len(tiles) > 1:
        tiles.append(picture.resize((side, side), Pillow.Resampling.BILINEAR))
    values = np.stack([np.asarray(tile, np.float32) for tile in tiles])  # [tiles, side, side, 3]
    return torch.from_numpy((values / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()
