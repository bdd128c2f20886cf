"""Icon scenes: 112 x 112 images whose truth is known exactly, drawn from a description and a seed.

A `Scene` is its description; pixels are made on demand and are the same on every machine. Edits (remove, recolor,
move, replace) return a new description, so a counterfactual differs in exactly what was edited.
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

from concepts.scenes.distributions import UNIFORM, World
from concepts.scenes.icons import icon
from concepts.schema import Box, SceneObject
from groundscope.core.errors import DataError

SIDE = 112
"""Width and height of a scene in pixels."""
SIZES: Mapping[str, tuple[int, int]] = MappingProxyType({"small": (20, 22), "big": (30, 32)})
"""Size word to the smallest and largest icon side in pixels."""
MARGIN = 20
"""Centres must be this many pixels apart along an axis for a relation along it to be asked."""
RELATIONS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
)
"""Relation to (axis, sign of the difference of centres)."""
BACKGROUNDS = ("plain", "gradient", "textured", "sky")
TRAIN, TEST = 0, 1
"""Seed spaces: a scene of one never shares its seed with a scene of the other."""


@dataclass(frozen=True)
class Background:
    """What is behind the objects: a kind of `BACKGROUNDS`, two pastel colors, and the seed of its texture."""

    kind: str
    top: tuple[int, int, int]
    bottom: tuple[int, int, int]
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """The description of one image; also an `ImageSource`."""

    id: str
    background: Background
    objects: tuple[SceneObject, ...]

    def pixels(self) -> NDArray[np.uint8]:
        """Draw the scene: uint8 ``[112, 112, 3]``."""
        canvas = _background(self.background).copy()
        for thing in self.objects:
            box = thing.require_box()
            side = int(box.x1 - box.x0)
            rgb, alpha = icon(thing.noun, thing.attributes["color"], side)
            region = canvas[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)]
            region += (rgb - region) * alpha
        return np.rint(canvas).astype(np.uint8)

    def load(self) -> Image.Image:
        """Draw the scene as an RGB image."""
        return Image.fromarray(self.pixels())

    @property
    def identity(self) -> str:
        """The description as JSON: equal for equal images."""
        b = self.background
        boxes = [o.require_box() for o in self.objects]
        things = [
            [o.id, o.noun, dict(o.attributes), [box.x0, box.y0, box.x1, box.y1]]
            for o, box in zip(self.objects, boxes, strict=True)
        ]
        return json.dumps({"scene": self.id, "background": [b.kind, b.top, b.bottom, b.seed], "objects": things})

    def get(self, noun: str) -> SceneObject | None:
        """Return the object with this noun (nouns are unique in a scene), or None."""
        return next((o for o in self.objects if o.noun == noun), None)

    def relation(self, first: SceneObject, second: SceneObject, name: str) -> bool | None:
        """Say whether `first` is in relation `name` to `second`; None where their centres are too close to tell."""
        axis, sign = RELATIONS[name]
        difference = first.require_box().center[axis] - second.require_box().center[axis]
        return None if abs(difference) < MARGIN else difference * sign > 0

    # -- edits: each returns a scene that differs in one thing ---------------------------------------------------

    def without(self, noun: str) -> Scene:
        """Remove an object."""
        self._need(noun)
        return replace(self, id=f"{self.id}-{noun}", objects=tuple(o for o in self.objects if o.noun != noun))

    def recolored(self, noun: str, color: str) -> Scene:
        """Give an object another color."""
        old = self._need(noun)
        new = replace(old, attributes={**old.attributes, "color": color})
        return self._swapped(old, new, f"{self.id}-{noun}={color}")

    def replaced(self, noun: str, other: str) -> Scene:
        """Put another noun in an object's place, same box and color; raises `DataError` where it is there already."""
        old = self._need(noun)
        if self.get(other) is not None:
            msg = f"scene '{self.id}' already has a '{other}'; nouns are unique in a scene"
            raise DataError(msg)
        return self._swapped(old, replace(old, noun=other), f"{self.id}-{noun}={other}")

    def mirrored(self, axis: int) -> Scene:
        """Mirror every object's place along an axis (0: left-right, 1: top-bottom); icons themselves are not flipped."""

        def flip(box: Box) -> Box:
            if axis == 0:
                return Box(SIDE - box.x1, box.y0, SIDE - box.x0, box.y1)
            return Box(box.x0, SIDE - box.y1, box.x1, SIDE - box.y0)

        things = tuple(replace(o, box=flip(o.require_box())) for o in self.objects)
        return replace(self, id=f"{self.id}-mirror{axis}", objects=things)

    def _need(self, noun: str) -> SceneObject:
        found = self.get(noun)
        if found is None:
            msg = f"scene '{self.id}' has no '{noun}': it shows {', '.join(o.noun for o in self.objects) or 'nothing'}"
            raise DataError(msg)
        return found

    def _swapped(self, old: SceneObject, new: SceneObject, name: str) -> Scene:
        return replace(self, id=name, objects=tuple(new if o is old else o for o in self.objects))


