"""Test questions on icon scenes, in splits by what could mislead a model with a language prior.

=============  ============================================================================================
split          scenes and questions
=============  ============================================================================================
neutral        scenes of the uniform distribution; existence, size and relation questions, and color
               questions about nouns without a typical color; as many answers yes as no
random         scenes without companions; a present noun, and an absent noun that is neither popular nor a
               companion of a present noun
popular        the same scenes; the absent noun is popular, that is, frequent in the biased distribution
adversarial    the same scenes; the absent noun is the companion of a present noun
typical        a noun in its typical color: is it this color, is it another color, what color is it
conflict       the same scenes with this noun in another color, which contradicts the prior
caption        scenes of the biased distribution without companions: describe the image
=============  ============================================================================================

The splits ``random``, ``popular`` and ``adversarial`` share their scenes. Those of ``typical`` and ``conflict`` differ only in
one color.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from concepts.question import Question
from concepts.scenes import questions
from concepts.scenes.distributions import BIASED, COLOR_NAMES, COMPANION, POPULAR, TYPICAL, UNIFORM
from concepts.scenes.icons import NOUNS
from concepts.scenes.questions import as_example
from concepts.scenes.scene import TEST, Scene, generator, sample_scene
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError
from groundscope.core.text import nearest

T = TypeVar("T")

SHARES = {"neutral": 0.4, "presence": 0.25, "color": 0.25, "caption": 0.1}
"""Share of the images for each design; an image of design ``presence`` is in three splits, one of design ``color`` in two."""
SPLITS = ("neutral", "random", "popular", "adversarial", "typical", "conflict", "caption")


def dataset(n_images: int = 500, seed: int = 0, splits: Sequence[str] = SPLITS) -> ConceptDataset:
    """Return the test questions of random scenes.

    Parameters
    ----------
    n_images
        Number of scenes, divided among the designs by `SHARES`, independent of `splits`.
    seed
        Seed of the scenes, at least 0; no seed gives a scene of the embedded model's training data.
    splits
        The splits to return.

    Returns
    -------
    ConceptDataset
        About seven questions per scene, with objects, boxes, and labels of all concepts.

    Raises
    ------
    ConfigError
        For fewer than 10 images, a negative seed or an unknown split.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(10, seed=1, splits=["conflict"])
    >>> len(data), data[0].question, data[0].answer, data[0].prior_answer
    (6, 'Is the fish blue?', 'no', 'yes')
    """
    unknown = [s for s in splits if s not in SPLITS]
    if unknown:
        msg = f"unknown split '{unknown[0]}'; choose from {', '.join(SPLITS)}{nearest(unknown[0], SPLITS)}"
        raise ConfigError(msg)
    if n_images < 10 or seed < 0:
        msg = f"n_images={n_images}, seed={seed}; give at least 10 images and a seed of at least 0"
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
    """Return the number of images of each design; the sum is `n_images`.

    Each share is rounded; if the sum is wrong, the designs that rounding changed most are corrected.
    """
    exact = {design: n_images * share for design, share in SHARES.items()}
    counts = {design: round(value) for design, value in exact.items()}
    while (remainder := n_images - sum(counts.values())) != 0:
        step = 1 if remainder > 0 else -1
        design_to_correct = max(counts, key=lambda design: step * (exact[design] - counts[design]))
        counts[design_to_correct] += step
    return counts


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _absent(scene: Scene, nouns: Sequence[str] = NOUNS) -> list[str]:
    return [n for n in nouns if scene.get(n) is None]


def _neutral(rng: np.random.Generator, name: str) -> Iterator[Example]:
    """Yield existence, color, size and relation questions, for each one with the answer yes and one with the answer no."""
    scene = sample_scene(rng, name, UNIFORM)
    while all(o.noun in TYPICAL for o in scene.objects):
        scene = sample_scene(rng, name, UNIFORM)
    scene_questions: list[Question] = [
        questions.existence(scene, _pick(rng, scene.objects).noun),
        questions.existence(scene, _pick(rng, _absent(scene))),
    ]
    item = _pick(rng, [o for o in scene.objects if o.noun not in TYPICAL])
    true_color = item.attributes["color"]
    other_color = _pick(rng, [c for c in COLOR_NAMES if c != true_color])
    scene_questions += [
        questions.color(scene, item, true_color),
        questions.color(scene, item, other_color),
        questions.what_color(scene, item),
    ]
    item = _pick(rng, scene.objects)
    scene_questions += [questions.size(scene, item, "big"), questions.size(scene, item, "small")]
    relation_pairs = [
        (q_yes, q_no)
        for a in scene.objects
        for b in scene.objects
        if a is not b
        for yes, no in (("left of", "right of"), ("right of", "left of"), ("above", "below"), ("below", "above"))
        if (q_yes := questions.relation(scene, a, b, yes)) is not None
        and q_yes.answer == "yes"
        and (q_no := questions.relation(scene, a, b, no)) is not None
    ]
    for index in rng.permutation(len(relation_pairs))[:2]:
        scene_questions += relation_pairs[int(index)]
    unique = {q.text: q for q in scene_questions}
    yield from (as_example(scene, q, "neutral") for q in unique.values())


def _presence(rng: np.random.Generator, name: str) -> Iterator[Example]:
    """Yield existence questions about a present and an absent noun for the splits random, popular and adversarial."""
    while True:
        nouns = _sample_without_companions(rng, int(rng.integers(2, 6)))
        companions = [COMPANION[n] for n in nouns if COMPANION[n] not in POPULAR]
        popular = [n for n in POPULAR if n not in nouns and COMPANION[n] not in nouns]
        if companions and popular:
            break
    scene = sample_scene(rng, name, BIASED, nouns=nouns)
    neither = [n for n in _absent(scene) if n not in POPULAR and COMPANION[n] not in nouns]
    for split, absent in (("random", neither), ("popular", popular), ("adversarial", companions)):
        yield as_example(scene, questions.existence(scene, _pick(rng, scene.objects).noun), split)
        yield as_example(scene, questions.existence(scene, _pick(rng, absent)), split)


def _color(rng: np.random.Generator, name: str) -> Iterator[Example]:
    """Yield color questions about a noun in its typical color, and in another color in the same scene."""
    subject = _pick(rng, tuple(TYPICAL))
    others = [n for n in NOUNS if n not in {subject, COMPANION[subject]}]
    count = int(rng.integers(1, 4))
    nouns = [subject, *(others[int(i)] for i in rng.permutation(len(others))[:count])]
    color, _ = TYPICAL[subject]
    other = _pick(rng, [c for c in COLOR_NAMES if c != color])
    scene = sample_scene(rng, name, UNIFORM, nouns=nouns)
    for split, true_color in (("typical", color), ("conflict", other)):
        recolored = scene.recolored(subject, true_color)
        item = recolored.get(subject)
        if item is not None:
            for question in (
                questions.color(recolored, item, color),
                questions.color(recolored, item, other),
                questions.what_color(recolored, item),
            ):
                yield as_example(recolored, question, split, group=name)


def _caption(rng: np.random.Generator, name: str) -> Iterator[Example]:
    """Yield the request for a description of a scene without companions: objects that a model adds come from its prior."""
    scene = sample_scene(rng, name, BIASED, nouns=_sample_without_companions(rng, int(rng.integers(2, 5))))
    yield as_example(scene, questions.caption(scene), "caption")


def _sample_without_companions(rng: np.random.Generator, count: int) -> list[str]:
    """Draw `count` different nouns, none of which is the companion of another."""
    nouns: list[str] = []
    while len(nouns) < count:
        noun = _pick(rng, NOUNS)
        if noun not in nouns and COMPANION[noun] not in nouns:
            nouns.append(noun)
    return nouns
