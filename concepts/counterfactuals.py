"""Pairs of examples that differ in one stated thing, under the same question.

Scenes are drawn again with one thing changed; any image can be blanked, blurred, drowned in noise, or have an object
masked. Sources: blur and object mask from ICT (arXiv 2411.15268), diffusion noise from VCD (arXiv 2311.16922).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageFilter

from concepts.scenes import questions
from concepts.scenes.distributions import COLOR_NAMES
from concepts.scenes.scene import RELATIONS, Scene
from concepts.schema import Box, ConceptDataset, CounterfactualPair, Example, ImageSource, Question
from groundscope.core.errors import ConfigError, DataError

BLUR_RADIUS = 5.0
"""Gaussian radius in pixels (ICT)."""
NOISE_STEP = 500
"""Diffusion step of 1,000 (VCD)."""


@dataclass(frozen=True)
class Edited:
    """An image source seen through an edit of its pixels."""

    base: ImageSource
    edit: str
    """``blank``, ``blur``, ``noise`` or ``mask``."""
    box: Box | None = None
    """What to mask."""

    @property
    def identity(self) -> str:
        """The base's identity and the edit."""
        return json.dumps([self.edit, asdict(self.box) if self.box else None, self.base.identity])

    def load(self) -> Image.Image:
        """Return the edited RGB image."""
        image = self.base.load()
        if self.edit == "blur":
            return image.filter(ImageFilter.GaussianBlur(BLUR_RADIUS))
        pixels = np.asarray(image, dtype=np.float64)
        mean = pixels.mean(axis=(0, 1))
        if self.edit == "blank":
            pixels = np.broadcast_to(mean, pixels.shape)
        elif self.edit == "noise":
            seed = int.from_bytes(hashlib.sha256(self.base.identity.encode()).digest()[:8])
            noise = np.random.Generator(np.random.PCG64(seed)).standard_normal(pixels.shape)
            kept = kept_signal(NOISE_STEP)
            pixels = 127.5 * (kept * (pixels / 127.5 - 1) + np.sqrt(1 - kept**2) * noise + 1)
        elif self.box is not None:
            pixels = pixels.copy()
            x, y = int(self.box.x0), int(self.box.y0)
            pixels[y : max(int(self.box.y1), y + 1), x : max(int(self.box.x1), x + 1)] = mean  # at least one pixel
        return Image.fromarray(np.rint(np.clip(pixels, 0, 255)).astype(np.uint8))


def kept_signal(step: int) -> float:
    """Return sqrt(alpha-bar) of VCD's schedule: the share of the image left after `step` diffusion steps of 1,000."""
    beta = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.005 - 1e-5) + 1e-5
    return float(np.sqrt(np.cumprod(1 - beta)[step]))


def pairs(data: ConceptDataset, kind: str, limit: int | None = None) -> list[CounterfactualPair]:
    """Make a counterfactual pair of every example that allows one.

    Parameters
    ----------
    data
        Examples; ``object``, ``color`` and ``relation`` need icon scenes, the other kinds any image.
    kind
        ``object``: the noun asked for removed, or put in another's place; ``color``: the subject recolored;
        ``relation``: the scene mirrored along the relation's axis; ``blank``, ``blur``, ``noise``, ``mask``: the
        evidence destroyed (only questions whose true answer is not what the destroyed image would give).
    limit
        Keep at most this many, the first.

    Returns
    -------
    list of CounterfactualPair
        In the order of `data`. The two answers always differ.

    Raises
    ------
    ConfigError
        For an unknown kind.
    DataError
        Where no example allows such a pair.
    """
    if kind not in KINDS:
        msg = f"no kind of pair '{kind}': there are {', '.join(KINDS)}"
        raise ConfigError(msg)
    made: list[CounterfactualPair] = []
    for example in data:
        if limit is not None and len(made) >= limit:
            break
        made.extend(KINDS[kind](example))
    if not made:
        msg = f"dataset '{data.name}' has no example that allows a pair of kind '{kind}'"
        raise DataError(msg)
    return made[:limit]


