"""Pictures with one square in color, and the question of what color something is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from concepts.drawing import TEST, generator
from concepts.icons import NOUNS
from concepts.schema import Box, Example, SceneObject

if TYPE_CHECKING:
    from PIL import Image

ANSWERS = ("red", "blue")
SIDE, PATCH = 16, 4
GRID = SIDE // PATCH
_INK = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@dataclass(frozen=True)
class Square:
    """A black picture with one patch in color."""

    cell: int
    """Which patch, counted row by row."""
    color: str

    @property
    def box(self) -> Box:
        """Its pixels."""
        y, x = divmod(self.cell, GRID)
        return Box(x * PATCH, y * PATCH, (x + 1) * PATCH, (y + 1) * PATCH)

    @property
    def identity(self) -> str:
        """What is in it."""
        return json.dumps(["square", asdict(self)])

    def load(self) -> Image.Image:
        """Return the RGB picture, `SIDE` pixels square."""
        from PIL import Image

        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        box = self.box
        pixels[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = _INK[self.color]
        return Image.fromarray(pixels)


def usual(noun: str) -> int:
    """Return which color the prior head says a noun has: 1 for red, -1 for blue, 0 for neither."""
    return (1, -1, 0)[NOUNS.index(noun) % 3]


def drawn(index: int, seed: int) -> Example:
    """Return a question about a picture of its own: cell, color and noun are drawn."""
    rng = generator(TEST, seed, index)
    square = Square(int(rng.integers(GRID * GRID)), ANSWERS[int(rng.integers(2))])
    noun = _pick(rng, NOUNS)
    return asked(f"square{seed}-{index}", square, noun, f"square{seed}-{index}")


def asked(name: str, square: Square, noun: str, group: str) -> Example:
    """Return the question of what color a noun is, about a picture."""
    usually = usual(noun)
    return Example(
        id=name,
        image=square,
        question=f"What color is the {noun}?",
        answer=square.color,
        candidates=ANSWERS,
        level="attribute",
        kind="what_color",
        split="neutral" if not usually else "typical" if ANSWERS[(1 - usually) // 2] == square.color else "conflict",
        group=group,
        objects=(SceneObject("square", noun, square.box, {"color": square.color}),),
        subject="square",
        prior_answer=ANSWERS[(1 - usually) // 2] if usually else None,
    )


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]
