"""Remove one small object of a photograph: its region is filled from the surroundings.

The filling is biharmonic (Damelin and Hoang 2018, as in scikit-image): smooth, so it is plausible for small regions on smooth
backgrounds only. Objects on other backgrounds are left out and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image

from concepts.annotated_object import AnnotatedObject, Box
from concepts.counterfactual_pair import CounterfactualPair
from concepts.counterfactuals.photographs.regions import region_mask, share_covered
from concepts.image_source import ImageSource
from concepts.nouns import broader_nouns, canonical_noun
from concepts.outlines import Outline, outline_record, place_outline
from concepts.schema import ConceptDataset, Example

MARGIN = 3
"""Pixels by which the region of the object is dilated: edges of objects are blurred."""
MAX_SHARE = 0.05
"""Largest share of the image that a filled region covers."""
MAX_PIXELS = 8000
"""Largest filled region in pixels: time grows faster than the region."""
MAX_DEVIATION = 12.0
"""Largest standard deviation of CIELAB lightness (0 to 100) in a ring around the region: the background must be smooth."""
_RING = 6


@dataclass(frozen=True)
class InpaintedImage:
    """An image source with one region filled from its surroundings.

    Examples
    --------
    >>> import groundscope as gs
    >>> from concepts.counterfactuals.photographs.inpaint import InpaintedImage
    >>> example = next(e for e in gs.scenes.dataset(20) if e.subject is not None)
    >>> image = InpaintedImage(example.image, example.named_object().box)
    >>> image.load().size == example.image.load().size
    True
    """

    base: ImageSource
    box: Box
    """Box of the region in pixels."""
    outline: Outline = ()
    """Polygons or mask of the object; empty if only its box is known."""

    @property
    def identity(self) -> str:
        """The edit and the identity of the base as JSON."""
        return json.dumps(["inpaint", asdict(self.box), outline_record(self.outline), self.base.identity])

    def load(self) -> Image.Image:
        """Return the RGB image without the region."""
        from skimage.restoration import inpaint_biharmonic

        image = self.base.load()
        pixels = np.asarray(image, dtype=np.float64) / 255
        mask = filled_mask(image.size, self.box, self.outline)
        rows, columns = _window(mask)
        # The filling depends on nearby pixels only, and the time on the size of the array.
        filled = inpaint_biharmonic(pixels[rows, columns], mask[rows, columns], channel_axis=-1)
        result = np.array(image)
        patch = result[rows, columns]
        patch[mask[rows, columns]] = np.rint(255 * np.clip(filled[mask[rows, columns]], 0, 1)).astype(np.uint8)
        return Image.fromarray(result)


def filled_mask(size: tuple[int, int], box: Box, outline: Outline = ()) -> np.ndarray:
    """Return the pixels that are filled, bool ``[height, width]``: the object's region, dilated by `MARGIN`."""
    from scipy.ndimage import binary_dilation

    return binary_dilation(region_mask(size, box, outline), iterations=MARGIN)


def _window(mask: np.ndarray, margin: int = 16) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (
        slice(max(rows[0] - margin, 0), min(rows[-1] + margin + 1, mask.shape[0])),
        slice(max(columns[0] - margin, 0), min(columns[-1] + margin + 1, mask.shape[1])),
    )


