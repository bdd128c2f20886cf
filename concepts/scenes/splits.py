"""Test questions on icon scenes: what the embedded model is measured on, split by what could mislead it.

=============  ==========================================================================================
split          scenes and questions
=============  ==========================================================================================
neutral        uniform scenes, nothing that a prior contradicts: existence, size and relation, and the color
               of nouns that have no typical one; yes and no in equal number
random         no partners side by side; a noun that is there, and an absent one nothing speaks for
popular        the same scenes; the absent noun is one the biased world shows often
adversarial    the same scenes; the absent noun is the usual partner of one that is there
typical        a noun in its typical color; is it that color, is it another, what color is it
conflict       the same scenes with that noun in another color: what is seen contradicts the prior
caption        scenes of the biased world without their partners: describe the image
=============  ==========================================================================================

`random`, `popular` and `adversarial` share scenes, `typical` and `conflict` share scenes: they differ in one thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from concepts.scenes import questions
from concepts.scenes.distributions import BIASED, COLOR_NAMES, PARTNER, POPULAR, TYPICAL, UNIFORM
from concepts.scenes.icons import NOUNS
from concepts.scenes.questions import as_example
from concepts.scenes.scene import TEST, Scene, generator, sample
from concepts.schema import ConceptDataset, Example, Question
from groundscope.core.errors import ConfigError

T = TypeVar("T")

SHARES = {"neutral": 0.4, "presence": 0.25, "color": 0.25, "caption": 0.1}
"""Share of the images for each design; ``presence`` and ``color`` make three and two splits of each image."""
SPLITS = ("neutral", "random", "popular", "adversarial", "typical", "conflict", "caption")


def dataset(n_images: int = 500, seed: int = 0, splits: Sequence[str] = SPLITS) -> ConceptDataset:
    """Make the test questions of `n_images` scenes.

    Parameters
    ----------
    n_images
        Number of different images drawn, shared out as `SHARES` says whatever `splits` are asked for.
    seed
        Any whole number from 0; scenes of training come from another seed space.
    splits
        Which splits to keep.

    Raises
    ------
    ConfigError
        For fewer than 10 images, a negative seed or an unknown split.
    """
    unknown = [s for s in splits if s not in SPLITS]
    if unknown:
        msg = f"no split '{unknown[0]}': there are {', '.join(SPLITS)}"
        raise ConfigError(msg)
    if n_images < 10 or seed < 0:
        msg = f"n_images={n_images}, seed={seed}: at least 10 images and a seed of 0 or more are needed"
        raise ConfigError(msg)
    makers = {"neutral": _neutral, "presence": _presence, "color": _color, "caption": _caption}
    examples: list[Example] = []
    first = 0
    for design, count in _counts(n_images).items():
        for index in range(first, first + count):
            rng = generator(TEST, seed, index)
            examples += [e for e in makers[design](rng, f"s{seed}-{index}") if e.split in splits]
        first += count
    provenance = {"generator": "concepts.scenes", "n_images": n_images, "seed": seed, "splits": list(splits)}
    return ConceptDataset(f"scenes-{n_images}-{seed}", tuple(examples), provenance)


def _counts(n_images: int) -> dict[str, int]:
    """Return how many images each design has; they add up to `n_images`.

    Each share is rounded; where that makes too many or too few, the designs that rounding changed most are corrected.
    """
    exact = {design: n_images * share for design, share in SHARES.items()}
    counts = {design: round(value) for design, value in exact.items()}
    while (left := n_images - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        most = max(counts, key=lambda design: step * (exact[design] - counts[design]))
        counts[most] += step
    return counts


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _absent(scene: Scene, nouns: Sequence[str] = NOUNS) -> list[str]:
    return [n for n in nouns if scene.get(n) is None]


def _neutral(rng: np.random.Generator, name: str) -> Iterator[Example]:
    """Existence, color, size and relation; for each a question answered yes and one answered no."""
    scene = sample(rng, name, UNIFORM)
    while all(o.noun in TYPICAL for o in scene.objects):
        scene = sample(rng, name, UNIFORM)
    asked: list[Question] = [
        questions.existence(scene, _pick(rng, scene.objects).noun),
        questions.existence(scene, _pick(rng, _absent(scene))),
    ]
    thing = _pick(rng, [o for o in scene.objects if o.noun not in TYPICAL])
    own = thing.attributes["color"]
    other = _pick(rng, [c for c in COLOR_NAMES if c != own])
    asked += [
        questions.color(scene, thing, own),
        questions.color(scene, thing, other),
        questions.what_color(scene, thing),
    ]
    sized = _pick(rng, scene.objects)
    asked += [questions.size(scene, sized, "big"), questions.size(scene, sized, "small")]
    possible = [
        (q_yes, q_no)
        for a in scene.objects
        for b in scene.objects
        if a is not b
        for yes, no in (("left of", "right of"), ("right of", "left of"), ("above", "below"), ("below", "above"))
        if (q_yes := questions.relation(scene, a, b, yes)) is not None
        and q_yes.answer == "yes"
        and (q_no := questions.relation(scene, a, b, no)) is not None
    ]
    for chosen in rng.permutation(len(possible))[:2]:
        asked += possible[int(chosen)]
    unique = {q.text: q for q in asked}
    yield from (as_example(scene, q, "neutral") for q in unique.values())


def _presence(rng: np.random.Generator, name: str) -> Iterator[Example]:
    """One present noun and one absent noun in each of the three POPE-style splits."""
    while True:
        chosen: list[str] = []
        wanted = int(rng.integers(2, 6))
        while len(chosen) < wanted:
            noun = _pick(rng, NOUNS)
            if noun not in chosen and PARTNER[noun] not in chosen:
                chosen.append(noun)
        partners = [PARTNER[n] for n in chosen if PARTNER[n] not in POPULAR]
        popular = [n for n in POPULAR if n not in chosen and PARTNER[n] not in chosen]
        if partners and popular:
            break
    scene = sample(rng, name, BIASED, nouns=chosen)
    neither = [n for n in _absent(scene) if n not in POPULAR and PARTNER[n] not in chosen]
    for split, absent in (("random", neither), ("popular", popular), ("adversarial", partners)):
        yield as_example(scene, questions.existence(scene, _pick(rng, scene.objects).noun), split)
        yield as_example(scene, questions.existence(scene, _pick(rng, absent)), split)


def _color(rng: np.random.Generator, name: str) -> Iterator[Example]:
    """Ask of the same scene with a noun in its typical color, and in another."""
    subject = _pick(rng, tuple(TYPICAL))
    others = [n for n in NOUNS if n not in {subject, PARTNER[subject]}]
    count = int(rng.integers(1, 4))
    chosen = [subject, *(others[int(i)] for i in rng.permutation(len(others))[:count])]
    color, _ = TYPICAL[subject]
    other = _pick(rng, [c for c in COLOR_NAMES if c != color])
    scene = sample(rng, name, UNIFORM, nouns=chosen)
    for split, shown in (("typical", color), ("conflict", other)):
        picture = scene.recolored(subject, shown)
        thing = picture.get(subject)
        if thing is not None:
            for question in (
                questions.color(picture, thing, color),
                questions.color(picture, thing, other),
                questions.what_color(picture, thing),
            ):
                yield as_example(picture, question, split, group=name)


def _caption(rng: np.random.Generator, name: str) -> Iterator[Example]:
    """Ask for a description where nouns lack their partners: what a model adds, it adds from the prior."""
    chosen: list[str] = []
    wanted = int(rng.integers(2, 5))
    while len(chosen) < wanted:
        noun = _pick(rng, NOUNS)
        if noun not in chosen and PARTNER[noun] not in chosen:
            chosen.append(noun)
    scene = sample(rng, name, BIASED, nouns=chosen)
    yield as_example(scene, questions.caption(scene), "caption")
