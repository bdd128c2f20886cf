"""Families that see an image as one picture of fixed size: LLaVA, PaliGemma, Gemma3, Janus, BLIP-2, Kosmos-2, Florence-2."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from groundscope.core.errors import DataError, ModelError
from lvlm.encoding.encoded_image import Frame, Look, number, patch_size, processed, stretched, tower
from lvlm.sites import Stack
from lvlm.token_map import Lattice, PatchGrid

if TYPE_CHECKING:
    from PIL import Image

    from lvlm.model import Lvlm


def whole(model: Lvlm, image: Image.Image) -> Look:
    """One picture; each image token stands for a patch, or for an equal block of them."""
    config = model.hf.config
    pixels: Tensor = processed(model, image)["pixel_values"]
    frame, (height, width) = picture_frame(model, image.size, pixels), pixels.shape[-2:]
    if not model.spec.stack("vision").layers:
        side = latent_side(model, height)
        cells = frame.grid(side, side, width, height)
        return _look(model, pixels, {"decoder": (Lattice(tuple(range(cells.count)), cells),)}, cells.count)
    patch, prefix = patch_size(model), model.spec.vision_prefix or 0
    grid = frame.grid(height // patch, width // patch, width // patch * patch, height // patch * patch)
    pooled = getattr(config, "mm_tokens_per_image", None)
    cells = grid
    if pooled:
        side = round(pooled**0.5)
        cells = frame.grid(side, side, width, height)
    # With the strategy "full" the class token is kept and becomes an image token of its own.
    kept = prefix if getattr(config, "vision_feature_select_strategy", "default") == "full" else 0
    length = grid.count + prefix
    lattices = tower([(grid, "view")], prefix, length, projector=kept)
    if pooled:
        lattices["projector"] = (Lattice(tuple(range(cells.count)), cells),)
    lattices["decoder"] = (Lattice(tuple(range(cells.count)), cells),)
    return _look(model, pixels, lattices, kept + cells.count, {"vision": length, "projector": kept + cells.count})


def resampled(model: Lvlm, image: Image.Image) -> Look:
    """One picture; the image tokens are queries that have read all of it, so they have no place in it."""
    config = model.hf.config
    names = ("num_query_tokens", "latent_query_num")
    count = next((int(v) for n in names if (v := getattr(config, n, None))), None)
    if count is None:
        msg = f"{type(config).__name__} of {model.name} does not say how many queries an image becomes ({', '.join(names)})"
        raise ModelError(msg)
    pixels: Tensor = processed(model, image)["pixel_values"]
    frame, (height, width) = picture_frame(model, image.size, pixels), pixels.shape[-2:]
    patch, prefix = patch_size(model), model.spec.vision_prefix or 0
    grid = frame.grid(height // patch, width // patch, width // patch * patch, height // patch * patch)
    queries = (Lattice(tuple(range(count)), None),)
    lattices: dict[Stack, tuple[Lattice, ...]] = {
        **tower([(grid, "view")], prefix, grid.count + prefix),
        "projector": queries,
        "decoder": queries,
    }
    return _look(model, pixels, lattices, count, {"vision": grid.count + prefix, "projector": count})


def kosmos(model: Lvlm, image: Image.Image) -> Look:
    """Kosmos-2: queries between brackets, whose first is the placeholder itself."""
    look = resampled(model, image)
    count = len(look.lattices["decoder"][0].positions)
    views: dict[Stack, tuple[Lattice, ...]] = {**look.lattices, "decoder": (Lattice(tuple(range(count)), None),)}
    return Look(f"{model.content_token * (count + 1)}</image>", look.inputs, views, look.sequence)


def florence(model: Lvlm, image: Image.Image) -> Look:
    """Florence-2: an encoder reads the image, so the decoder's own sequence has none of it.

    Its tower halves the picture from stage to stage; the vision stack is the one stage that the spec names. Kernels overlap:
    a token sees its own box, and that of its neighbors above and to the left in part.
    """
    pixels: Tensor = processed(model, image)["pixel_values"]
    height, width = shown_y, shown_x = pixels.shape[-2:]
    frame = picture_frame(model, image.size, pixels)
    vision = model.hf.config.vision_config
    grids: list[PatchGrid] = []
    for size, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
        height, width = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
        grids.append(frame.grid(height, width, shown_x, shown_y))
    cells = grids[-1]
    lattices = {"projector": (Lattice(tuple(range(1, cells.count + 1)), cells),)}  # the mean of all of them comes first
    sequence = {"projector": cells.count + 1}
    stage = re.search(r"\.(-?\d+)\.\*$", model.spec.stack("vision").layers)
    if stage:
        grid = grids[int(stage[1])]
        lattices["vision"], sequence["vision"] = (Lattice(tuple(range(grid.count)), grid),), grid.count
    return _look(model, pixels, lattices, cells.count + 1, sequence)


def picture_frame(model: Lvlm, size: tuple[int, int], pixels: Tensor) -> Frame:
    """Say how a picture of fixed size lies over the original (width, height), by the image processor's settings.

    Follows what it does: pad to a square, resize to a fixed size or by an edge, crop the middle.

    Raises
    ------
    ModelError
        Where it crops, and resizes in a way that is not known.
    """
    pictures: Any = model.processor.image_processor
    height, width = pixels.shape[-2:]
    padded = hasattr(pictures, "background_color") or bool(getattr(pictures, "do_pad", False))
    whole_x, whole_y = _size_before_crop(model, (max(size), max(size)) if padded else size, (width, height))
    if padded:
        # Made square around the middle, in whole pixels of the picture.
        delta = whole_x / max(size)
        floor = int(getattr(pictures, "min_size", 0) or 0)
        shown_x, shown_y = (max(round(side * delta), floor) for side in size)
        frame = stretched(size, shown_x, shown_y).part(-((whole_x - shown_x) // 2), -((whole_y - shown_y) // 2))
    else:
        frame = stretched(size, whole_x, whole_y)
    return frame.part((whole_x - width) // 2, (whole_y - height) // 2)


def _size_before_crop(model: Lvlm, size: tuple[int, int], picture: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) to which an image is resized before its middle is cropped to the picture's size."""
    pictures: Any = model.processor.image_processor
    stated = hasattr(pictures, "do_center_crop")
    if stated and not pictures.do_center_crop:
        return picture
    if not getattr(pictures, "do_resize", True):
        return size
    settings = pictures.size
    width, height, edge = (number(settings, name) for name in ("width", "height", "shortest_edge"))
    if width and height:
        return width, height
    if not edge or number(settings, "longest_edge"):
        if not stated:
            return picture
        msg = (
            f"{type(pictures).__name__} of {model.name} crops the middle of an image resized by {settings}: known are a "
            "height and width, or a shortest_edge alone; change its size"
        )
        raise ModelError(msg)
    # As transformers rounds it (get_resize_output_image_size).
    long = int(edge * max(size) / min(size))
    return (long, edge) if size[0] >= size[1] else (edge, long)


