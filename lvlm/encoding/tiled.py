"""Families that cut an image into tiles: LLaVA-NeXT and LLaVA-OneVision, Idefics3 and SmolVLM, InternVL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm.encoding.image_processing import (
    patch_size,
    process_image,
    size_setting,
    tower_views,
    vision_config,
    whole_frame,
)
from lvlm.interfaces import EncodedImage, Model
from lvlm.sites import Stack
from lvlm.token_map import ImageView, PatchGrid

if TYPE_CHECKING:
    from PIL import Image


def anyres(model: Model, image: Image.Image) -> EncodedImage:
    """LLaVA-NeXT, LLaVA-OneVision: a thumbnail, then the joined tiles without padding, each row with an end token."""
    out = process_image(model, image)
    _check_uncropped(model)
    pixels: Tensor = out["pixel_values"]  # [1, tiles + 1, C, side, side]
    side = int(pixels.shape[-1])
    patch, prefix = patch_size(model), model.spec.vision_prefix or 0
    across = side // patch
    small = whole_frame(image.size, side, side).grid(across, across, side, side)
    width, height = image.size
    layout = anyres_layout(model, (height, width))
    high, wide = layout.canvas
    shown_x, shown_y = _fitted(width, height, wide, high)
    left, top = (wide - shown_x) // 2, (high - shown_y) // 2
    canvas = whole_frame(image.size, shown_x, shown_y).part(-left, -top)
    grids: list[tuple[PatchGrid, str]] = [(small, "thumbnail")]
    grids += [
        (canvas.part(x, y).grid(across, across, side, side), "tile")
        for y in range(0, high, side)
        for x in range(0, wide, side)
    ]
    frame = canvas.part(layout.cut[1] * patch, layout.cut[0] * patch)
    span_y, span_x = (patches * patch for patches in layout.patches)
    length = small.count + prefix
    views = tower_views(grids, prefix, length, projector=layout.class_tokens)
    views["decoder"] = (ImageView(tuple(range(small.count)), small, "thumbnail"),)
    if layout.rows and layout.columns:  # the tiles of a very wide or high image are all padding
        cells = frame.grid(layout.rows, layout.columns, span_x, span_y)
        joined = ImageView(tuple(range(small.count, small.count + cells.count)), cells)
        views["decoder"] = (*views["decoder"], joined)
    inputs = {"pixel_values": pixels, "image_sizes": _as_tensor(out["image_sizes"])}
    projected = small.count + layout.class_tokens
    sequence: dict[Stack, int] = {"vision": len(grids) * length, "projector": len(grids) * projected}
    return EncodedImage(model.content_token * len(layout.pattern), inputs, views, sequence)


@dataclass(frozen=True)
class AnyresLayout:
    """Order of one image's tokens in LLaVA-NeXT and OneVision: a thumbnail, then rows of the joined tiles, each with an end."""

    class_tokens: int
    """Class tokens before the thumbnail."""
    thumbnail: int
    """Tokens of the thumbnail."""
    rows: int
    columns: int
    """Number of tokens of a row, without its end token."""
    canvas: tuple[int, int] = (0, 0)
    """Height and width of all tiles together, in pixels."""
    patches: tuple[int, int] = (0, 0)
    """Rows and columns of vision patches that the rows of tokens cover."""
    cut: tuple[int, int] = (0, 0)
    """Rows and columns of patches that were removed before them as padding."""

    @property
    def pattern(self) -> list[bool]:
        """Whether each token belongs to the image itself."""
        first = [False] * self.class_tokens + [True] * self.thumbnail
        return first + ([True] * self.columns + [False]) * self.rows