def _joined(clean: Example, picture: Scene, question: Question, kind: str, change: str) -> Iterator[CounterfactualPair]:
    if question.answer == clean.answer:
        return
    corrupt = replace(
        questions.as_example(picture, question, clean.split, group=clean.group), id=f"{clean.id}|{change}"
    )
    yield CounterfactualPair(clean, corrupt, kind, change)


def _object(example: Example) -> Iterator[CounterfactualPair]:
    scene = example.image
    if not isinstance(scene, Scene) or example.kind != "existence":
        return
    noun = example.question.removesuffix(" in the image?").rsplit(" ", 1)[-1]
    if example.answer == "yes":
        picture, change = scene.without(noun), f"{noun} removed"
    else:
        old = scene.objects[-1].noun
        picture, change = scene.replaced(old, noun), f"{old} -> {noun}"
    yield from _joined(example, picture, questions.existence(picture, noun), "object", change)


def _color(example: Example) -> Iterator[CounterfactualPair]:
    scene, thing = example.image, example.named_object()
    if not isinstance(scene, Scene) or thing is None or example.kind not in {"color", "what_color"}:
        return
    own = thing.attributes["color"]
    asked = example.question.rstrip("?").rsplit(" ", 1)[-1]
    if example.kind == "color" and example.answer == "no":
        new = asked
    else:
        # The next color of the list: any other would do, but it must not depend on chance.
        new = COLOR_NAMES[(COLOR_NAMES.index(own) + 1) % len(COLOR_NAMES)]
    picture = scene.recolored(thing.noun, new)
    changed = picture.get(thing.noun) or thing
    question = (
        questions.what_color(picture, changed)
        if example.kind == "what_color"
        else questions.color(picture, changed, asked)
    )
    yield from _joined(example, picture, question, "color", f"{thing.noun}: {own} -> {new}")


def _relation(example: Example) -> Iterator[CounterfactualPair]:
    scene, thing = example.image, example.named_object()
    if not isinstance(scene, Scene) or thing is None or example.kind != "relation":
        return
    name = next(r for r in RELATIONS if f" {r} the " in example.question)
    other = example.question.rstrip("?").rsplit(" ", 1)[-1]
    axis, _ = RELATIONS[name]
    picture = scene.mirrored(axis)
    first, second = picture.get(thing.noun), picture.get(other)
    if first is None or second is None:
        return
    question = questions.relation(picture, first, second, name)
    if question is not None:
        yield from _joined(
            example, picture, question, "relation", f"mirrored {'left-right' if axis == 0 else 'up-down'}"
        )


def _destroyed(edit: str) -> Callable[[Example], Iterator[CounterfactualPair]]:
    def make(example: Example) -> Iterator[CounterfactualPair]:
        thing = example.named_object()
        if not example.candidates or (edit == "mask" and (thing is None or thing.box is None)):
            return
        if example.kind == "existence" and example.answer == "no":
            return  # nothing to destroy: the noun is not in either image
        others = [c for c in example.candidates if c != example.answer]
        wrong = example.prior_answer if example.prior_answer in others else others[0]
        image = Edited(example.image, edit, thing.box if edit == "mask" and thing else None)
        change = f"{thing.noun} masked" if edit == "mask" and thing else f"image: {edit}"
        corrupt = replace(example, id=f"{example.id}|{change}", image=image, answer=wrong, labels={})
        yield CounterfactualPair(example, corrupt, edit, change)

    return make


KINDS: Mapping[str, Callable[[Example], Iterator[CounterfactualPair]]] = MappingProxyType(
    {
        "object": _object,
        "color": _color,
        "relation": _relation,
        **{edit: _destroyed(edit) for edit in ("blank", "blur", "noise", "mask")},
    }
)
"""Kind of pair to its maker: one entry a kind."""
