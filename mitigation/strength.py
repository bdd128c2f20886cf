"""Choose the strength of a steering vector: answers under many vectors, their errors and losses, and the rule of choice."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

from behavior import BehaviorResult, answer_each
from behavior.matching import DEFAULT_MATCH
from behavior.metrics import METRICS, compute_metrics
from behavior.score_names import FIRST_TOKEN
from circuits import intervened, logits_under
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError
from groundscope.core.statistics import Estimate
from lvlm import Lvlm, Sampling
from mitigation.free_text_prompts import FreeTextPrompts
from mitigation.guard import ON_QUESTIONS, guard_limits
from mitigation.guard_loss import excess, loss_errors, losses
from mitigation.model_outputs import ModelOutputs
from mitigation.steering.vector import SteeringVector

RULE = "the fewest errors by prior among the strengths at which no guard loses more than its limit"
PRIOR_ERRORS = ("conflict: wrong by prior", "adversarial absent: says yes")
"""Measures that a mitigation should reduce; for data with neither, the share of wrong answers."""
COSTS = ("neutral: right", "typical color: right")
"""Measures whose loss is the cost of a row."""
RECALL_COST = "present: says no"
"""The cost of data without any of `COSTS`: present objects that are denied."""
LOSS = "loss: "
"""Prefix of a guard's loss in a row."""
TRIES = 8
"""Largest number of rows whose captions and plain texts are measured."""
Row = dict[str, float]
"""``strength``, ``harm``, ``cost``, ``excess`` (the largest loss of a guard in units of its limit), ``loss: NAME`` for each
guard, and every measure of one condition."""


def harm(rates: Mapping[str, Estimate]) -> float:
    """Return the mean of the error rates in `PRIOR_ERRORS`.

    Examples
    --------
    >>> from mitigation.strength import harm
    >>> from groundscope.core.statistics import Estimate
    >>> harm({"conflict: wrong by prior": Estimate(0.25, 0.1, 0.4, 40), "all: right": Estimate(0.9, 0.8, 1.0, 40)})
    0.25
    """
    errors = [rates[name].value for name in PRIOR_ERRORS if name in rates]
    return sum(errors) / len(errors) if errors else 1 - rates["all: right"].value


def cost_measures(rates: Collection[str]) -> tuple[str, ...]:
    """Return the names of the measures whose loss is the cost of a row; empty for data without such questions."""
    names = tuple(name for name in COSTS if name in rates)
    return names or ((RECALL_COST,) if RECALL_COST in rates else ())


def cost(rates: Mapping[str, Estimate], before: Mapping[str, Estimate]) -> float:
    """Return the largest loss among `cost_measures` relative to the model without mitigation; 0 without such measures.

    Examples
    --------
    >>> from mitigation.strength import cost
    >>> from groundscope.core.statistics import Estimate
    >>> before, after = ({"neutral: right": Estimate(value, 0.0, 1.0, 40)} for value in (0.75, 0.5))
    >>> cost(after, before)
    0.25
    """
    losses = [
        (rates[name].value - before[name].value) * (1 if METRICS[name].lower_is_better else -1)
        for name in cost_measures(rates)
    ]
    return max(losses, default=0.0)


