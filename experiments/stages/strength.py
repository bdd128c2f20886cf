"""A model's answers under many vectors at once, and the rule by which a strength is chosen from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from behavior import BehaviorResult, answer_each
from circuits import intervened, logits_under
from concepts.schema import ConceptDataset
from experiments.stages.measures import cost, harm, measured
from lvlm import Lvlm
from mitigation import SteeringVector

RULE = (
    "the fewest errors by prior among the strengths that cost neutral and typical questions max_drop at most each; without "
    "such questions, recall on present objects"
)
Row = dict[str, float]
"""A strength with its harm, its cost, and every measure."""


def answers_under(
    model: Lvlm,
    data: ConceptDataset,
    vectors: Mapping[str, SteeringVector | None],
    batch_size: int = 64,
    *,
    progress: bool = True,
) -> dict[str, BehaviorResult]:
    """Ask every question of a dataset under each vector; None is the model as it is.

    Raises
    ------
    ModelError
        For a vector that was made for another model.
    """
    for vector in vectors.values():
        if vector is not None:
            vector.check(model)
    changes = {name: [] if vector is None else vector.interventions() for name, vector in vectors.items()}
    contexts = {name: partial(intervened, model, items) for name, items in changes.items()}
    return answer_each(
        model, data, contexts, batch_size, logits=logits_under(model, list(changes.values())), progress=progress
    )


def swept(
    model: Lvlm,
    data: ConceptDataset,
    vectors: Mapping[str, tuple[SteeringVector, Sequence[float]]],
    batch_size: int = 64,
    *,
    progress: bool = True,
) -> dict[str, list[Row]]:
    """Return for each vector harm and cost at strength 0 and at each strength it is to be tried at, all asked at once.

    Parameters
    ----------
    model, data, batch_size, progress
        As for `answers_under`.
    vectors
        Name to vector and strengths, in the vector's own unit.
    """
    tried: dict[str, SteeringVector | None] = {"": None}
    tried |= {f"{name} {s:g}": v.scaled(s) for name, (v, strengths) in vectors.items() for s in strengths}
    results = answers_under(model, data, tried, batch_size, progress=progress)
    found = {name: measured(result, data) for name, result in results.items()}

    def row(strength: float, name: str) -> Row:
        rates = {measure: estimate.value for measure, estimate in found[name].items()}
        return {"strength": float(strength), "harm": harm(found[name]), "cost": cost(found[name], found[""]), **rates}

    return {
        name: [row(0, ""), *(row(s, f"{name} {s:g}") for s in sorted(strengths, key=abs))]
        for name, (_, strengths) in vectors.items()
    }


def choose(sweep: Sequence[Row], max_drop: float) -> Row:
    """Choose by `RULE`; strength 0, the first row, is always allowed, and ties go to the smaller strength."""
    allowed = [row for row in sweep if row["cost"] <= max_drop]
    return min(allowed, key=lambda row: (row["harm"], abs(row["strength"])))
