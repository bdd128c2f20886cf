"""Icon scenes: 112 x 112 images drawn from a description, so that objects, attributes and relations are known exactly.

A `Scene` stores the description; its pixels are drawn on demand and are the same on every machine. An edit (remove, recolor,
replace, mirror) returns a new description, so the edited image differs only in what was edited.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concepts.annotated_object import AnnotatedObject, Box
from concepts.scenes.distributions import UNIFORM, SceneDistribution
from concepts.scenes.icons import icon
from groundscope.core.errors import DataError
from groundscope.core.text import nearest

SIDE = 112
"""Width and height of a scene in pixels."""
SIZES: Mapping[str, tuple[int, int]] = MappingProxyType({"small": (20, 22), "big": (30, 32)})
"""Size word to the range of the icon's side in pixels, both ends included."""
MARGIN = 20
"""Smallest distance in pixels of two centers along an axis for which a relation along that axis is defined."""
RELATIONS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
)
"""Relation to its axis (0: horizontal, 1: vertical) and the sign of first center minus second center."""
BACKGROUNDS = ("plain", "gradient", "textured", "sky")
TRAIN, TEST = 0, 1
"""Seed spaces of training and test scenes, which have no seed in common."""


@dataclass(frozen=True)
class Background:
    """Background of a scene: two pastel colors, and the seed of its texture and horizon."""

    kind: str
    """One of `BACKGROUNDS`."""
    top: tuple[int, int, int]
    bottom: tuple[int, int, int]
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """The description of one image; itself an `ImageSource`. Each noun occurs at most once.

    Examples
    --------
    >>> import groundscope as gs
    >>> scene = gs.scenes.dataset(10)[0].image
    >>> [f"{o.attributes['color']} {o.noun}" for o in scene.objects]
    ['yellow chair', 'blue airplane', 'red banana']
    >>> scene.pixels().shape, [o.noun for o in scene.without(scene.objects[0].noun).objects]
    ((112, 112, 3), ['airplane', 'banana'])
    """

    id: str
    background: Background
    objects: tuple[AnnotatedObject, ...]

    def pixels(self) -> NDArray[np.uint8]:
        """Draw the scene: uint8 ``[112, 112, 3]``."""
        canvas = _draw_background(self.background).copy()
        for item in self.objects:
            box = item.require_box()
            side = int(box.x1 - box.x0)
            rgb, alpha = icon(item.noun, item.attributes["color"], side)
            region = canvas[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)]
            region += (rgb - region) * alpha
        return np.rint(canvas).astype(np.uint8)

    def load(self) -> Image.Image:
        """Draw the scene as an RGB image."""
        return Image.fromarray(self.pixels())

    @property
    def identity(self) -> str:
        """The description as JSON; equal for equal images."""
        b = self.background
        boxes = [o.require_box() for o in self.objects]
        objects = [
            [o.id, o.noun, dict(o.attributes), [box.x0, box.y0, box.x1, box.y1]]
            for o, box in zip(self.objects, boxes, strict=True)
        ]
        return json.dumps({"scene": self.id, "background": [b.kind, b.top, b.bottom, b.seed], "objects": objects})

    def get(self, noun: str) -> AnnotatedObject | None:
        """Return the object with this noun, or None."""
        return next((o for o in self.objects if o.noun == noun), None)

    def relation(self, first: AnnotatedObject, second: AnnotatedObject, name: str) -> bool | None:
        """Whether `first` has the relation `name` to `second`; None if their centers are closer than `MARGIN`."""
        axis, sign = RELATIONS[name]
        difference = first.require_box().center[axis] - second.require_box().center[axis]
        return None if abs(difference) < MARGIN else difference * sign > 0

    # -- edits ---------------------------------------------------------------------------------------------------

    def without(self, noun: str) -> Scene:
        """Return the scene without an object; raises `DataError` if the scene does not show it."""
        self._object(noun)
        return replace(self, id=f"{self.id}-{noun}", objects=tuple(o for o in self.objects if o.noun != noun))

    def recolored(self, noun: str, color: str) -> Scene:
        """Return the scene with an object in another color; raises `DataError` if the scene does not show it."""
        old = self._object(noun)
        new = replace(old, attributes={**old.attributes, "color": color})
        return self._with_object(old, new, f"{self.id}-{noun}={color}")

    def replaced(self, noun: str, other: str) -> Scene:
        """Return the scene with another noun in an object's box and color.

        Raises
        ------
        DataError
            If the scene does not show `noun`, or already shows `other`.
        """
        old = self._object(noun)
        if self.get(other) is not None:
            msg = f"scene '{self.id}' already has a '{other}'; nouns are unique in a scene"
            raise DataError(msg)
        return self._with_object(old, replace(old, noun=other), f"{self.id}-{noun}={other}")

    def mirrored(self, axis: int) -> Scene:
        """Return the scene with all boxes mirrored along an axis (0: left-right, 1: top-bottom); icons are not flipped."""

        def flip(box: Box) -> Box:
            if axis == 0:
                return Box(SIDE - box.x1, box.y0, SIDE - box.x0, box.y1)
            return Box(box.x0, SIDE - box.y1, box.x1, SIDE - box.y0)

        objects = tuple(replace(o, box=flip(o.require_box())) for o in self.objects)
        return replace(self, id=f"{self.id}-mirror{axis}", objects=objects)

    def _object(self, noun: str) -> AnnotatedObject:
        item = self.get(noun)
        if item is None:
            nouns = [o.noun for o in self.objects]
            msg = f"scene '{self.id}' has no '{noun}'; choose from {', '.join(nouns) or 'no objects'}{nearest(noun, nouns)}"
            raise DataError(msg)
        return item

    def _with_object(self, old: AnnotatedObject, new: AnnotatedObject, scene_id: str) -> Scene:
        return replace(self, id=scene_id, objects=tuple(new if o is old else o for o in self.objects))


