"""Pictures with one colored square, and questions about the color of a noun."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from concepts.annotated_object import AnnotatedObject, Box
from concepts.scenes.icons import NOUNS
from concepts.scenes.scene import TEST, generator
from concepts.schema import Example

if TYPE_CHECKING:
    from PIL import Image

ANSWERS = ("red", "blue")
SIDE, PATCH = 16, 4
GRID = SIDE // PATCH
_INK = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@dataclass(frozen=True)
class Square:
    """A black picture with one colored patch."""

    cell: int
    """Index of the patch, row by row."""
    color: str

    @property
    def box(self) -> Box:
        """Box of the square, in pixels."""
        y, x = divmod(self.cell, GRID)
        return Box(x * PATCH, y * PATCH, (x + 1) * PATCH, (y + 1) * PATCH)

    @property
    def identity(self) -> str:
        """Content of the picture as a JSON key."""
        return json.dumps(["square", asdict(self)])

    def load(self) -> Image.Image:
        """Return the RGB picture, `SIDE` pixels square."""
        from PIL import Image

        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        box = self.box
        pixels[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = _INK[self.color]
        return Image.fromarray(pixels)


def usual(noun: str) -> int:
    """Return the usual color of a noun, which the prior head promotes: 1 for red, -1 for blue, 0 for neither."""
    return (1, -1, 0)[NOUNS.index(noun) % 3]


def draw_example(index: int, seed: int) -> Example:
    """Return a question about a new picture, with random cell, color and noun."""
    rng = generator(TEST, seed, index)
    square = Square(int(rng.integers(GRID * GRID)), ANSWERS[int(rng.integers(2))])
    noun = _pick(rng, NOUNS)
    return make_example(f"square{seed}-{index}", square, noun, f"square{seed}-{index}")


def make_example(name: str, square: Square, noun: str, group: str) -> Example:
    """Return the question about the color of a noun, for a picture."""
    prior = usual(noun)
    return Example(
        id=name,
        image=square,
        question=f"What color is the {noun}?",
        answer=square.color,
        candidates=ANSWERS,
        level="attribute",
        kind="what_color",
        split="neutral" if not prior else "typical" if ANSWERS[(1 - prior) // 2] == square.color else "conflict",
        group=group,
        objects=(AnnotatedObject("square", noun, square.box, {"color": square.color}),),
        subject="square",
        prior_answer=ANSWERS[(1 - prior) // 2] if prior else None,
    )


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]
