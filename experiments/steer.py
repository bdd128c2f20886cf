"""The correction: derive a vector, choose its strength on images it will not be tested on, keep controls beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from behavior import answer
from circuits import HeadScores, SteeringVector, derive, export, random_heads
from concepts import counterfactuals
from concepts.errors import ConfigError
from concepts.progress import display
from concepts.schema import ConceptDataset, CounterfactualPair
from concepts.statistics import Estimate
from experiments.context import Context
from experiments.measures import cost, harm, measured
from experiments.run import write_json
from lvlm import Head

CONTROLS = ("random direction", "other heads")
"""What the vector is judged beside: the same norm in random directions, the same rule at heads not selected."""
PAIRS = 200
"""Pairs a vector is derived from at most."""


def _blank(context: Context) -> list[CounterfactualPair]:
    """Pair questions with blanked images, one an image, from the split that nothing misleads in."""
    neutral = context.discovery.where(split="neutral")
    pairs = counterfactuals.pairs(neutral if len(neutral) else context.discovery, "blank")
    # Spread over the images: a pair a question would take them all from the first few.
    step = max(1, len(pairs) // PAIRS)
    return pairs[::step][:PAIRS]


def _changed(context: Context) -> list[CounterfactualPair]:
    """Pair questions with images in which the answer is another."""
    neutral = context.discovery.where(split="neutral")
    pairs: list[CounterfactualPair] = []
    for kind in ("object", "color", "relation"):
        found = counterfactuals.pairs(neutral, kind)
        pairs += found[:: max(1, 3 * len(found) // PAIRS)][: PAIRS // 3]
    return pairs


def _told(context: Context, heads: Sequence[Head]) -> SteeringVector:
    """Tell yes from no on every question of the discovery images, those that the model gets wrong among them."""
    answers = context.store.frame()["answer"].to_numpy()
    return derive.discriminant(
        context.store,
        positive=answers == "yes",
        negative=answers == "no",
        heads=heads,
        doubt=context.config.steer.doubt,
    )


METHODS: Mapping[str, Callable[[Context, Sequence[Head]], SteeringVector]] = MappingProxyType(
    {
        "discriminant": _told,
        "amplify": lambda c, heads: derive.amplification(c.model, _blank(c), heads=heads),
        "prior_removal": lambda c, heads: derive.prior_removal(c.model, _blank(c), heads=heads),
        "pair_difference": lambda c, heads: derive.from_pairs(c.model, _changed(c), heads=heads),
    }
)
"""How a vector is made from the heads that patching found: one entry a method."""


def check(context: Context) -> None:
    """Raise `ConfigError` for an unknown method, no strengths, or data that the method has nothing to learn from."""
    options = context.config.steer
    if options.method not in METHODS:
        msg = f"steer.method={options.method}: there are {', '.join(METHODS)}"
        raise ConfigError(msg)
    if not options.strengths:
        msg = "steer.strengths is empty: give at least one strength to choose from"
        raise ConfigError(msg)
    missing = {"yes", "no"} - {e.answer for e in context.discovery}
    if options.method == "discriminant" and missing:
        msg = (
            f"steer.method=discriminant tells yes from no, and no question is answered {' or '.join(sorted(missing))}: "
            f"choose another, steer.method=amplify"
        )
        raise ConfigError(msg)


def make_vector(context: Context, root: Path) -> str:
    """Derive the vector, choose its strength, write it with its controls and the sweep that chose."""
    options = context.config.steer
    circuit = context.folder.path / "circuits"
    heads = [Head.parse(h) for h in json.loads((circuit / "top.json").read_text())["heads"]]
    if not heads:
        chosen = {"strength": 0.0}
        write_json(root / "sweep.json", {"method": options.method, "rule": RULE, "chosen": chosen, "sweep": [chosen]})
        return "no heads to act on: patching could score none"
    vector = METHODS[options.method](context, heads)
    validation = context.discovery.filter(lambda e: bool(e.candidates))
    sweep = strengths(context, vector, validation, options.strengths)
    chosen = choose(sweep, options.max_drop)
    vector = vector.scaled(chosen["strength"])
    others = random_heads(len(heads), 0, heads, shape=(context.model.n_layers, context.model.n_heads))
    vector.save(root / "vector.safetensors")
    vector.randomised(0).save(root / "control-random-direction.safetensors")
    control = METHODS[options.method](context, others).scaled(chosen["strength"])
    control.save(root / "control-other-heads.safetensors")
    export.safetensors(vector, root / "export.safetensors")
    write_json(root / "sweep.json", {"method": options.method, "rule": RULE, "chosen": chosen, "sweep": sweep})
    return (
        f"{options.method} at {', '.join(map(str, heads))}, strength {chosen['strength']:g}: "
        f"on images not tested on, errors {sweep[0]['harm']:.3f} -> {chosen['harm']:.3f}, "
        f"neutral and typical questions lose at most {max(0.0, chosen['cost']):.3f}"
    )


RULE = "the fewest errors by prior among the strengths that cost neutral and typical questions max_drop at most each"


def strengths(
    context: Context, vector: SteeringVector, data: ConceptDataset, wanted: Sequence[float]
) -> list[dict[str, float]]:
    """Return harm and cost at strength 0 and at each wanted one."""
    rows: list[dict[str, float]] = []
    before: dict[str, Estimate] | None = None
    with display() as bar:
        for strength in bar.track([0.0, *sorted(wanted)], description="strengths"):
            with vector.applied(context.model, strength):
                found = measured(answer(context.model, data, 64, progress=False), data)
            before = before or found
            rows.append({"strength": float(strength), "harm": harm(found), "cost": cost(found, before)})
            rows[-1] |= {name: e.value for name, e in found.items()}
    return rows


def choose(sweep: Sequence[dict[str, float]], max_drop: float) -> dict[str, float]:
    """Choose by `RULE`; strength 0, the first row, is always allowed, and ties go to the smaller strength."""
    allowed = [row for row in sweep if row["cost"] <= max_drop]
    return min(allowed, key=lambda row: (row["harm"], row["strength"]))


def head_scores(context: Context) -> dict[str, HeadScores]:
    """Return the saved scores by kind of pair."""
    circuit = context.folder.path / "circuits"
    kinds = json.loads((circuit / "top.json").read_text())["kinds"]
    return {kind: HeadScores.load(circuit / f"{kind}.safetensors") for kind in kinds}
