"""Run a model's image processor, and map pixels of its output to pixels of the original image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image as Pillow

from concepts.annotated_object import Box
from groundscope.core.errors import DataError, ModelError
from lvlm.interfaces import Model
from lvlm.sites import Stack
from lvlm.token_map import ImageView, PatchGrid

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Frame:
    """Position and scale of a processed picture in the original image."""

    scale_x: float
    """Pixels of the original per pixel of the picture."""
    scale_y: float
    left: float
    """Left edge of the picture, in pixels of the original; negative if the picture was padded."""
    top: float

    def grid(self, rows: int, columns: int, width: float, height: float) -> PatchGrid:
        """Divide the top left part of the picture, `width` x `height` pixels, into equal patches."""
        side_x, side_y = width / columns * self.scale_x, height / rows * self.scale_y
        return PatchGrid(rows, columns, Box(self.left, self.top, self.left + side_x, self.top + side_y))

    def part(self, left: float, top: float) -> Frame:
        """Return the frame of the part that begins at a pixel of the picture."""
        return Frame(self.scale_x, self.scale_y, self.left + left * self.scale_x, self.top + top * self.scale_y)


def whole_frame(size: tuple[int, int], width: float, height: float) -> Frame:
    """Return the frame of an image of size (width, height) that is resized to `width` x `height` pixels."""
    return Frame(size[0] / width, size[1] / height, 0.0, 0.0)


def process_image(model: Model, image: Image.Image, **options: Any) -> Mapping[str, Any]:
    """Run the image processor; raises `DataError` if it rejects the image, or would enlarge it beyond Pillow's limit."""
    pictures = getattr(model.processor, "image_processor", None)
    if pictures is None:
        msg = f"the processor of {model.name} has no image_processor"
        raise ModelError(msg)
    _check_resized_size(pictures, image.size)
    try:
        return pictures(images=[image], return_tensors="pt", **options)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        msg = f"{type(pictures).__name__} rejects an image of {image.size[0]} x {image.size[1]} pixels: {error}"
        raise DataError(msg) from error


def _check_resized_size(pictures: Any, size: tuple[int, int]) -> None:
    """Raise `DataError` if resizing the short side to a fixed length would make an image too large for memory."""
    settings = getattr(pictures, "size", None)
    if settings is None or not getattr(pictures, "do_resize", True) or size_setting(settings, "longest_edge"):
        return
    edge, limit = size_setting(settings, "shortest_edge"), Pillow.MAX_IMAGE_PIXELS
    long = int(edge * max(size) / min(size)) if edge else 0
    if edge and limit and edge * long > limit:
        msg = (
            f"{type(pictures).__name__} would resize an image of {size[0]} x {size[1]} pixels to {edge} x {long}, more than "
            f"{limit} pixels; crop it or cut it into several images"
        )
        raise DataError(msg)


def vision_config(model: Model) -> Any:
    """Return the vision tower's configuration; raises `ModelError` for a model without one."""
    config = getattr(model.hf.config, "vision_config", None)
    if config is None:
        msg = f"{type(model.hf.config).__name__} of {model.name} has no vision_config"
        raise ModelError(msg)
    return config


def patch_size(model: Model) -> int:
    """Return the side length of a vision patch in pixels."""
    size = vision_config(model).patch_size
    return int(size[0] if isinstance(size, list | tuple) else size)


def size_setting(settings: Any, name: str) -> int | None:
    """Return one size of an image processor, whose sizes are a mapping or an object; None if it is not set."""
    value = settings.get(name) if hasattr(settings, "get") else getattr(settings, name, None)
    return int(value) if value else None


def tower_views(
    grids: list[tuple[PatchGrid, str]], prefix: int, length: int, *, projector: int | None = None
) -> dict[Stack, tuple[ImageView, ...]]:
    """Return the views in a vision tower, whose sequence contains several pictures of `length` tokens each.

    Parameters
    ----------
    grids
        Patches and kind (``view``, ``tile``, ``thumbnail``) of each picture.
    prefix
        Number of a picture's tokens before its first patch.
    length
        Number of tokens of a picture.
    projector
        If the projector preserves a token for each patch: its number of tokens before the first. None: no projector views.
    """
    kinds: Any = [kind for _, kind in grids]
    vision, projected = [], []
    for n, (grid, _) in enumerate(grids):
        first = n * length + prefix
        vision.append(ImageView(tuple(range(first, first + grid.count)), grid, kinds[n]))
        if projector is not None:
            start = n * (grid.count + projector) + projector
            projected.append(ImageView(tuple(range(start, start + grid.count)), grid, kinds[n]))
    return {"vision": tuple(vision), **({"projector": tuple(projected)} if projected else {})}
