"""What a model says in one condition, with or without a correction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from behavior import BehaviorResult
from concepts.schema import ConceptDataset


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a model says in one condition: answers to questions, and its predictions on plain text.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.outcome import Outcome
    >>> data = gs.ConceptDataset("two questions", gs.scenes.dataset(10)[:2])
    >>> Outcome(data, gs.answer(gs.load_lvlm("tiny"), data, progress=False)).plain_text is None
    True
    """

    data: ConceptDataset
    """The questions and caption prompts that were asked."""
    answers: BehaviorResult
    plain_text: tuple[np.ndarray, ...] | None = None
    """For each text the token with the largest logit at each position of its continuation; None if not measured."""


def combine_outcomes(questions: Outcome, text: Outcome) -> Outcome:
    """Return one outcome from answers to questions and from free text.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.outcome import Outcome, combine_outcomes
    >>> from mitigation.text_probe import TextProbe
    >>> model, data = gs.load_lvlm("tiny"), gs.ConceptDataset("two", gs.scenes.dataset(10)[:2])
    >>> text = TextProbe.of(model, data, captions=1, texts=1).outcome(model, None, progress=False)
    >>> len(combine_outcomes(Outcome(data, gs.answer(model, data, progress=False)), text).answers)
    3
    """
    ids = {e.id for e in text.data}
    own_answers = [a for a in questions.answers.answers if a.id not in ids]
    answers = BehaviorResult((*own_answers, *text.answers.answers), questions.answers.cost)
    data = ConceptDataset(
        questions.data.name, (*(e for e in questions.data if e.id not in ids), *text.data), questions.data.provenance
    )
    return Outcome(data, answers, text.plain_text)