def generator(space: int, seed: int, index: int) -> np.random.Generator:
    """Return the random stream of scene `index` of dataset `seed` in a seed space (`TRAIN` or `TEST`)."""
    return np.random.Generator(np.random.PCG64([space, seed, index]))


def sample(
    rng: np.random.Generator,
    name: str,
    world: World = UNIFORM,
    count: int | None = None,
    nouns: list[str] | None = None,
) -> Scene:
    """Draw a scene.

    Parameters
    ----------
    rng
        Random stream; nothing else decides the result.
    name
        The scene's id.
    world
        Which nouns and colors are likely.
    count
        Number of objects, 2-5 by default.
    nouns
        Nouns that must be there, instead of drawing them; colors, sizes and places are still drawn.
    """
    wanted = count if count is not None else int(rng.integers(2, 6))
    chosen = list(nouns) if nouns is not None else world.sample_nouns(rng, wanted)
    while True:
        things = _place(rng, chosen, world)
        if things is not None:
            return Scene(name, _sample_background(rng), things)


def _place(rng: np.random.Generator, nouns: list[str], world: World) -> tuple[SceneObject, ...] | None:
    """Draw color, size and a free place for each noun; None where one finds no room."""
    things: list[SceneObject] = []
    for number, noun in enumerate(nouns):
        size = "big" if rng.random() < 0.5 else "small"
        low, high = SIZES[size]
        side = int(rng.integers(low, high + 1))
        color = world.sample_color(rng, noun)
        for _ in range(60):
            x, y = (int(v) for v in rng.integers(1, SIDE - side, size=2))
            if all(
                x >= b.x1 + 2 or x + side + 2 <= b.x0 or y >= b.y1 + 2 or y + side + 2 <= b.y0
                for b in (o.require_box() for o in things)
            ):
                box = Box(x, y, x + side, y + side)
                things.append(SceneObject(f"o{number}", noun, box, {"color": color, "size": size}))
                break
        else:
            return None
    return tuple(things)


def _sample_background(rng: np.random.Generator) -> Background:
    kind = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    base = rng.integers(185, 246, size=3)
    top, bottom = (base + rng.integers(-12, 10, size=3) for _ in range(2))
    if kind == "sky":
        top, bottom = base // 8 + np.array([168, 196, 220]), base // 8 + np.array([160, 190, 140])
    return Background(kind, _triple(top), _triple(bottom), int(rng.integers(64)))


def _triple(values: NDArray[np.int64]) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in values)
    return r, g, b


@lru_cache(maxsize=64)
def _texture(seed: int) -> NDArray[np.float32]:
    """Soft grain, float32 ``[112, 112, 1]`` of about +-8 grey levels."""
    rng = np.random.Generator(np.random.PCG64([2, seed]))
    coarse = rng.integers(-8, 9, size=(SIDE // 4, SIDE // 4)).repeat(4, axis=0).repeat(4, axis=1)
    return (coarse + rng.integers(-4, 5, size=(SIDE, SIDE)))[..., None].astype(np.float32)


def _background(spec: Background) -> NDArray[np.float32]:
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
