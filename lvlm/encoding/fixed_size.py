"""Families that resize an image to a fixed size: LLaVA, PaliGemma, Gemma3, Janus, BLIP-2, Kosmos-2, Florence-2."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from groundscope.core.errors import DataError, ModelError
from lvlm.encoding.image_processing import Frame, patch_size, process_image, size_setting, tower_views, whole_frame
from lvlm.interfaces import EncodedImage, Model
from lvlm.sites import Stack
from lvlm.token_map import ImageView, PatchGrid

if TYPE_CHECKING:
    from PIL import Image


def whole(model: Model, image: Image.Image) -> EncodedImage:
    """One picture; each image token represents one patch, or one block of patches of equal size."""
    config = model.hf.config
    pixels: Tensor = process_image(model, image)["pixel_values"]
    frame, (height, width) = processed_frame(model, image.size, pixels), pixels.shape[-2:]
    if not model.spec.stack("vision").layers:
        side = latent_side(model, height)
        cells = frame.grid(side, side, width, height)
        return _one_view(model, pixels, {"decoder": (ImageView(tuple(range(cells.count)), cells),)}, cells.count)
    patch, prefix = patch_size(model), model.spec.vision_prefix or 0
    grid = frame.grid(height // patch, width // patch, width // patch * patch, height // patch * patch)
    pooled = getattr(config, "mm_tokens_per_image", None)
    cells = grid
    if pooled:
        side = round(pooled**0.5)
        cells = frame.grid(side, side, width, height)
    # With the strategy "full", the class token becomes a further token of the decoder.
    class_tokens = prefix if getattr(config, "vision_feature_select_strategy", "default") == "full" else 0
    length = grid.count + prefix
    views = tower_views([(grid, "view")], prefix, length, projector=class_tokens)
    if pooled:
        views["projector"] = (ImageView(tuple(range(cells.count)), cells),)
    views["decoder"] = (ImageView(tuple(range(cells.count)), cells),)
    count = class_tokens + cells.count
    return _one_view(model, pixels, views, count, {"vision": length, "projector": count})


def resampled(model: Model, image: Image.Image) -> EncodedImage:
    """One picture; the image tokens are queries that attend to all of it, so they have no place in it."""
    config = model.hf.config
    names = ("num_query_tokens", "latent_query_num")
    count = next((int(v) for n in names if (v := getattr(config, n, None))), None)
    if count is None:
        msg = f"{type(config).__name__} of {model.name} has no number of queries per image; set {' or '.join(names)}"
        raise ModelError(msg)
    pixels: Tensor = process_image(model, image)["pixel_values"]
    frame, (height, width) = processed_frame(model, image.size, pixels), pixels.shape[-2:]
    patch, prefix = patch_size(model), model.spec.vision_prefix or 0
    grid = frame.grid(height // patch, width // patch, width // patch * patch, height // patch * patch)
    queries = (ImageView(tuple(range(count)), None),)
    views: dict[Stack, tuple[ImageView, ...]] = {
        **tower_views([(grid, "view")], prefix, grid.count + prefix),
        "projector": queries,
        "decoder": queries,
    }
    return _one_view(model, pixels, views, count, {"vision": grid.count + prefix, "projector": count})


def kosmos(model: Model, image: Image.Image) -> EncodedImage:
    """Kosmos-2: queries between brackets; the opening bracket is the placeholder itself."""
    encoded = resampled(model, image)
    count = len(encoded.views["decoder"][0].positions)
    views: dict[Stack, tuple[ImageView, ...]] = {**encoded.views, "decoder": (ImageView(tuple(range(count)), None),)}
    return EncodedImage(f"{model.content_token * (count + 1)}</image>", encoded.inputs, views, encoded.sequence)


def florence(model: Model, image: Image.Image) -> EncodedImage:
    """Florence-2: an encoder reads the image, which is not in the decoder's sequence.

    The tower halves the resolution from stage to stage; the vision stack is the stage that the spec names. Kernels overlap: a
    token depends on its own box, and partly on those of its neighbors above and to the left.
    """
    pixels: Tensor = process_image(model, image)["pixel_values"]
    height, width = picture_height, picture_width = pixels.shape[-2:]
    frame = processed_frame(model, image.size, pixels)
    vision = model.hf.config.vision_config
    grids: list[PatchGrid] = []
    for size, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
        height, width = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
        grids.append(frame.grid(height, width, picture_width, picture_height))
    cells = grids[-1]
    views = {"projector": (ImageView(tuple(range(1, cells.count + 1)), cells),)}  # token 0 is the mean of all
    sequence = {"projector": cells.count + 1}
    stage = re.search(r"\.(-?\d+)\.\*$", model.spec.stack("vision").layers)
    if stage:
        grid = grids[int(stage[1])]
        views["vision"], sequence["vision"] = (ImageView(tuple(range(grid.count)), grid),), grid.count
    return _one_view(model, pixels, views, cells.count + 1, sequence)


def processed_frame(model: Model, size: tuple[int, int], pixels: Tensor) -> Frame:
    """Return the frame of a picture of fixed size over the original image of size (width, height).

    Follows the image processor's settings: pad to a square, resize to a fixed size or to an edge length, crop the center.

    Raises
    ------
    ModelError
        If the processor crops, and resizes in an unknown way.
    """
    pictures: Any = model.processor.image_processor
    height, width = pixels.shape[-2:]
    padded = hasattr(pictures, "background_color") or bool(getattr(pictures, "do_pad", False))
    whole_x, whole_y = _size_before_crop(model, (max(size), max(size)) if padded else size, (width, height))
    if padded:
        # Padded to a square around the center, in whole pixels of the picture.
        scale = whole_x / max(size)
        floor = int(getattr(pictures, "min_size", 0) or 0)
        inner_x, inner_y = (max(round(side * scale), floor) for side in size)
        frame = whole_frame(size, inner_x, inner_y).part(-((whole_x - inner_x) // 2), -((whole_y - inner_y) // 2))
    else:
        frame = whole_frame(size, whole_x, whole_y)
    return frame.part((whole_x - width) // 2, (whole_y - height) // 2)


def _size_before_crop(model: Model, size: tuple[int, int], picture: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) to which an image is resized before its center is cropped to the picture's size."""
    pictures: Any = model.processor.image_processor
    has_crop_setting = hasattr(pictures, "do_center_crop")
    if has_crop_setting and not pictures.do_center_crop:
        return picture
    if not getattr(pictures, "do_resize", True):
        return size
    settings = pictures.size
    width, height, edge = (size_setting(settings, name) for name in ("width", "height", "shortest_edge"))
    if width and height:
        return width, height
    if not edge or size_setting(settings, "longest_edge"):
        if not has_crop_setting:
            return picture
        msg = (
            f"{type(pictures).__name__} of {model.name} crops the center of an image resized by {settings}; set its size to "
            "height and width, or to a shortest_edge alone"
        )
        raise ModelError(msg)
    # Rounded as in transformers' get_resize_output_image_size.
    long = int(edge * max(size) / min(size))
    return (long, edge) if size[0] >= size[1] else (edge, long)