def anyres_layout(model: Model, size: tuple[int, int], *, tiles: bool = True) -> AnyresLayout:
    """Return the layout of an image of size (height, width); without `tiles`, of its thumbnail and one end token (OneVision)."""
    config = model.hf.config
    side, class_tokens = int(vision_config(model).image_size), 0
    if getattr(config, "vision_feature_select_strategy", "default") == "full":
        class_tokens = model.spec.vision_prefix or 0
    across = side // patch_size(model)
    if not tiles:
        return AnyresLayout(class_tokens, across**2, 1, 0)
    height, width = size
    high, wide = best_canvas(width, height, config.image_grid_pinpoints)
    rows, columns, cut_y, cut_x = _unpadded(high // side * across, wide // side * across, height, width)
    patches = (rows, columns)
    most = str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
    if most.isdecimal():  # OneVision interpolates if there would be too many tokens
        ratio = math.sqrt(rows * columns / (int(most) * across**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return AnyresLayout(class_tokens, across**2, rows, columns, (high, wide), patches, (cut_y, cut_x))


def _check_uncropped(model: Model) -> None:
    """Raise `ModelError` for a processor that crops every tile: its tokens then have gaps between them."""
    pictures: Any = model.processor.image_processor
    crop = size_setting(getattr(pictures, "crop_size", None) or {}, "height")
    edge = size_setting(pictures.size, "height") or size_setting(pictures.size, "shortest_edge")
    if crop and edge and crop != edge:
        msg = (
            f"{type(pictures).__name__} of {model.name} resizes tiles of {crop} pixels to {edge}"
            f"{' and crops their center' if getattr(pictures, 'do_center_crop', False) else ''}, so the pixels of each token "
            "are unknown; set its crop_size and size to equal values"
        )
        raise ModelError(msg)


def split(model: Model, image: Image.Image) -> EncodedImage:
    """Idefics3, SmolVLM: numbered tiles row by row and a thumbnail, each reduced by a pixel shuffle."""
    out = process_image(model, image, return_row_col_info=True)
    pixels: Tensor = out["pixel_values"]  # [1, tiles, C, side, side]
    rows, columns = (int(out[name][0][0]) for name in ("rows", "cols"))
    side = int(pixels.shape[-1])
    small = side // patch_size(model)
    across = small // int(model.hf.config.scale_factor)
    frame = whole_frame(image.size, side, side)
    tiles = whole_frame(image.size, columns * side, rows * side) if rows else frame
    frames = [tiles.part(c * side, r * side) for r in range(rows) for c in range(columns)]
    kinds = ["tile"] * len(frames) + ["thumbnail" if frames else "view"]
    frames.append(frame)
    token, processor = model.content_token * across**2, model.processor
    fake = str(getattr(processor, "fake_image_token", None) or "<fake_token_around_image>")
    whole = str(
        getattr(processor, "global_image_tag", None) or getattr(processor, "global_image_token", "<global-img>")
    )
    text = ""
    for r in range(rows):
        text += "".join(f"{fake}<row_{r + 1}_col_{c + 1}>{token}" for c in range(columns)) + "\n"
    text += ("\n" if rows else "") + f"{fake}{whole}{token}{fake}"
    grids = [f.grid(small, small, side, side) for f in frames]
    cells = [f.grid(across, across, side, side) for f in frames]
    decoder_views = _consecutive_views(cells, kinds)
    views: dict[Stack, tuple[ImageView, ...]] = {
        **tower_views(list(zip(grids, kinds, strict=True)), 0, small**2),
        "projector": decoder_views,
        "decoder": decoder_views,
    }
    inputs = {"pixel_values": pixels}
    if "pixel_attention_mask" in out:
        inputs["pixel_attention_mask"] = out["pixel_attention_mask"]
    sequence: dict[Stack, int] = {"vision": len(frames) * small**2, "projector": len(frames) * across**2}
    return EncodedImage(text, inputs, views, sequence)


def crops(model: Model, image: Image.Image) -> EncodedImage:
    """InternVL: tiles row by row, then a thumbnail if there are several tiles, each reduced by a pixel shuffle."""
    pictures: Any = model.processor.image_processor
    out = process_image(model, image, crop_to_patches=True)
    pixels: Tensor = out["pixel_values"]  # [tiles, C, side, side]
    side, prefix = int(pixels.shape[-1]), model.spec.vision_prefix or 0
    small = side // patch_size(model)
    across = round(small * float(model.hf.config.downsample_ratio))
    wide, high = tile_canvas(image.size, side, int(pictures.min_patches), int(pictures.max_patches))
    tiles = whole_frame(image.size, wide * side, high * side)
    frames = [tiles.part(c * side, r * side) for r in range(high) for c in range(wide)]
    kinds = ["tile"] * len(frames) if len(frames) > 1 else ["view"]
    if len(pixels) > len(frames):
        frames.append(whole_frame(image.size, side, side))
        kinds.append("thumbnail")
    cells = [f.grid(across, across, side, side) for f in frames]
    grids = [f.grid(small, small, side, side) for f in frames]
    decoder_views = _consecutive_views(cells, kinds)
    length = small**2 + prefix
    views: dict[Stack, tuple[ImageView, ...]] = {
        **tower_views(list(zip(grids, kinds, strict=True)), prefix, length),
        "projector": decoder_views,
        "decoder": decoder_views,
    }
    start, end = (getattr(model.processor, f"{n}_image_token", None) for n in ("start", "end"))
    text = f"{start or '<img>'}{model.content_token * (len(frames) * across**2)}{end or '</img>'}"
    sequence: dict[Stack, int] = {"vision": len(frames) * length, "projector": len(frames) * across**2}
    return EncodedImage(text, {"pixel_values": pixels}, views, sequence)


def best_canvas(width: int, height: int, canvases: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the canvas (height, width) that preserves most pixels of an image, and of equal ones the smallest.

    As ``select_best_resolution`` of LLaVA-NeXT in transformers.
    """

    def resolution(canvas: Sequence[int]) -> tuple[int, int]:
        high, wide = canvas
        scale = min(wide / width, high / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - high * wide

    high, wide = max(canvases, key=resolution)
    return int(high), int(wide)


def tile_canvas(size: tuple[int, int], side: int, fewest: int, most: int) -> tuple[int, int]:
    """Return the number of tiles per row and per column into which InternVL cuts an image of size (width, height).

    The arrangement with the aspect ratio nearest to the image's; of equal ones the larger, while its area is less than twice
    the image's.
    """
    shapes = [(w, h) for w in range(1, most + 1) for h in range(1, most + 1) if fewest <= w * h <= most]
    width, height = size
    best, least = (1, 1), math.inf
    for w, h in sorted(shapes, key=lambda s: s[0] * s[1]):
        difference = abs(width / height - w / h)
        if difference < least or (difference == least and width * height > 0.5 * side**2 * w * h):
            best, least = (w, h), difference
    return best


def _consecutive_views(cells: list[PatchGrid], kinds: Sequence[Any]) -> tuple[ImageView, ...]:
    """Return views whose tokens follow each other."""
    ends = [sum(c.count for c in cells[: n + 1]) for n in range(len(cells))]
    return tuple(
        ImageView(tuple(range(end - c.count, end)), c, kind) for c, kind, end in zip(cells, kinds, ends, strict=True)
    )


def _fitted(width: int, height: int, wide: int, high: int) -> tuple[int, int]:
    """Return the largest size of an image in a canvas with its aspect ratio, rounded as in LLaVA-NeXT."""
    scale_x, scale_y = wide / width, high / height
    if scale_x < scale_y:
        return wide, min(math.ceil(height * scale_x), high)
    return min(math.ceil(width * scale_y), wide), high


def _unpadded(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return the rows and columns of a canvas of patches without padding, and how many were removed before them."""
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return rows - 2 * cut, columns, cut, 0
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return rows, columns - 2 * cut, 0, cut


def _as_tensor(value: object) -> Tensor:
    import torch

    return value if isinstance(value, Tensor) else torch.tensor(value)
