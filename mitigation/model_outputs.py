"""What a model writes in one condition, with or without a correction: its answers, and its predictions on plain text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from behavior import BehaviorResult
from concepts.schema import ConceptDataset


@dataclass(frozen=True, eq=False)
class ModelOutputs:
    """What a model writes in one condition: answers to questions and captions, and predictions on plain text.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.model_outputs import ModelOutputs
    >>> data = gs.ConceptDataset("two questions", gs.scenes.dataset(10)[:2])
    >>> ModelOutputs(data, gs.answer(gs.load_lvlm("tiny"), data, progress=False)).plain_text is None
    True
    """

    data: ConceptDataset
    """The questions and caption prompts that were asked."""
    answers: BehaviorResult
    plain_text: tuple[np.ndarray, ...] | None = None
    """For each text the token with the largest logit at each position of its continuation; None if not measured."""


def combine_outputs(questions: ModelOutputs, text: ModelOutputs) -> ModelOutputs:
    """Return the outputs on questions and those on free text as one.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.model_outputs import ModelOutputs, combine_outputs
    >>> from mitigation.free_text_prompts import FreeTextPrompts
    >>> model, data = gs.load_lvlm("tiny"), gs.ConceptDataset("two", gs.scenes.dataset(10)[:2])
    >>> text = FreeTextPrompts.of(model, data, captions=1, texts=1).outputs(model, None, progress=False)
    >>> len(combine_outputs(ModelOutputs(data, gs.answer(model, data, progress=False)), text).answers)
    3
    """
    ids = {e.id for e in text.data}
    own_answers = [a for a in questions.answers.answers if a.id not in ids]
    answers = BehaviorResult((*own_answers, *text.answers.answers), questions.answers.cost)
    data = ConceptDataset(
        questions.data.name, (*(e for e in questions.data if e.id not in ids), *text.data), questions.data.provenance
    )
    return ModelOutputs(data, answers, text.plain_text)
