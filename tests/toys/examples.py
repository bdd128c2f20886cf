"""Questions about images of any size, in memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image

from concepts.annotated_object import Box
from concepts.scenes.questions import as_example, existence
from concepts.scenes.scene import TEST, generator, sample_scene
from concepts.schema import Example


class Picture:
    """An image of any size in memory."""

    def __init__(self, name: str, pixels: np.ndarray) -> None:
        self.identity, self._pixels = name, pixels

    def load(self) -> Image.Image:
        return Image.fromarray(self._pixels)


@cache
def example(number: int = 0, size: tuple[int, int] = (140, 100)) -> Example:
    """A question about an image wider than high, with a box somewhere in it."""
    scene = sample_scene(generator(TEST, 5, number), f"s{number}", count=2)
    base = as_example(scene, existence(scene, scene.objects[0].noun), "neutral")
    width, height = size
    image = scene.pixels() if hasattr(scene, "pixels") else None
    picture = Image.fromarray(np.asarray(image)).resize(size)
    scale_x, scale_y = width / np.asarray(image).shape[1], height / np.asarray(image).shape[0]
    boxes = [o.require_box() for o in base.objects]
    objects = tuple(
        replace(o, box=Box(b.x0 * scale_x, b.y0 * scale_y, b.x1 * scale_x, b.y1 * scale_y))
        for o, b in zip(base.objects, boxes, strict=True)
    )
    source = Picture(f"s{number}-{size}", np.asarray(picture))
    return replace(base, id=f"e{number}-{size}", image=source, objects=objects)


QUESTION = "Is there a cat?"


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
