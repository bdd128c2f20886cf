"""Derive a steering vector, choose its strength on images that do not test it, and write it with its controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from experiments.records import TOP_HEADS, read_record
from experiments.run.context import Context
from experiments.run.folder import write_json
from groundscope.core.errors import ConfigError, DataError, PatchError, ProbeError, SiteError
from groundscope.core.text import nearest
from mitigation import CONTROLS, DerivationData, SteeringVector, choose_strength, mitigations, sweep_strengths
from mitigation.methods import make_vector
from mitigation.strength import RULE, guards


def check(context: Context) -> None:
    """Raise `ConfigError` for an unknown method, no strengths, or data that the method cannot be derived from."""
    options = context.config.steer
    if options.method not in mitigations:
        near = nearest(options.method, mitigations)
        msg = f"steer.method={options.method}: unknown method; choose from {', '.join(mitigations)}{near}"
        raise ConfigError(msg)
    method = mitigations[options.method]
    if not 0 < options.decay <= 1:
        msg = f"steer.decay={options.decay:g}: give a factor in (0, 1]; 1 is as strong at every token"
        raise ConfigError(msg)
    if not options.strengths:
        msg = "steer.strengths is empty: give at least one strength to choose from"
        raise ConfigError(msg)
    problem = method.problem(context.discovery)
    if problem is not None:
        msg = f"steer.method={options.method}: {problem}"
        raise ConfigError(msg)


def make_steering(context: Context, root: Path) -> str:
    """Derive the vector, choose its strength, and write it with its controls and the sweep of strengths."""
    options = context.config.steer
    heads = read_record(context.folder.path / "circuits" / "top.json", TOP_HEADS)["heads"]
    record: dict[str, Any] = {"method": options.method, "rule": RULE}
    if options.method in mitigations.origins:
        record["origin"] = mitigations.origins[options.method]
    left_out: dict[str, str] = {}
    method = mitigations[options.method]
    if not heads:
        return _no_vector(root, record, {options.method: "no head to act on, since patching could score none"})
    data = DerivationData(context.model, context.store, context.discovery, heads, options={"doubt": options.doubt})
    derived = _derive_possible({options.method: partial(make_vector, method, data)}, left_out)
    if not derived:
        return _no_vector(root, record, left_out)
    vector = derived[options.method].decaying(options.decay)
    names = [name for name in mitigations.usable() if name != options.method] if options.compare else []
    others = _derive_possible({name: partial(make_vector, mitigations[name], data) for name in names}, left_out)
    controls = _derive_possible(
        {name: partial(control, vector, method, data) for name, control in CONTROLS.items()}, left_out
    )
    candidates = {options.method: (vector, method.unit)}
    candidates |= {name: (other, mitigations[name].unit) for name, other in others.items()}
    candidates |= {f"control: {name}": (control, method.unit) for name, control in controls.items()}
    curves = sweep_strengths(
        context.model,
        context.discovery.filter(lambda e: bool(e.candidates)),
        {name: (item, [unit * s for s in options.strengths]) for name, (item, unit) in candidates.items()},
    )
    sweep = curves[options.method]
    chosen = choose_strength(sweep, max_drop=options.max_drop)
    vector.scaled(chosen["strength"]).save(root / "vector.safetensors")
    for name, control in controls.items():
        control.scaled(chosen["strength"]).save(root / control_file(name))
    guarded = guards(sweep[0])
    record |= {"guards": guarded, "chosen": chosen, "sweep": sweep, "curves": curves, "left_out": left_out}
    write_json(root / "sweep.json", record)
    loss = f"largest loss in {' and '.join(guarded)}: {max(0.0, chosen['cost']):.3f}"
    if not guarded:
        loss = "no loss could be measured: these data have no questions that a correction must not cost"
    return (
        f"{options.method} at {', '.join(map(str, heads))}, strength {chosen['strength']:g}: "
        f"on images not tested on, errors {sweep[0]['harm']:.3f} -> {chosen['harm']:.3f}, "
        f"{loss}"
    )


def _no_vector(root: Path, record: Mapping[str, Any], left_out: Mapping[str, str]) -> str:
    """Write the record of a stage that derived no vector; return its summary."""
    chosen = {"strength": 0.0}
    write_json(root / "sweep.json", {**record, "chosen": chosen, "sweep": [chosen], "curves": {}, "left_out": left_out})
    return f"no vector: {left_out[record['method']]}"


def control_file(name: str) -> str:
    """Return the file name of a control, one of `mitigation.CONTROLS`."""
    return f"control-{name.replace(' ', '-')}.safetensors"


def _derive_possible(
    makers: Mapping[str, Callable[[], SteeringVector]], left_out: dict[str, str]
) -> dict[str, SteeringVector]:
    """Make the vectors that these data allow, and note why the others cannot be made."""
    vectors: dict[str, SteeringVector] = {}
    for name, make in makers.items():
        try:
            vectors[name] = make()
        except (DataError, PatchError, ProbeError, SiteError) as error:
            left_out[name] = str(error)
    return vectors