def patch_grid(model: Model, size: tuple[int, int], picture: tuple[int, int]) -> PatchGrid:
    """Return the vision tower's patches over an image of size (width, height), for a picture of size (height, width)."""
    import torch

    patch, (height, width) = patch_size(model), picture
    frame = processed_frame(model, size, torch.empty(1, 3, height, width, device="meta"))
    return frame.grid(height // patch, width // patch, width, height)


def latent_side(model: Model, pixels: int) -> int:
    """Return the number of codes along one side of a quantized picture."""
    config = getattr(model.hf.config, "vq_config", None)
    if config is None:
        msg = f"{model.name} has no vision tower and no vq_config, so the number of tokens of an image is unknown"
        raise ModelError(msg)
    return pixels // 2 ** (len(config.channel_multiplier) - 1)


def _one_view(
    model: Model,
    pixels: Tensor,
    views: dict[Any, tuple[ImageView, ...]],
    count: int,
    sequence: dict[Any, int] | None = None,
) -> EncodedImage:
    if pixels.shape[0] != 1:
        msg = (
            f"{type(model.processor.image_processor).__name__} returned {pixels.shape[0]} pictures of one image, not 1"
        )
        raise DataError(msg)
    return EncodedImage(bracketed(model, model.content_token * count), {"pixel_values": pixels}, views, sequence or {})


def bracketed(model: Model, tokens: str) -> str:
    """Add the family's brackets around the tokens of an image."""
    whole_text = getattr(model.processor, "full_image_sequence", None)  # Gemma3
    if whole_text:
        return whole_text
    processor = model.processor
    start, end = (getattr(processor, f"image_{n}_token", None) for n in ("start", "end"))
    return f"{start or ''}{tokens}{end or ''}"
