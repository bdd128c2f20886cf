"""Mirror a photograph left to right: the truth of "left of" and "right of" changes, that of other questions does not."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image, ImageOps

from concepts.image_files import FileImage
from concepts.nouns import singular
from concepts.schema import Box, ConceptDataset, CounterfactualPair, Example, ImageSource, SceneObject

NOT_SYMMETRIC = frozenset(
    word.strip()
    for word in """banner, billboard, book, bottle, calendar, cell phone, clock, document, flyer, graffiti, jersey, keyboard,
    label, letter, license plate, logo, magazine, map, menu, newspaper, number, page, paper, piano, poster, sign, stop sign,
    street sign, text, ticket, traffic sign, watch, word, writing""".split(",")
)
"""Nouns of things that look wrong in a mirror: with writing on them, or of one handedness."""
_RELATIONS = ("left of", "right of", "to the left of", "to the right of")
_LEFT_OR_RIGHT = re.compile(r" (?:left|right) of the ")


@dataclass(frozen=True)
class MirroredImage:
    """An image source, mirrored left to right.

    Examples
    --------
    >>> import groundscope as gs
    >>> from concepts.counterfactuals.photographs.mirror import MirroredImage
    >>> image = gs.scenes.dataset(10)[0].image
    >>> MirroredImage(MirroredImage(image)).load() == image.load()
    True
    """

    base: ImageSource

    @property
    def identity(self) -> str:
        """The edit and the identity of the base as JSON."""
        return json.dumps(["mirror", self.base.identity])

    def load(self) -> Image.Image:
        """Return the mirrored RGB image."""
        return ImageOps.mirror(self.base.load())


def mirror_box(box: Box, width: int) -> Box:
    """Return a box in the coordinates of the mirrored image of that width."""
    return Box(width - box.x1, box.y0, width - box.x0, box.y1)


def mirror_pairs(
    data: ConceptDataset, left_out: Counter[str], *, placebo: bool = False
) -> Iterator[CounterfactualPair]:
    """Yield pairs of relation questions about left and right, whose true answers change in the mirrored image.

    Parameters
    ----------
    data
        Examples with yes-no questions of kind ``relation``.
    left_out
        Counts of examples without a pair, by reason; increased.
    placebo
        Yield the other questions with candidates instead, whose true answers do not change.
    """
    for example in data:
        if not example.candidates or _asks_left_or_right(example) is placebo:
            continue
        if any(singular(o.noun) in NOT_SYMMETRIC for o in example.objects):
            left_out["images with objects that look wrong when mirrored"] += 1
            continue
        yield _pair(example, placebo=placebo)


def _asks_left_or_right(example: Example) -> bool:
    return (
        example.kind == "relation"
        and set(example.candidates) == {"yes", "no"}
        and _LEFT_OR_RIGHT.search(example.question) is not None
    )


def _pair(example: Example, *, placebo: bool) -> CounterfactualPair:
    answer, labels = example.answer, dict(example.labels)
    if not placebo:
        answer = "no" if example.answer == "yes" else "yes"
        labels["relation:named"] = answer == "yes"
    for name in _RELATIONS:
        if f"relation:{name}" in labels:
            labels[f"relation:{name}"] = not labels[f"relation:{name}"]
    change = "mirrored left-right"
    corrupt = replace(
        example,
        id=f"{example.id}|{change}",
        image=MirroredImage(example.image),
        answer=answer,
        objects=mirror_objects(example.objects, image_width(example.image)),
        labels=labels,
    )
    return CounterfactualPair(example, corrupt, "relation", change, "mirror", placebo=placebo)


def mirror_objects(objects: tuple[SceneObject, ...], width: int) -> tuple[SceneObject, ...]:
    """Return objects with their boxes in the mirrored image of that width."""
    return tuple(o if o.box is None else replace(o, box=mirror_box(o.box, width)) for o in objects)


def image_width(image: ImageSource) -> int:
    """Return the width of an image in pixels; of an image file without decoding its pixels."""
    return image.header.upright_size[0] if isinstance(image, FileImage) else image.load().width
