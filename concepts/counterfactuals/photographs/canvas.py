"""Put images of all sizes on one canvas, so that every prompt has equally many image tokens.

Families with a dynamic resolution give an image of another size another number of tokens; the two examples of a pair must have
the same number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from PIL import Image

from concepts.annotated_object import AnnotatedObject, Box
from concepts.image_source import ImageSource
from concepts.outlines import place_outline
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError


@dataclass(frozen=True)
class CanvasImage:
    """An image source, resized in proportion to fit a canvas and centered on it; the rest is gray.

    Examples
    --------
    >>> import groundscope as gs
    >>> from concepts.counterfactuals.photographs.canvas import CanvasImage
    >>> image = gs.scenes.dataset(10)[0].image
    >>> image.load().size, CanvasImage(image, (336, 224)).load().size
    ((112, 112), (336, 224))
    """

    base: ImageSource
    canvas: tuple[int, int]
    """Width and height in pixels."""

    @property
    def identity(self) -> str:
        """The canvas and the identity of the base as JSON."""
        return json.dumps(["canvas", self.canvas, self.base.identity])

    def load(self) -> Image.Image:
        """Return the RGB image of the canvas."""
        image = self.base.load()
        width, height, left, top = placement(image.size, self.canvas)
        result = Image.new("RGB", self.canvas, (127, 127, 127))
        result.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
        return result


def placement(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return width, height, left and top of an image of that size on the canvas, in pixels."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    width, height = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    width, height = min(width, canvas[0]), min(height, canvas[1])
    return width, height, (canvas[0] - width) // 2, (canvas[1] - height) // 2


def on_canvas(data: ConceptDataset, canvas: tuple[int, int]) -> ConceptDataset:
    """Return a dataset whose images are scaled to fit one size and centered on gray; boxes of objects follow.

    Parameters
    ----------
    data
        Examples.
    canvas
        Width and height in pixels.

    Raises
    ------
    ConfigError
        For a width or height below 1.

    Examples
    --------
    >>> import groundscope as gs
    >>> from concepts.counterfactuals.photographs.canvas import on_canvas
    >>> on_canvas(gs.scenes.dataset(10), (336, 336))[0].image.load().size
    (336, 336)
    """
    if min(canvas) < 1:
        msg = f"canvas={canvas[0]}x{canvas[1]}: width and height must be at least 1"
        raise ConfigError(msg)
    # By image, not by group: the two images of a pair have one group.
    images: dict[int, tuple[CanvasImage, tuple[int, int]]] = {}
    for image in (image for example in data for image in example.images):
        if id(image) not in images:
            images[id(image)] = CanvasImage(image, canvas), _size(image)
    examples = tuple(_placed(e, images) if e.images else e for e in data)
    return ConceptDataset(data.name, examples, {**data.provenance, "canvas": list(canvas)})


def parse_canvas(text: str) -> tuple[int, int]:
    """Return width and height of a canvas that is written ``WxH``, in pixels; raises `ConfigError` for other text.

    >>> from concepts.counterfactuals.photographs.canvas import parse_canvas
    >>> parse_canvas("672x448")
    (672, 448)
    """
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if match is None:
        msg = f"data.canvas={text[:40]}: write width and height in pixels, such as data.canvas=672x672"
        raise ConfigError(msg)
    return int(match[1]), int(match[2])


def _size(image: ImageSource) -> tuple[int, int]:
    header = getattr(image, "header", None)
    return header.upright_size if header is not None else image.load().size


def _placed(example: Example, images: Mapping[int, tuple[CanvasImage, tuple[int, int]]]) -> Example:
    image, size = images[id(example.image)]
    width, height, left, top = placement(size, image.canvas)
    scale, offset = (width / size[0], height / size[1]), (left, top)

    def place(o: AnnotatedObject) -> AnnotatedObject:
        def move(x: float, axis: int) -> float:
            return x * scale[axis] + offset[axis]

        box = None if o.box is None else Box(move(o.box.x0, 0), move(o.box.y0, 1), move(o.box.x1, 0), move(o.box.y1, 1))
        return replace(o, box=box, outline=place_outline(o.outline, scale, offset, image.canvas))

    further = tuple(images[id(other)][0] for other in example.further_images)
    return replace(example, image=image, further_images=further, objects=tuple(map(place, example.objects)))
