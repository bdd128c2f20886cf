"""What one image becomes: model inputs, the text its placeholder is replaced by, and where its tokens lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image as Pillow
from torch import Tensor

from concepts.schema import Box
from groundscope.core.errors import DataError, ModelError
from lvlm.sites import Stack
from lvlm.token_map import Lattice, PatchGrid

if TYPE_CHECKING:
    from PIL import Image

    from lvlm.model import Lvlm


@dataclass(frozen=True)
class Look:
    """One image as a family's model is given it."""

    text: str
    """What stands in the prompt for it; the model's image token once for each token that the image becomes."""
    inputs: Mapping[str, Tensor]
    lattices: Mapping[Stack, tuple[Lattice, ...]]
    """Its views by stack. In the decoder positions count the tokens of the image that `View.mark` finds, in other stacks the
    sequence."""
    sequence: Mapping[Stack, int] = field(default_factory=dict)
    """Length of its sequence in each stack but the decoder."""


@dataclass(frozen=True)
class Frame:
    """How pixels of a picture that the model sees lie over the original image, axis by axis."""

    scale_x: float
    """Original pixels for each pixel of the picture."""
    scale_y: float
    left: float
    """Where the picture's first column begins in the original; negative where the picture was padded."""
    top: float

    def grid(self, rows: int, columns: int, width: float, height: float) -> PatchGrid:
        """Divide a part of the picture that begins at its corner and is so many pixels large into equal patches."""
        side_x, side_y = width / columns * self.scale_x, height / rows * self.scale_y
        return PatchGrid(rows, columns, Box(self.left, self.top, self.left + side_x, self.top + side_y))

    def part(self, left: float, top: float) -> Frame:
        """Return the frame of a part that begins so many pixels from the picture's corner."""
        return Frame(self.scale_x, self.scale_y, self.left + left * self.scale_x, self.top + top * self.scale_y)


def stretched(size: tuple[int, int], width: float, height: float) -> Frame:
    """Return the frame of a whole image of some (width, height) stretched to so many pixels."""
    return Frame(size[0] / width, size[1] / height, 0.0, 0.0)


def processed(model: Lvlm, image: Image.Image, **options: Any) -> Mapping[str, Any]:
    """Run the processor's image part; raises `DataError` where it refuses the image, or would make too many pixels of it."""
    pictures = getattr(model.processor, "image_processor", None)
    if pictures is None:
        msg = f"the processor of {model.name} has no image_processor"
        raise ModelError(msg)
    _check_resized_size(pictures, image.size)
    try:
        return pictures(images=[image], return_tensors="pt", **options)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        msg = f"{type(pictures).__name__} does not take an image of {image.size[0]} x {image.size[1]} pixels: {error}"
        raise DataError(msg) from error


def _check_resized_size(pictures: Any, size: tuple[int, int]) -> None:
    """Raise `DataError` for an image so long that it fills memory once its short side has a fixed length."""
    settings = getattr(pictures, "size", None)
    if settings is None or not getattr(pictures, "do_resize", True) or number(settings, "longest_edge"):
        return
    edge, limit = number(settings, "shortest_edge"), Pillow.MAX_IMAGE_PIXELS
    long = int(edge * max(size) / min(size)) if edge else 0
    if edge and limit and edge * long > limit:
        msg = (
            f"an image of {size[0]} x {size[1]} pixels becomes one of {edge} x {long}, more than {limit} pixels, as "
            f"{type(pictures).__name__} gives its short side {edge}: crop it or cut it into several images"
        )
        raise DataError(msg)


def vision_config(model: Lvlm) -> Any:
    """Return the vision tower's configuration; raises `ModelError` where there is none."""
    config = getattr(model.hf.config, "vision_config", None)
    if config is None:
        msg = f"{type(model.hf.config).__name__} of {model.name} has no vision_config"
        raise ModelError(msg)
    return config


def patch_size(model: Lvlm) -> int:
    """Return the side of a vision patch in pixels."""
    size = vision_config(model).patch_size
    return int(size[0] if isinstance(size, list | tuple) else size)


def number(settings: Any, name: str) -> int | None:
    """Return one of an image processor's sizes, which are a mapping or an object."""
    found = settings.get(name) if hasattr(settings, "get") else getattr(settings, name, None)
    return int(found) if found else None


def tower(
    grids: list[tuple[PatchGrid, str]], prefix: int, length: int, *, projector: int | None = None
) -> dict[Stack, tuple[Lattice, ...]]:
    """Lay patches over a vision tower that sees so many pictures, each a sequence of `length` tokens.

    Parameters
    ----------
    grids
        Each picture's patches and what it is (``view``, ``tile``, ``thumbnail``).
    prefix
        Tokens before the first patch.
    length
        Tokens of one picture, all told.
    projector
        Where the projector keeps a token for each patch: its tokens before the first.
    """
    kinds: Any = [kind for _, kind in grids]
    vision, projected = [], []
    for n, (grid, _) in enumerate(grids):
        first = n * length + prefix
        vision.append(Lattice(tuple(range(first, first + grid.count)), grid, kinds[n]))
        if projector is not None:
            start = n * (grid.count + projector) + projector
            projected.append(Lattice(tuple(range(start, start + grid.count)), grid, kinds[n]))
    return {"vision": tuple(vision), **({"projector": tuple(projected)} if projected else {})}
