"""The correction: derive a vector, choose its strength on images it will not be tested on, keep controls beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from circuits import HeadScores, random_heads
from concepts import counterfactuals
from concepts.schema import CounterfactualPair
from experiments.records import TOP_HEADS, read_record
from experiments.run.context import Context
from experiments.run.folder import write_json
from groundscope.core.errors import ConfigError, DataError, PatchError, ProbeError, SiteError
from groundscope.core.paths import below
from lvlm import Head
from mitigation import SteeringVector, derive
from mitigation.steering.controls import match_displacement, move_to_heads, shuffle_mask, swap_sides
from mitigation.strength import RULE, choose_strength, guards, sweep_strengths

CONTROLS = ("random direction", "shuffled labels", "moved to other heads", "derived at other heads")
"""What the vector is judged beside, all pushing as far: random directions, the same rule from labels that mean nothing, the
same directions at heads not selected, and the same rule at those, which says how much rests on which heads."""
CHANGED = ("object", "color", "relation")
"""Kinds of pairs whose images differ in one thing; icon scenes alone can be drawn again."""
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
    for kind in CHANGED:
        with suppress(DataError):  # a kind that these data cannot make
            found = counterfactuals.pairs(neutral, kind)
            pairs += found[:: max(1, 3 * len(found) // PAIRS)][: PAIRS // 3]
    if not pairs:
        msg = f"no question allows a pair of kind {', '.join(CHANGED)}: they need icon scenes"
        raise DataError(msg)
    return pairs


def _told(context: Context, heads: Sequence[Head], shuffle: int | None) -> SteeringVector:
    """Tell yes from no on every question of the discovery images, those that the model gets wrong among them."""
    frame = context.store.frame()
    answers, groups = frame["answer"].to_numpy(), frame["group"].tolist()
    positive, asked = answers == "yes", (answers == "yes") | (answers == "no")
    positive = positive if shuffle is None else shuffle_mask(positive, shuffle, asked, groups=groups)
    return derive.discriminant(
        context.store, positive=positive, negative=asked & ~positive, heads=heads, doubt=context.config.steer.doubt
    )


def _from_pairs(
    derivation: Callable[..., SteeringVector], pairs: Callable[[Context], list[CounterfactualPair]]
) -> Callable[[Context, Sequence[Head], int | None], SteeringVector]:
    def make(context: Context, heads: Sequence[Head], shuffle: int | None) -> SteeringVector:
        made = pairs(context)
        return derivation(context.model, made if shuffle is None else swap_sides(made, shuffle), heads=heads)

    return make


@dataclass(frozen=True)
class Method:
    """One way to make a vector from the heads that patching found."""

    make: Callable[[Context, Sequence[Head], int | None], SteeringVector]
    """From heads and, for a control, the seed by which labels are shuffled; None leaves them as they are."""
    unit: float = 1.0
    """What 1 in `steer.strengths` is to its vector."""


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "discriminant": Method(_told),
        "amplify": Method(_from_pairs(derive.amplification, _blank)),
        # It removes: all of it at -1.
        "prior_removal": Method(_from_pairs(derive.prior_removal, _blank), unit=-0.5),
        "pair_difference": Method(_from_pairs(derive.from_pairs, _changed)),
    }
)
"""How a vector is made: one entry a method."""


def check(context: Context) -> None:
    """Raise `ConfigError` for an unknown method, no strengths, or data that the method has nothing to learn from."""
    options = context.config.steer
    if options.method not in METHODS:
        msg = f"steer.method={options.method}: there are {', '.join(METHODS)}"
        raise ConfigError(msg)
    if not 0 < options.decay <= 1:
        msg = f"steer.decay={options.decay:g}: give a factor in (0, 1]; 1 is as strong at every token"
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

    if options.method == "pair_difference" and not any(map(partial(_possible_kind, context), CHANGED)):
        msg = (
            f"steer.method=pair_difference needs pairs of kind {', '.join(CHANGED)}, which only icon scenes allow: "
            "choose another, steer.method=discriminant or steer.method=amplify"
        )
        raise ConfigError(msg)


def _possible_kind(context: Context, kind: str) -> bool:
    neutral = context.discovery.where(split="neutral")
    try:
        return bool(counterfactuals.pairs(neutral, kind, limit=1))
    except DataError:
        return False


def make_vector(context: Context, root: Path) -> str:
    """Derive the vector, choose its strength, write it with its controls and the sweep that chose."""
    options = context.config.steer
    circuit = context.folder.path / "circuits"
    heads = [Head.parse(h) for h in read_record(circuit / "top.json", TOP_HEADS)["heads"]]
    about: dict[str, Any] = {"method": options.method, "rule": RULE}
    left_out: dict[str, str] = {}
    method = METHODS[options.method]
    made = _possible({options.method: lambda: method.make(context, heads, None)}, left_out) if heads else {}
    if not made:
        reason = left_out.setdefault(options.method, "no head to act on, since patching could score none")
        chosen = {"strength": 0.0}
        write_json(
            root / "sweep.json", {**about, "chosen": chosen, "sweep": [chosen], "curves": {}, "left_out": left_out}
        )
        return f"no vector: {reason}"
    vector = made[options.method].decaying(options.decay)
    beside = {name: METHODS[name] for name in METHODS if name != options.method} if options.compare else {}
    others = _possible({n: lambda m=m: m.make(context, heads, None) for n, m in beside.items()}, left_out)
    controls = _possible(_controls(context, vector, heads), left_out)
    unit = METHODS[options.method].unit
    tried = {options.method: (vector, [unit * s for s in options.strengths])}
    tried |= {name: (made, [METHODS[name].unit * s for s in options.strengths]) for name, made in others.items()}
    tried |= {f"control: {name}": (made, [unit * s for s in options.strengths]) for name, made in controls.items()}
    validation = context.discovery.filter(lambda e: bool(e.candidates))
    curves = sweep_strengths(context.model, validation, tried)
    sweep = curves[options.method]
    chosen = choose_strength(sweep, max_drop=options.max_drop)
    guarded = guards(sweep[0])
    vector = vector.scaled(chosen["strength"])
    vector.save(root / "vector.safetensors")
    for name, control in controls.items():
        control.scaled(chosen["strength"]).save(root / control_file(name))
    about["guards"] = guarded
    write_json(root / "sweep.json", {**about, "chosen": chosen, "sweep": sweep, "curves": curves, "left_out": left_out})
    loss = f"largest loss in {' and '.join(guarded)}: {max(0.0, chosen['cost']):.3f}"
    if not guarded:
        loss = "nothing could be guarded: these data have no questions that a correction must not cost"
    return (
        f"{options.method} at {', '.join(map(str, heads))}, strength {chosen['strength']:g}: "
        f"on images not tested on, errors {sweep[0]['harm']:.3f} -> {chosen['harm']:.3f}, "
        f"{loss}"
    )


def control_file(name: str) -> str:
    """Return the file of a control, one of `CONTROLS`."""
    return f"control-{name.replace(' ', '-')}.safetensors"


def _controls(
    context: Context, vector: SteeringVector, heads: Sequence[Head]
) -> Mapping[str, Callable[[], SteeringVector]]:
    """Return how each of `CONTROLS` is made: all push as far as the vector."""
    make, store, decay = METHODS[context.config.steer.method].make, context.store, vector.decay

    def elsewhere() -> tuple[Head, ...]:
        return random_heads((context.model.n_layers, context.model.n_heads), len(heads), exclude=heads, seed=0)

    made = (
        lambda: vector.randomised(0),
        lambda: match_displacement(make(context, heads, 0).decaying(decay), vector, store),
        lambda: move_to_heads(vector, elsewhere(), store),
        lambda: match_displacement(make(context, elsewhere(), None).decaying(decay), vector, store),
    )
    return dict(zip(CONTROLS, made, strict=True))


def _possible(
    makers: Mapping[str, Callable[[], SteeringVector]], left_out: dict[str, str]
) -> dict[str, SteeringVector]:
    """Make what can be made of these data, and note why the rest cannot."""
    made: dict[str, SteeringVector] = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except (DataError, PatchError, ProbeError, SiteError) as error:
            left_out[name] = str(error)
    return made


def head_scores(context: Context) -> dict[str, HeadScores]:
    """Return the saved scores by kind of pair."""
    circuit = context.folder.path / "circuits"
    kinds = read_record(circuit / "top.json", TOP_HEADS)["kinds"]
    return {
        kind: HeadScores.load(below(circuit, f"{kind}.safetensors", source=circuit / "top.json", error=ConfigError))
        for kind in kinds
    }