def answer_under(
    model: Lvlm,
    data: ConceptDataset,
    vectors: Mapping[str, SteeringVector | None],
    *,
    batch_size: int = 64,
    generate: bool = False,
    score: str = FIRST_TOKEN,
    parser: str | None = None,
    match: str = DEFAULT_MATCH,
    max_new_tokens: int = 40,
    sampling: Sampling | None = None,
    seeds: int = 1,
    progress: bool = True,
) -> dict[str, BehaviorResult]:
    """Ask every question of a dataset under each vector; all vectors share the forward pass up to the first change.

    Parameters
    ----------
    model
        The model.
    data
        The questions.
    vectors
        Vectors by name; None is the model without a vector.
    batch_size
        Questions in a batch.
    generate, score, parser, match, max_new_tokens, sampling, seeds
        As for `behavior.answer`.
    progress
        Whether to show progress.

    Raises
    ------
    ModelError
        For a vector that was derived for another model.

    Examples
    --------
    >>> import numpy as np
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> data = gs.ConceptDataset("four questions", gs.scenes.dataset(10)[:4])
    >>> changes = {2: gs.AddChange(np.eye(model.width)[0], sigma=3.0)}
    >>> vector = gs.SteeringVector(changes, "last+generated", 1.0, model.name, model.config_hash)
    >>> results = gs.answer_under(model, data, {"alone": None, "steered": vector}, progress=False)
    >>> {name: len(answers) for name, answers in results.items()}
    {'alone': 4, 'steered': 4}
    """
    for vector in vectors.values():
        if vector is not None:
            vector.check(model)
    changes = {name: [] if vector is None else vector.interventions() for name, vector in vectors.items()}
    contexts = {name: partial(intervened, model, items) for name, items in changes.items()}
    return answer_each(
        model,
        data,
        contexts,
        logits=logits_under(model, list(changes.values())),
        generate=generate,
        score=score,
        parser=parser,
        match=match,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=seeds,
        batch_size=batch_size,
        progress=progress,
    )


def sweep_strengths(
    model: Lvlm,
    data: ConceptDataset,
    vectors: Mapping[str, tuple[SteeringVector, Sequence[float]]],
    *,
    limits: Mapping[str, float | None] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, list[Row]]:
    """Return harm, cost, losses and every measure of each vector at strength 0 and at its strengths, in order of their size.

    Parameters
    ----------
    model, data, batch_size, progress
        As for `answer_under`; use questions that neither derived the vectors nor will test them.
    vectors
        Name to a vector and its strengths.
    limits
        Limit of each guard, as `mitigation.guard_limits` returns them; None for the defaults. Only guards on answers to
        questions are measured here.

    Examples
    --------
    >>> import numpy as np
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> data = gs.ConceptDataset("four questions", gs.scenes.dataset(10)[:4])
    >>> changes = {2: gs.AddChange(np.eye(model.width)[0])}
    >>> vector = gs.SteeringVector(changes, "last+generated", 1.0, model.name, model.config_hash)
    >>> sweep = gs.sweep_strengths(model, data, {"first axis": (vector, [2.0, -1.0])}, progress=False)
    >>> [row["strength"] for row in sweep["first axis"]]
    [0.0, -1.0, 2.0]
    """
    conditions: dict[str, SteeringVector | None] = {"": None}
    conditions |= {f"{name} {s:g}": v.scaled(s) for name, (v, strengths) in vectors.items() for s in strengths}
    results = answer_under(model, data, conditions, batch_size=batch_size, progress=progress)
    rates_of = {name: compute_metrics(result, data) for name, result in results.items()}
    outputs = {name: ModelOutputs(data, result) for name, result in results.items()}
    limits = guard_limits({}) if limits is None else limits

    def row(strength: float, name: str) -> Row:
        rates = {item: estimate.value for item, estimate in rates_of[name].items()}
        lost = losses(outputs[""], outputs[name], ON_QUESTIONS)
        return {
            "strength": float(strength),
            "harm": harm(rates_of[name]),
            "cost": cost(rates_of[name], rates_of[""]),
            "excess": excess(lost, limits),
            **{f"{LOSS}{item}": value for item, value in lost.items()},
            **rates,
        }

    return {
        name: [row(0, ""), *(row(s, f"{name} {s:g}") for s in sorted(strengths, key=abs))]
        for name, (_, strengths) in vectors.items()
    }