def patch_grid(model: Lvlm, size: tuple[int, int], shown: tuple[int, int]) -> PatchGrid:
    """Lay the vision tower's patches over an original of some (width, height), shown at (height, width) pixels."""
    import torch

    patch, (height, width) = patch_size(model), shown
    frame = picture_frame(model, size, torch.empty(1, 3, height, width, device="meta"))
    return frame.grid(height // patch, width // patch, width, height)


def latent_side(model: Lvlm, pixels: int) -> int:
    """Return how many codes a quantized picture has along a side."""
    config = getattr(model.hf.config, "vq_config", None)
    if config is None:
        msg = f"{model.name} has no vision tower and no vq_config: it is not known how many tokens an image becomes"
        raise ModelError(msg)
    return pixels // 2 ** (len(config.channel_multiplier) - 1)


def _look(
    model: Lvlm,
    pixels: Tensor,
    lattices: dict[Any, tuple[Lattice, ...]],
    count: int,
    sequence: dict[Any, int] | None = None,
) -> Look:
    if pixels.shape[0] != 1:
        msg = f"{type(model.processor.image_processor).__name__} made {pixels.shape[0]} pictures of one image, not 1"
        raise DataError(msg)
    return Look(bracketed(model, model.content_token * count), {"pixel_values": pixels}, lattices, sequence or {})


def bracketed(model: Lvlm, tokens: str) -> str:
    """Put the family's own brackets around an image's tokens."""
    whole_text = getattr(model.processor, "full_image_sequence", None)  # Gemma3 spells it out
    if whole_text:
        return whole_text
    processor = model.processor
    start, end = (getattr(processor, f"image_{n}_token", None) for n in ("start", "end"))
    return f"{start or ''}{tokens}{end or ''}"
