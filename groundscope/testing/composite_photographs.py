"""Icons on real photographs: image files with known truth whose backgrounds are not drawn.

The photographs are those that scikit-learn and scikit-image ship with free licenses: an astronaut (NASA, public domain), coffee,
a cat and a rocket (CC0), a tower in China and a flower (CC BY 2.0).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from concepts.annotated_object import AnnotatedObject, Box
from concepts.image_files import BytesImage, FileImage
from concepts.run_length_masks import RunLengthMask
from concepts.scenes.icons import icon
from concepts.scenes.scene import SIDE, Scene
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError

PHOTOGRAPHS = (
    ("skimage.data", "astronaut.png"), ("skimage.data", "coffee.png"), ("skimage.data", "chelsea.png"),
    ("skimage.data", "rocket.jpg"), ("sklearn.datasets.images", "china.jpg"), ("sklearn.datasets.images", "flower.jpg"),
)  # fmt: skip
"""Package and file of each background."""
GRAY = 215
"""Gray level towards which backgrounds are faded, about the mean of the backgrounds of icon scenes."""
SIDES = (224, 280, 336)
"""Sides of the square images in pixels."""


def save_composites(
    data: ConceptDataset,
    folder: Path | str,
    *,
    gray_share: float = 0.5,
    quality: int = 75,
    masks: bool = False,
    seed: int = 0,
) -> ConceptDataset:
    """Paste the icons of scenes on photographs, save them as JPEG files of several sizes, and return the questions about them.

    Parameters
    ----------
    data
        Examples of icon scenes.
    folder
        Folder of the image files; created if necessary.
    gray_share
        Share of gray in the background: 0 for the photograph, 1 for gray only.
    quality
        Quality of the JPEG files.
    masks
        Whether outlines are masks of pixels (`RunLengthMask`) instead of polygons.
    seed
        Seed of the choice of photograph, part of it and size for each scene.

    Returns
    -------
    ConceptDataset
        The questions, with boxes and outlines of the objects in pixels of the new images.

    Raises
    ------
    ConfigError
        If `gray_share` is not from 0 to 1.

    Examples
    --------
    >>> import tempfile
    >>> import groundscope as gs
    >>> from groundscope.testing.composite_photographs import save_composites
    >>> data = save_composites(gs.scenes.dataset(10)[:1], tempfile.mkdtemp(), gray_share=0.5)
    >>> data[0].image.load().size in {(side, side) for side in (224, 280, 336)}, len(data[0].objects[0].outline) > 0
    (True, True)
    """
    if not 0 <= gray_share <= 1:
        msg = f"gray_share={gray_share} must be from 0 to 1"
        raise ConfigError(msg)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scenes: dict[str, tuple[FileImage, tuple[AnnotatedObject, ...]]] = {}
    for example in data:
        scene = example.image
        if isinstance(scene, Scene) and scene.identity not in scenes:
            rng = np.random.default_rng([seed, len(scenes)])
            side = SIDES[int(rng.integers(len(SIDES)))]
            name = f"{len(scenes):06d}.jpg"
            pixels = _background(rng, side, gray_share)
            objects = tuple(_paste(pixels, item, side / SIDE, masks=masks) for item in scene.objects)
            Image.fromarray(np.rint(pixels).astype(np.uint8)).save(folder / name, quality=quality)
            scenes[scene.identity] = FileImage(folder / name, name), objects
    examples = tuple(
        replace(e, image=scenes[e.image.identity][0], objects=scenes[e.image.identity][1])
        for e in data
        if isinstance(e.image, Scene)
    )
    about = {"gray_share": gray_share, "quality": quality, "seed": seed}
    return ConceptDataset(f"{data.name}, on photographs", examples, {**data.provenance, **about})


@cache
def _photograph(number: int) -> Image.Image:
    package, name = PHOTOGRAPHS[number]
    return BytesImage(files(package).joinpath(name).read_bytes(), name).load()


def _background(rng: np.random.Generator, side: int, gray_share: float) -> np.ndarray:
    """Return a random square part of a random photograph, faded, float32 ``[side, side, 3]``."""
    image = _photograph(int(rng.integers(len(PHOTOGRAPHS))))
    size = int(rng.integers(min(image.size) * 3 // 4, min(image.size) + 1))
    x, y = (int(rng.integers(0, length - size + 1)) for length in image.size)
    part = image.resize((side, side), Image.Resampling.BICUBIC, box=(x, y, x + size, y + size))
    return np.asarray(part, np.float32) * (1 - gray_share) + GRAY * gray_share


def _paste(pixels: np.ndarray, item: AnnotatedObject, scale: float, *, masks: bool) -> AnnotatedObject:
    """Draw an icon into the pixels; return the object with its box and outline there."""
    box = item.require_box()
    x, y, side = (round(v * scale) for v in (box.x0, box.y0, box.x1 - box.x0))
    rgb, alpha = icon(item.noun, item.attributes["color"], side)
    region = pixels[y : y + side, x : x + side]
    region += (rgb - region) * alpha
    box = Box(x, y, x + side, y + side)
    if not masks:
        return replace(item, box=box, outline=_outline(alpha[..., 0], x, y))
    opaque = np.zeros(pixels.shape[:2], dtype=bool)
    opaque[y : y + side, x : x + side] = (alpha[..., 0] > 0.5)[: len(pixels) - y, : len(pixels) - x]
    return replace(item, box=box, outline=RunLengthMask.from_pixels(opaque))


def _outline(alpha: np.ndarray, x: int, y: int) -> tuple[tuple[float, ...], ...]:
    """Return the outline of the opaque pixels, moved to the place of the icon."""
    from skimage.measure import approximate_polygon, find_contours

    polygons = (approximate_polygon(c, 0.7) for c in find_contours(np.pad(alpha, 1), 0.5))
    # Contours are (row, column) of the padded array.
    return tuple(
        tuple(round(float(v), 1) for row, column in polygon for v in (column - 1 + x, row - 1 + y))
        for polygon in polygons
        if len(polygon) > 3
    )