def generator(space: int, seed: int, index: int) -> np.random.Generator:
    """Return the random generator of scene `index` of dataset `seed` in a seed space (`TRAIN` or `TEST`)."""
    return np.random.Generator(np.random.PCG64([space, seed, index]))


def sample_scene(
    rng: np.random.Generator,
    scene_id: str,
    distribution: SceneDistribution = UNIFORM,
    count: int | None = None,
    nouns: list[str] | None = None,
) -> Scene:
    """Draw a random scene.

    Parameters
    ----------
    rng
        Random generator.
    scene_id
        Id of the scene.
    distribution
        Probabilities of nouns and colors.
    count
        Number of objects; by default drawn from 2 to 5.
    nouns
        Nouns of the scene, instead of drawing them; colors, sizes and boxes are drawn.

    Examples
    --------
    >>> from concepts.scenes.scene import TEST, generator, sample_scene
    >>> scene = sample_scene(generator(TEST, 0, 0), "s0", nouns=["apple", "car"])
    >>> [o.noun for o in scene.objects]
    ['apple', 'car']
    """
    n_objects = count if count is not None else int(rng.integers(2, 6))
    scene_nouns = list(nouns) if nouns is not None else distribution.sample_nouns(rng, n_objects)
    while True:
        objects = _sample_objects(rng, scene_nouns, distribution)
        if objects is not None:
            return Scene(scene_id, _sample_background(rng), objects)


def _sample_objects(
    rng: np.random.Generator, nouns: list[str], distribution: SceneDistribution
) -> tuple[AnnotatedObject, ...] | None:
    """Draw color, size and box of each noun, without overlap; None if 60 attempts find no free box for a noun."""
    objects: list[AnnotatedObject] = []
    for number, noun in enumerate(nouns):
        size = "big" if rng.random() < 0.5 else "small"
        low, high = SIZES[size]
        side = int(rng.integers(low, high + 1))
        color = distribution.sample_color(rng, noun)
        for _ in range(60):
            x, y = (int(v) for v in rng.integers(1, SIDE - side, size=2))
            if all(
                x >= b.x1 + 2 or x + side + 2 <= b.x0 or y >= b.y1 + 2 or y + side + 2 <= b.y0
                for b in (o.require_box() for o in objects)
            ):
                box = Box(x, y, x + side, y + side)
                objects.append(AnnotatedObject(f"o{number}", noun, box, {"color": color, "size": size}))
                break
        else:
            return None
    return tuple(objects)


def _sample_background(rng: np.random.Generator) -> Background:
    kind = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    base = rng.integers(185, 246, size=3)
    top, bottom = (base + rng.integers(-12, 10, size=3) for _ in range(2))
    if kind == "sky":
        top, bottom = base // 8 + np.array([168, 196, 220]), base // 8 + np.array([160, 190, 140])
    return Background(kind, _rgb(top), _rgb(bottom), int(rng.integers(64)))


def _rgb(values: NDArray[np.int64]) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in values)
    return r, g, b


@lru_cache(maxsize=64)
def _texture(seed: int) -> NDArray[np.float32]:
    """Return a texture of about +-8 gray levels, float32 ``[112, 112, 1]``."""
    rng = np.random.Generator(np.random.PCG64([2, seed]))
    coarse = rng.integers(-8, 9, size=(SIDE // 4, SIDE // 4)).repeat(4, axis=0).repeat(4, axis=1)
    return (coarse + rng.integers(-4, 5, size=(SIDE, SIDE)))[..., None].astype(np.float32)


def _draw_background(spec: Background) -> NDArray[np.float32]:
    """Draw a background, float32 ``[112, 112, 3]``."""
    top, bottom = np.array(spec.top, np.float32), np.array(spec.bottom, np.float32)
    if spec.kind == "plain":
        return np.broadcast_to(top, (SIDE, SIDE, 3)).astype(np.float32)
    if spec.kind == "sky":
        horizon = 44 + spec.seed // 2
        rows = (np.arange(SIDE) >= horizon)[:, None, None]
        return np.broadcast_to(np.where(rows, bottom, top), (SIDE, SIDE, 3)).astype(np.float32)
    ramp = (np.arange(SIDE, dtype=np.float32) / (SIDE - 1))[:, None, None]
    canvas = np.broadcast_to(top + (bottom - top) * ramp, (SIDE, SIDE, 3)).astype(np.float32)
    if spec.kind == "textured":
        canvas += _texture(spec.seed)
    return np.clip(canvas, 0, 255)
