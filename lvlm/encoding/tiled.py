"""Families that cut an image into tiles: LLaVA-NeXT and OneVision, Idefics3 and SmolVLM, InternVL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm.encoding.encoded_image import Look, number, patch_size, processed, stretched, tower, vision_config
from lvlm.sites import Stack
from lvlm.token_map import Lattice, PatchGrid

if TYPE_CHECKING:
    from PIL import Image

    from lvlm.model import Lvlm


def anyres(model: Lvlm, image: Image.Image) -> Look:
    """LLaVA-NeXT and OneVision: a thumbnail, then the tiles joined again, padding cut off, each row with an end token."""
    out = processed(model, image)
    _check_uncropped(model)
    pixels: Tensor = out["pixel_values"]  # [1, tiles + 1, C, side, side]
    side = int(pixels.shape[-1])
    patch, prefix = patch_size(model), model.spec.vision_prefix or 0
    across = side // patch
    small = stretched(image.size, side, side).grid(across, across, side, side)
    width, height = image.size
    layout = anyres_layout(model, (height, width))
    high, wide = layout.canvas
    shown_x, shown_y = _fitted(width, height, wide, high)
    left, top = (wide - shown_x) // 2, (high - shown_y) // 2
    canvas = stretched(image.size, shown_x, shown_y).part(-left, -top)
    views: list[tuple[PatchGrid, str]] = [(small, "thumbnail")]
    views += [
        (canvas.part(x, y).grid(across, across, side, side), "tile")
        for y in range(0, high, side)
        for x in range(0, wide, side)
    ]
    frame = canvas.part(layout.cut[1] * patch, layout.cut[0] * patch)
    span_y, span_x = (patches * patch for patches in layout.patches)
    kept = layout.kept
    length = small.count + prefix
    lattices = tower(views, prefix, length, projector=kept)
    lattices["decoder"] = (Lattice(tuple(range(small.count)), small, "thumbnail"),)
    if layout.rows and layout.columns:  # of a very wide or high image the tiles are padding alone, and are cut off
        cells = frame.grid(layout.rows, layout.columns, span_x, span_y)
        joined = Lattice(tuple(range(small.count, small.count + cells.count)), cells)
        lattices["decoder"] = (*lattices["decoder"], joined)
    inputs = {"pixel_values": pixels, "image_sizes": _as_tensor(out["image_sizes"])}
    sequence: dict[Stack, int] = {"vision": len(views) * length, "projector": len(views) * (small.count + kept)}
    return Look(model.content_token * len(layout.pattern), inputs, lattices, sequence)


@dataclass(frozen=True)
class AnyresLayout:
    """How LLaVA-NeXT and OneVision lay out the tokens of one image: a thumbnail, then rows of joined tiles, each with an end."""

    kept: int
    """Class tokens before the thumbnail."""
    thumbnail: int
    """Tokens of the thumbnail."""
    rows: int
    columns: int
    """Tokens of a row without its end."""
    canvas: tuple[int, int] = (0, 0)
    """Height and width of the tiles side by side, in pixels."""
    patches: tuple[int, int] = (0, 0)
    """Rows and columns of vision patches that the rows of tokens cover."""
    cut: tuple[int, int] = (0, 0)
    """Rows and columns of patches that were cut off before them as padding."""

    @property
    def pattern(self) -> list[bool]:
        """Whether each token is a part of the image."""
        one = [False] * self.kept + [True] * self.thumbnail
        return one + ([True] * self.columns + [False]) * self.rows


def anyres_layout(model: Lvlm, size: tuple[int, int], *, tiles: bool = True) -> AnyresLayout:
    """Return the layout of an image of some (height, width); without `tiles` its thumbnail and one end alone (OneVision)."""
    config = model.hf.config
    side, kept = int(vision_config(model).image_size), 0
    if getattr(config, "vision_feature_select_strategy", "default") == "full":
        kept = model.spec.vision_prefix or 0
    across = side // patch_size(model)
    if not tiles:
        return AnyresLayout(kept, across**2, 1, 0)
    height, width = size
    high, wide = best_canvas(width, height, config.image_grid_pinpoints)
    rows, columns, cut_y, cut_x = _unpadded(high // side * across, wide // side * across, height, width)
    patches = (rows, columns)
    most = str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
    if most.isdecimal():  # OneVision shrinks what would be too many tokens
        ratio = math.sqrt(rows * columns / (int(most) * across**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return AnyresLayout(kept, across**2, rows, columns, (high, wide), patches, (cut_y, cut_x))


def _check_uncropped(model: Lvlm) -> None:
    """Raise `ModelError` for a processor that cuts the edges of every tile off: its tokens then have gaps between them."""
    pictures: Any = model.processor.image_processor
    crop = number(getattr(pictures, "crop_size", None) or {}, "height")
    edge = number(pictures.size, "height") or number(pictures.size, "shortest_edge")
    if crop and edge and crop != edge:
        msg = (
            f"{type(pictures).__name__} of {model.name} resizes tiles of {crop} pixels to {edge}"
            f"{' and crops their middle' if getattr(pictures, 'do_center_crop', False) else ''}: where the tokens are in the "
            "image is not known; set its crop_size and size to equal values"
        )
        raise ModelError(msg)


def split(model: Lvlm, image: Image.Image) -> Look:
    """Idefics3 and SmolVLM: named tiles row by row and a thumbnail, each shrunk by a pixel shuffle."""
    out = processed(model, image, return_row_col_info=True)
    pixels: Tensor = out["pixel_values"]  # [1, tiles, C, side, side]
    rows, columns = (int(out[name][0][0]) for name in ("rows", "cols"))
    side = int(pixels.shape[-1])
    small = side // patch_size(model)
    across = small // int(model.hf.config.scale_factor)
    frame = stretched(image.size, side, side)
    tiles = stretched(image.size, columns * side, rows * side) if rows else frame
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
    views = _each(cells, kinds)
    lattices: dict[Stack, tuple[Lattice, ...]] = {
        **tower(list(zip(grids, kinds, strict=True)), 0, small**2),
        "projector": views,
        "decoder": views,
    }
    inputs = {"pixel_values": pixels}
    if "pixel_attention_mask" in out:
        inputs["pixel_attention_mask"] = out["pixel_attention_mask"]
    sequence: dict[Stack, int] = {"vision": len(frames) * small**2, "projector": len(frames) * across**2}
    return Look(text, inputs, lattices, sequence)


def crops(model: Lvlm, image: Image.Image) -> Look:
    """InternVL: tiles row by row, then a thumbnail if there is more than one, each shrunk by a pixel shuffle."""
    pictures: Any = model.processor.image_processor
    out = processed(model, image, crop_to_patches=True)
    pixels: Tensor = out["pixel_values"]  # [tiles, C, side, side]
    side, prefix = int(pixels.shape[-1]), model.spec.vision_prefix or 0
    small = side // patch_size(model)
    across = round(small * float(model.hf.config.downsample_ratio))
    wide, high = tile_canvas(image.size, side, int(pictures.min_patches), int(pictures.max_patches))
    tiles = stretched(image.size, wide * side, high * side)
    frames = [tiles.part(c * side, r * side) for r in range(high) for c in range(wide)]
    kinds = ["tile"] * len(frames) if len(frames) > 1 else ["view"]
    if len(pixels) > len(frames):
        frames.append(stretched(image.size, side, side))
        kinds.append("thumbnail")
    cells = [f.grid(across, across, side, side) for f in frames]
    grids = [f.grid(small, small, side, side) for f in frames]
    views = _each(cells, kinds)
    length = small**2 + prefix
    lattices: dict[Stack, tuple[Lattice, ...]] = {
        **tower(list(zip(grids, kinds, strict=True)), prefix, length),
        "projector": views,
        "decoder": views,
    }
    start, end = (getattr(model.processor, f"{n}_image_token", None) for n in ("start", "end"))
    text = f"{start or '<img>'}{model.content_token * (len(frames) * across**2)}{end or '</img>'}"
    sequence: dict[Stack, int] = {"vision": len(frames) * length, "projector": len(frames) * across**2}
    return Look(text, {"pixel_values": pixels}, lattices, sequence)


def best_canvas(width: int, height: int, canvases: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the canvas (height, width) on which an image keeps most of its pixels, of equals the one with least waste.

    After LLaVA-NeXT, "select_best_resolution" in transformers.
    """

    def worth(canvas: Sequence[int]) -> tuple[int, int]:
        high, wide = canvas
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - high * wide

    high, wide = max(canvases, key=worth)
    return int(high), int(wide)


