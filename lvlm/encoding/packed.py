"""Families that see an image at its own resolution: Qwen-VL 2 to 3 and GLM-4V (packed patches), Mistral3 (rows)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from groundscope.core.errors import DataError
from lvlm.encoding.image_processing import patch_size, process_image, vision_config, whole_frame
from lvlm.interfaces import EncodedImage, Model
from lvlm.token_map import ImageView

if TYPE_CHECKING:
    from PIL import Image


def packed(model: Model, image: Image.Image) -> EncodedImage:
    """Qwen-VL, GLM-4V: patches of all images in one sequence without a batch axis; each block of patches becomes one token.

    Patches of a block are adjacent, and blocks follow row by row; Qwen2.5-VL orders blocks by attention window instead.
    """
    out = process_image(model, image)
    grid_thw: Tensor = out["image_grid_thw"]
    rows, columns = (int(n) for n in grid_thw[0, 1:])
    config = vision_config(model)
    merge = int(config.spatial_merge_size)
    frame = whole_frame(image.size, columns, rows)
    high, wide = rows // merge, columns // merge
    order = list(range(high * wide))
    window = getattr(config, "window_size", None)
    if window:
        order = window_order(high, wide, int(window) // merge // patch_size(model))
    index = {block: i for i, block in enumerate(order)}  # block, counted row by row -> index in the sequence
    vision = tuple(
        index[r // merge * wide + c // merge] * merge**2 + r % merge * merge + c % merge
        for r in range(rows)
        for c in range(columns)
    )
    blocks = frame.grid(high, wide, columns, rows)
    text = model.content_token * (high * wide)
    return EncodedImage(
        text,
        {"pixel_values": out["pixel_values"], "image_grid_thw": grid_thw},
        {
            "vision": (ImageView(vision, frame.grid(rows, columns, columns, rows)),),
            "projector": (ImageView(tuple(index[b] for b in range(high * wide)), blocks),),
            "decoder": (ImageView(tuple(range(high * wide)), blocks),),
        },
        {"vision": rows * columns, "projector": high * wide},
    )


def window_order(high: int, wide: int, side: int) -> list[int]:
    """Return blocks, numbered row by row, in the order of Qwen2.5-VL's attention windows of `side` x `side` blocks."""
    return [
        r * wide + c
        for top in range(0, high, side)
        for left in range(0, wide, side)
        for r in range(top, min(top + side, high))
        for c in range(left, min(left + side, wide))
    ]


def rows(model: Model, image: Image.Image) -> EncodedImage:
    """Mistral3: merged patches row by row, with a separator between rows and an end token after the last."""
    patch = patch_size(model)
    merge = int(getattr(model.hf.config, "spatial_merge_size", 1))
    out = process_image(model, image, patch_size={"height": patch * merge, "width": patch * merge})
    height, width = (int(n) for n in out["image_sizes"][0])
    frame = whole_frame(image.size, width, height)
    high, wide = height // patch // merge, width // patch // merge
    if high * wide < 2:
        msg = (
            f"an image of {image.size[0]} x {image.size[1]} pixels becomes {high * wide} tokens of {model.name}, whose forward "
            f"pass needs at least 2; enlarge it to more than {patch * merge} pixels along one side"
        )
        raise DataError(msg)
    cells = frame.grid(high, wide, width, height)
    patches = frame.grid(high * merge, wide * merge, width, height)
    end_of_row = getattr(model.processor, "image_break_token", "[IMG_BREAK]")
    end = getattr(model.processor, "image_end_token", "[IMG_END]")
    text = end_of_row.join([model.content_token * wide] * high) + end
    views = (ImageView(tuple(range(cells.count)), cells),)
    return EncodedImage(
        text,
        {"pixel_values": out["pixel_values"], "image_sizes": _tensor(out["image_sizes"])},
        {"vision": (ImageView(tuple(range(patches.count)), patches),), "projector": views, "decoder": views},
        {"vision": patches.count, "projector": cells.count},
    )


def _tensor(value: object) -> Tensor:
    import torch

    return value if isinstance(value, Tensor) else torch.tensor(value)