def inpaint_pairs(
    data: ConceptDataset, left_out: Counter[str], *, placebo: bool = False
) -> Iterator[CounterfactualPair]:
    """Yield pairs of existence questions with the answer yes: the only such object is removed.

    Parameters
    ----------
    data
        Examples with yes-no questions of kind ``existence`` about an object with a box.
    left_out
        Counts of examples without a pair, by reason; increased.
    placebo
        Fill a region of the same size elsewhere in the same image instead, so that the true answer stays.
    """
    for example in data:
        if example.kind != "existence" or example.answer != "yes" or set(example.candidates) != {"yes", "no"}:
            continue
        subject = example.named_object()
        if subject is None or subject.box is None:
            left_out["questions about objects without a box"] += 1
            continue
        others = [o for o in example.objects if o.id != subject.id]
        if any(
            canonical_noun(o.noun) == canonical_noun(subject.noun)
            or canonical_noun(subject.noun) in broader_nouns(o.noun)
            for o in others
        ):
            left_out["objects of which the image has several"] += 1
            continue
        image = example.image.load()
        box = _elsewhere(image, subject, example.objects) if placebo else subject.box
        if box is None:
            left_out["images without another smooth region of that size"] += 1
        elif (
            problem := _problem(image, box, _outline(subject, box, image.size), () if placebo else tuple(others))
        ) is not None:
            left_out[problem] += 1
        else:
            outline = _outline(subject, box, image.size)
            yield _pair(example, subject, InpaintedImage(example.image, box, outline), placebo=placebo)


def _outline(subject: AnnotatedObject, box: Box, size: tuple[int, int]) -> Outline:
    """Return the outline of an object in an image of that size, moved to a box of the same size."""
    own = subject.require_box()
    return place_outline(subject.outline, (1.0, 1.0), (box.x0 - own.x0, box.y0 - own.y0), size)


def _problem(image: Image.Image, box: Box, outline: Outline, others: tuple[AnnotatedObject, ...]) -> str | None:
    """Return why a region cannot be filled, or None."""
    mask = filled_mask(image.size, box, outline)
    if mask.sum() > min(MAX_SHARE * mask.size, MAX_PIXELS):
        return "objects too large to fill"
    if share_covered(box, [o.box for o in others if o.box is not None]) > 0.1:
        return "objects in front of or behind another object"
    if _deviation(image, mask) > MAX_DEVIATION:
        return "objects on a background that is not smooth"
    return None


def _deviation(image: Image.Image, mask: np.ndarray) -> float:
    """Return the standard deviation of lightness in a ring around the region."""
    from scipy.ndimage import binary_dilation
    from skimage.color import rgb2lab

    rows, columns = _window(mask)
    inside = mask[rows, columns]
    ring = binary_dilation(inside, iterations=_RING) & ~inside
    if not ring.any():
        return float("inf")
    return float(rgb2lab(np.asarray(image)[rows, columns] / 255.0)[ring][:, 0].std())


def _elsewhere(image: Image.Image, subject: AnnotatedObject, objects: tuple[AnnotatedObject, ...]) -> Box | None:
    """Return a box of the same size that no object's box meets and that can be filled; the first on a grid of half boxes."""
    width, height = image.size
    box = subject.require_box()
    w, h = box.x1 - box.x0, box.y1 - box.y0
    boxes = [o.box for o in objects if o.box is not None]
    for y in np.arange(0, height - h, max(h / 2, 1)):
        for x in np.arange(0, width - w, max(w / 2, 1)):
            candidate = Box(float(x), float(y), float(x + w), float(y + h))
            if share_covered(candidate, boxes) > 0:
                continue
            if _problem(image, candidate, _outline(subject, candidate, image.size), ()) is None:
                return candidate
    return None


def _pair(example: Example, subject: AnnotatedObject, image: InpaintedImage, *, placebo: bool) -> CounterfactualPair:
    if placebo:
        change = f"filled beside the {subject.noun}"
        corrupt = replace(example, id=f"{example.id}|{change}", image=image)
        return CounterfactualPair(example, corrupt, "object", change, "inpaint", placebo=True)
    change = f"{subject.noun} removed"
    labels = {**example.labels, "object:named": False}
    if f"object:{subject.noun}" in labels:
        labels[f"object:{subject.noun}"] = False
    corrupt = replace(
        example, id=f"{example.id}|{change}", image=image, answer="no", labels=labels, subject=None,
        objects=tuple(o for o in example.objects if o.id != subject.id),
    )  # fmt: skip
    return CounterfactualPair(example, corrupt, "object", change, "inpaint")