def tile_canvas(size: tuple[int, int], side: int, fewest: int, most: int) -> tuple[int, int]:
    """Return how many tiles across and down InternVL cuts an image of some (width, height) into.

    The arrangement whose shape is nearest the image's; of equals the larger, while its area is under twice the image's.
    """
    shapes = [(w, h) for w in range(1, most + 1) for h in range(1, most + 1) if fewest <= w * h <= most]
    width, height = size
    best, least = (1, 1), math.inf
    for w, h in sorted(shapes, key=lambda s: s[0] * s[1]):
        difference = abs(width / height - w / h)
        if difference < least or (difference == least and width * height > 0.5 * side**2 * w * h):
            best, least = (w, h), difference
    return best


def _each(cells: list[PatchGrid], kinds: list[str]) -> tuple[Lattice, ...]:
    ends = [sum(c.count for c in cells[: n + 1]) for n in range(len(cells))]
    named: Any = kinds
    return tuple(
        Lattice(tuple(range(end - c.count, end)), c, kind) for c, kind, end in zip(cells, named, ends, strict=True)
    )


def _fitted(width: int, height: int, wide: int, high: int) -> tuple[int, int]:
    """Return the size at which an image fits a canvas, its shape kept, as LLaVA-NeXT rounds it."""
    scale_x, scale_y = wide / width, high / height
    if scale_x < scale_y:
        return wide, min(math.ceil(height * scale_x), high)
    return min(math.ceil(width * scale_y), wide), high


def _unpadded(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return the rows and columns left of a canvas of patches without padding, and how many were cut before them."""
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return rows - 2 * cut, columns, cut, 0
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return rows, columns - 2 * cut, 0, cut


def _as_tensor(value: object) -> Tensor:
    import torch

    return value if isinstance(value, Tensor) else torch.tensor(value)
