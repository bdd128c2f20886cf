"""Causes of wrong answers that are planted in the embedded model, and the answers that each of them makes wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from behavior import answer
from concepts import scenes
from concepts.scenes.distributions import COLOR_NAMES
from concepts.scenes.icons import NOUNS
from concepts.schema import ConceptDataset, Example
from diagnosis.results import LOST, NOT_INTEGRATED, NOT_SEEN, OVERRIDDEN, OVERRIDDEN_LATE, VERDICTS
from groundscope.testing import planted_failures
from lvlm import Head, Lvlm

SPLITS = ("neutral", "random", "popular", "adversarial", "typical", "conflict")
COLOR = {"color", "what_color"}
"""Kinds of the questions about color."""
SITES = ["resid_post", "z", "mlp_out", "vision.resid_post", "projector.out"]
UNCHANGED = "unchanged model"
CAUSES = (*VERDICTS[:4], UNCHANGED)
CORRECT = {**{cause: (cause,) for cause in (NOT_SEEN, LOST, NOT_INTEGRATED)}, OVERRIDDEN: (OVERRIDDEN, OVERRIDDEN_LATE)}
"""Planted cause to the verdicts that are correct."""


def plant_cause(model: Lvlm, cause: str, strength: float = 0.5, seed: int = 98) -> Lvlm:
    """Return the model with a planted cause; `seed` is that of the scenes from which planted directions are computed."""
    other = scenes.dataset(120, seed)
    if cause == UNCHANGED:
        return model
    if cause == NOT_SEEN:
        return planted_failures.make_color_blind(model)
    if cause == LOST:
        return planted_failures.erase_color(model, other)
    if cause == NOT_INTEGRATED:
        return planted_failures.cut_image(model, 1)
    examples = [e for e in other if e.candidates][::6]
    signs = {noun: ("yes", "no")[i % 2] for i, noun in enumerate(NOUNS)}
    pushed = planted_failures.plant_prior_head(model, examples, Head(5, 1), signs, strength)
    colors = {noun: COLOR_NAMES[i % len(COLOR_NAMES)] for i, noun in enumerate(NOUNS)}
    return planted_failures.plant_prior_head(pushed, examples, Head(5, 4), colors, strength)


def correct_ids(model: Lvlm, data: ConceptDataset) -> set[str]:
    """Return the ids of the questions that a model answers correctly."""
    return {a.id for a in answer(model, data, batch_size=64, progress=False).answers if a.correct}


def shuffle_examples(examples: Sequence[Example]) -> list[Example]:
    """Return the examples in a random order, always the same one."""
    return [examples[int(i)] for i in np.random.default_rng(0).permutation(len(examples))]


def sample_by_kind(examples: Sequence[Example], count: int) -> list[Example]:
    """Return a random sample of at most `count` examples of each kind of question."""
    order = shuffle_examples(examples)
    kinds = dict.fromkeys((e.level, e.kind) for e in order)
    return [e for kind in kinds for e in [x for x in order if (x.level, x.kind) == kind][:count]]