def choose_strength(sweep: Sequence[Row], *, max_drop: float) -> Row:
    """Return the row of a sweep with the least harm among those within all limits; ties go to the smaller strength.

    Parameters
    ----------
    sweep
        Rows of `sweep_strengths`; strength 0 costs nothing, so it is always allowed.
    max_drop
        Largest allowed cost, as a share of the answers. Rows with an ``excess`` above 1, where a guard loses more than its limit,
        are not allowed either.

    Raises
    ------
    ConfigError
        If no row is within the limits.

    Examples
    --------
    >>> from mitigation import choose_strength
    >>> sweep = [
    ...     {"strength": 0.0, "harm": 0.50, "cost": 0.0},
    ...     {"strength": 1.0, "harm": 0.25, "cost": 0.01},
    ...     {"strength": 2.0, "harm": 0.10, "cost": 0.20},
    ... ]
    >>> choose_strength(sweep, max_drop=0.02)["strength"]
    1.0
    """
    allowed = [row for row in sweep if row["cost"] <= max_drop and row.get("excess", 0.0) <= 1]
    if not allowed:
        msg = f"every strength of the sweep costs more than max_drop={max_drop:g}; add strength 0 to the sweep, or raise max_drop"
        raise ConfigError(msg)
    return min(allowed, key=_merit)


def choose_guarded(
    model: Lvlm,
    sweeps: Mapping[str, tuple[SteeringVector, Sequence[Row]]],
    prompts: FreeTextPrompts,
    *,
    limits: Mapping[str, float | None] | None = None,
    caution: float = 0.0,
    batch_size: int = 64,
    progress: bool | None = None,
) -> tuple[str, Row]:
    """Choose the vector and strength with the fewest errors whose losses are within all limits, on free text too.

    Captions and plain texts take longer than answers, so rows are measured on them one at a time, in increasing order of ``harm``
    (the error rate), until a row is within all limits (at most `TRIES` rows). Their losses are added to the rows.

    Parameters
    ----------
    model
        The model.
    sweeps
        Name to a vector and its rows (`sweep_strengths`).
    prompts
        Prompts for captions and plain texts, about images that will not test the vector.
    limits
        As for `sweep_strengths`.
    caution
        Number of standard errors (`mitigation.guard_loss.loss_errors`) that are added to losses on free text before they are
        compared with their limits. With 0, the strongest vector whose measured loss is within the limit is chosen, whose loss on
        other images is often larger. 1 suits a vector that acts on every token of a description.
    batch_size, progress
        As for `answer_under`.

    Examples
    --------
    >>> import numpy as np
    >>> import groundscope as gs
    >>> from mitigation.free_text_prompts import FreeTextPrompts
    >>> from mitigation.strength import choose_guarded
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    >>> changes = {2: gs.AddChange(np.eye(model.width)[0])}
    >>> vector = gs.SteeringVector(changes, "all", 1.0, model.name, model.config_hash)
    >>> rows = [{"strength": 0.0, "harm": 0.5, "cost": 0.0}, {"strength": 90.0, "harm": 0.1, "cost": 0.0}]
    >>> prompts = FreeTextPrompts.of(model, data, captions=2, texts=2)
    >>> choose_guarded(model, {"first axis": (vector, rows)}, prompts)[1]["strength"]  # 90 destroys captions
    0.0
    """
    limits = guard_limits({}) if limits is None else limits
    ranked = [(name, row) for name, (_, rows) in sweeps.items() for row in rows if row.get("excess", 0.0) <= 1]
    ranked.sort(key=lambda item: _merit(item[1]))
    unchanged = next(((name, row) for name, row in ranked if not row["strength"]), None)
    if unchanged is None:
        msg = "no sweep has a row without steering; add strength 0"
        raise ConfigError(msg)
    before = None
    for name, row in ranked[:TRIES]:
        if not row["strength"]:
            return name, row
        before = before or prompts.outputs(model, None, batch_size=batch_size, progress=progress)
        after = prompts.outputs(
            model, sweeps[name][0].scaled(row["strength"]), batch_size=batch_size, progress=progress
        )
        lost = {item: loss for item, loss in losses(before, after).items() if item not in ON_QUESTIONS}
        row.update({f"{LOSS}{item}": value for item, value in lost.items()})
        errors = loss_errors(before, after, list(lost)) if caution else dict.fromkeys(lost, 0.0)
        bounds = {item: loss + caution * errors[item] for item, loss in lost.items()}
        row["excess"] = max(row.get("excess", 0.0), excess(bounds, limits))
        if row["excess"] <= 1:
            return name, row
    return unchanged


def _merit(row: Row) -> tuple[float, float]:
    return row["harm"], abs(row["strength"])
