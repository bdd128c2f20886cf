"""Several sampled answers to each question."""

from __future__ import annotations

from dataclasses import replace

from behavior.result import BehaviorResult
from concepts.schema import ConceptDataset


def repeat_sampled(data: ConceptDataset, seeds: int, *, generate: bool) -> ConceptDataset:
    """Return a dataset with each question that is answered by generation several times.

    Copies have the ids ``<id>#2``, ``<id>#3``, …; these are the questions of the answers that `answer` returns for `seeds`.
    """
    if seeds == 1:
        return data
    sampled = [e for e in data if generate or not e.candidates]
    more = tuple(replace(e, id=f"{e.id}#{number}") for number in range(2, seeds + 1) for e in sampled)
    return ConceptDataset(data.name, (*data.examples, *more), data.provenance)


def divide_seeds(answers: BehaviorResult) -> list[BehaviorResult]:
    """Split answers by seed; an answer without sampling is in the result of every seed.

    Examples
    --------
    >>> import groundscope as gs
    >>> from behavior.repeated_sampling import divide_seeds
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])[:2]
    >>> answers = gs.answer(model, data, generate=True, sampling=gs.Sampling(), seeds=3, max_new_tokens=1)
    >>> [len(part) for part in divide_seeds(answers)]
    [2, 2, 2]
    """
    seeds = int(answers.provenance.get("seeds", 1))
    rows = answers.answers
    repeated = {a.id.rpartition("#")[0] for a in rows if seeds > 1 and a.id.endswith("#2")}
    first_answers = [a for a in rows if not any(a.id == f"{a.id.rpartition('#')[0]}#{n}" for n in range(2, seeds + 1))]
    results = [replace(answers, answers=tuple(first_answers))]
    fixed = [a for a in first_answers if a.id not in repeated]
    for number in range(2, seeds + 1):
        own = [a for a in rows if a.id.endswith(f"#{number}") and a.id.rpartition("#")[0] in repeated]
        results.append(replace(answers, answers=(*fixed, *own)))
    return results
