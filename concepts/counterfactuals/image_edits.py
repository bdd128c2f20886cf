"""Pairs from any image: the visible evidence for the answer is removed.

Sources: blur and object mask as in ICT (arXiv 2411.15268), diffusion noise as in VCD (arXiv 2311.16922).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageFilter

from concepts.annotated_object import Box
from concepts.counterfactual_pair import CounterfactualPair
from concepts.image_source import ImageSource
from concepts.schema import ConceptDataset, Example

BLUR_RADIUS = 5.0
"""Standard deviation of the Gaussian blur in pixels, as in ICT."""
NOISE_STEP = 500
"""Diffusion step, of 1,000, as in VCD."""
UNIFORM: Mapping[str, int] = MappingProxyType({"black": 0, "gray": 127, "white": 255})
"""Edits that replace the image by one color, and its value in all three channels."""


@dataclass(frozen=True)
class EditedImage:
    """An `ImageSource`: a base image with an edit of its pixels.

    Examples
    --------
    >>> import groundscope as gs
    >>> image = gs.scenes.dataset(10)[0].image
    >>> blank = gs.counterfactuals.EditedImage(image, "blank")
    >>> blank.load().size, len(blank.load().getcolors())
    ((112, 112), 1)
    """

    base: ImageSource
    edit: str
    """``blank``: the mean color; ``black``, ``gray``, ``white``: this color; ``blur``; ``noise``: diffusion noise; ``mask``: the
    mean color in `box`."""
    box: Box | None = None
    """The box to mask, in pixels."""

    @property
    def identity(self) -> str:
        """The edit, the box and the identity of the base as JSON."""
        return json.dumps([self.edit, asdict(self.box) if self.box else None, self.base.identity])

    def load(self) -> Image.Image:
        """Return the edited RGB image."""
        image = self.base.load()
        if self.edit in UNIFORM:
            return Image.new("RGB", image.size, (UNIFORM[self.edit],) * 3)
        if self.edit == "blur":
            return image.filter(ImageFilter.GaussianBlur(BLUR_RADIUS))
        pixels = np.asarray(image, dtype=np.float64)
        mean = pixels.mean(axis=(0, 1))
        if self.edit == "blank":
            pixels = np.broadcast_to(mean, pixels.shape)
        elif self.edit == "noise":
            seed = int.from_bytes(hashlib.sha256(self.base.identity.encode()).digest()[:8])
            noise = np.random.Generator(np.random.PCG64(seed)).standard_normal(pixels.shape)
            scale = signal_scale(NOISE_STEP)
            pixels = 127.5 * (scale * (pixels / 127.5 - 1) + np.sqrt(1 - scale**2) * noise + 1)
        elif self.box is not None:
            pixels = pixels.copy()
            x, y = int(self.box.x0), int(self.box.y0)
            pixels[y : max(int(self.box.y1), y + 1), x : max(int(self.box.x1), x + 1)] = mean  # at least one pixel
        return Image.fromarray(np.rint(np.clip(pixels, 0, 255)).astype(np.uint8))


def signal_scale(step: int) -> float:
    """Return sqrt(alpha-bar) of VCD's noise schedule: the factor of the image after `step` diffusion steps of 1,000."""
    beta = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.005 - 1e-5) + 1e-5
    return float(np.sqrt(np.cumprod(1 - beta)[step]))


def edit_pairs(edit: str) -> Callable[[ConceptDataset], Iterator[CounterfactualPair]]:
    """Return a function that pairs each example with its image after an edit, which is a name of `EditedImage.edit`."""

    def make(data: ConceptDataset) -> Iterator[CounterfactualPair]:
        for example in data:
            yield from _pair(example, edit)

    return make


def _pair(example: Example, edit: str) -> Iterator[CounterfactualPair]:
    """Yield the pair of an example and its edited image, if the edit can remove the evidence for its answer."""
    subject = example.named_object()
    if not example.candidates or (edit == "mask" and (subject is None or subject.box is None)):
        return
    if example.kind == "existence" and example.answer == "no":
        return  # the object is in neither image
    others = [candidate for candidate in example.candidates if candidate != example.answer]
    wrong = example.prior_answer if example.prior_answer in others else others[0]
    image = EditedImage(example.image, edit, subject.box if edit == "mask" and subject else None)
    change = f"{subject.noun} masked" if edit == "mask" and subject else f"image: {edit}"
    corrupt = replace(example, id=f"{example.id}|{change}", image=image, answer=wrong, labels={})
    yield CounterfactualPair(example, corrupt, edit, change)
