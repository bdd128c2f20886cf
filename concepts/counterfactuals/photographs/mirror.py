"""Mirror a photograph left to right: the truth of "left of" and "right of" changes, that of other questions does not."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image, ImageOps

from concepts.annotated_object import AnnotatedObject, Box
from concepts.counterfactual_pair import CounterfactualPair
from concepts.image_files import FileImage
from concepts.image_source import ImageSource
from concepts.nouns import singular
from concepts.outlines import mirror_outline
from concepts.schema import ConceptDataset, Example

NOT_SYMMETRIC = frozenset(
    word.strip()
    for word in """banner, billboard, book, bottle, calendar, cell phone, clock, document, flyer, graffiti, jersey, keyboard,
    label, letter, license plate, logo, magazine, map, menu, newspaper, number, page, paper, piano, poster, sign, stop sign,
    street sign, text, ticket, traffic sign, watch, word, writing""".split(",")
)
"""Nouns of things that look wrong in a mirror: with writing on them, or of one handedness."""
_SIDE_OF = re.compile(r" (left|right)(?:-hand)?(?: side)? of ")
"""A relation of two objects, as in "to the left of the cup" and "at the right side of a plate"."""
_SIDE = re.compile(r"\b(?:left|right)(?:most)?\b", re.IGNORECASE)


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
        Yield the questions without left and right instead, whose true answers do not change.
    """
    for example in data:
        if not example.candidates:
            continue
        if placebo:
            if _SIDE.search(example.question):
                continue
        elif not _asks_left_or_right(example):
            if example.level == "relation":
                left_out["questions about other relations than left and right"] += 1
            continue
        elif example.answer == "no" and not _is_on_other_side(example):
            left_out["questions with the answer no that do not say that the object is on the other side"] += 1
            continue
        if any(singular(o.noun) in NOT_SYMMETRIC for o in example.objects):
            left_out["images with objects that look wrong when mirrored"] += 1
            continue
        yield _pair(example, placebo=placebo)


def _asks_left_or_right(example: Example) -> bool:
    """Whether a question is about one relation of two objects, to the left or to the right."""
    return (
        example.level == "relation"
        and set(example.candidates) == {"yes", "no"}
        and len(_SIDE.findall(example.question)) == 1
        and _SIDE_OF.search(example.question) is not None
    )


def _is_on_other_side(example: Example) -> bool:
    """Whether the labels of a question about one side say that the object is on the other one."""
    match = _SIDE_OF.search(example.question)
    other = "right" if match is not None and match[1] == "left" else "left"
    return any(
        truth and name.startswith("relation:") and _SIDE.findall(name) == [other]
        for name, truth in example.labels.items()
    )


def _pair(example: Example, *, placebo: bool) -> CounterfactualPair:
    answer, labels = example.answer, dict(example.labels)
    if not placebo:
        answer = "no" if example.answer == "yes" else "yes"
        labels["relation:named"] = answer == "yes"
    for name in example.labels:
        if name.startswith("relation:") and _SIDE_OF.search(f" {name.removeprefix('relation:')} ") and not placebo:
            labels[name] = not labels[name]
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


def mirror_objects(objects: tuple[AnnotatedObject, ...], width: int) -> tuple[AnnotatedObject, ...]:
    """Return objects with their boxes and outlines in the mirrored image of that width."""
    return tuple(
        replace(
            o,
            box=None if o.box is None else mirror_box(o.box, width),
            outline=mirror_outline(o.outline, width),
        )
        for o in objects
    )


def image_width(image: ImageSource) -> int:
    """Return the width of an image in pixels; of an image file without decoding its pixels."""
    return image.header.upright_size[0] if isinstance(image, FileImage) else image.load().width
