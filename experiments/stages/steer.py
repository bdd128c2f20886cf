"""Derive steering vectors, choose strengths within guards on images that do not test them, and write them with controls.

Two vectors are written: that of ``steer.method``, and the best one that other software can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from concepts.schema import ConceptDataset
from experiments.records import TOP_HEADS, read_record
from experiments.run.context import Context
from experiments.run.folder import write_json
from groundscope.core.errors import ConfigError, DataError, PatchError, ProbeError, SiteError
from groundscope.core.text import nearest
from lvlm.model import Lvlm
from lvlm.token_selection import STEERABLE, TokenSelection
from mitigation import CONTROLS, DerivationData, MitigationMethod, SteeringVector, export, mitigations, sweep_strengths
from mitigation.free_text_prompts import FreeTextPrompts
from mitigation.guard import guard_limits
from mitigation.methods import make_vector
from mitigation.strength import RULE, Row, choose_guarded, cost_measures

EXPORTABLE = "exportable.safetensors"
"""File of the exportable vector."""
CAPTIONS, CAUTION = 150, 1.0
"""Largest number of captions on which the strength of the exportable vector is chosen, and standard errors that are added to its
losses there: it acts on every token of a caption."""
_NO_HEAD = "no head to act on, since patching could score none"


def check(context: Context) -> None:
    """Raise `ConfigError` for options that do not exist or do not fit each other, or data that a method cannot use."""
    options = context.config.steer
    method = _method("steer.method", options.method)
    if not 0 < options.decay <= 1:
        msg = f"steer.decay={options.decay:g}: give a factor in (0, 1]; 1 is as strong at every token"
        raise ConfigError(msg)
    for name in ("strengths", "exportable_strengths"):
        if not getattr(options, name):
            msg = f"steer.{name} is empty: give at least one strength to choose from"
            raise ConfigError(msg)
    problem = method.problem(context.discovery)
    if problem is not None:
        msg = f"steer.method={options.method}: {problem}"
        raise ConfigError(msg)
    missing = [name for name in method.required if name not in options.options]
    if missing:
        msg = f"steer.method={options.method} needs an option: add +steer.options.{missing[0]}=…"
        raise ConfigError(msg)
    for name, fixed in (("site", method.own_places), ("positions", method.own_positions)):
        if fixed and getattr(options, name) is not None:
            msg = f"steer.{name} has no effect with steer.method={options.method}, which selects its own; remove the option"
            raise ConfigError(msg)
    for name in ("positions", "exportable_positions"):
        if getattr(options, name) is not None:
            try:
                TokenSelection.parse(getattr(options, name), allowed=STEERABLE)
            except SiteError as error:
                msg = f"steer.{name}: {error}"
                raise ConfigError(msg) from error
    for site in filter(None, (options.site, *options.exportable_sites)):
        _check_site(context, site)
    for name in options.exportable:
        _method("steer.exportable", name)
    try:
        guard_limits(options.guards, options.max_drop)
    except ConfigError as error:
        msg = f"steer.guards: {error}"
        raise ConfigError(msg) from error
    _check_traced(context, method)


def _method(option: str, name: str) -> MitigationMethod:
    if name not in mitigations:
        near = nearest(name, mitigations)
        msg = f"{option}={name}: unknown method; choose from {', '.join(mitigations)}{near}"
        raise ConfigError(msg)
    return mitigations[name]


def _check_site(context: Context, site: str) -> None:
    """Raise `ConfigError` for a place that the model lacks; needs no weights."""
    try:
        _ = DerivationData(context.outline, None, context.discovery, site=site).places
    except SiteError as error:
        msg = f"steer.site={site}: {error}"
        raise ConfigError(msg) from error


def _check_traced(context: Context, method: MitigationMethod) -> None:
    """Raise `ConfigError` if the trace of the same call does not store what a method is derived from."""
    config = context.config
    if not method.reads or "trace" not in config.stages:
        return
    component = method.reads if config.steer.site is None else config.steer.site.rpartition(".")[2]
    component = "z" if component.startswith("H") else component
    stored = any(site == component or site.endswith(f".{component}") for site in config.trace.sites)
    if not stored or "last" not in config.trace.tokens:
        msg = (
            f"steer.method={config.steer.method} is derived from {component} at the last token, which would not be traced: "
            f"add {component} to trace.sites and last to trace.tokens, or choose another method (steer.method=amplify)"
        )
        raise ConfigError(msg)


def make_steering(context: Context, root: Path) -> str:
    """Derive the vectors, choose their strengths, and write them with the controls and the sweep of strengths."""
    options = context.config.steer
    heads = read_record(context.folder.path / "circuits" / "top.json", TOP_HEADS)["heads"]
    limits = guard_limits(options.guards, options.max_drop)
    record: dict[str, Any] = {"method": options.method, "rule": RULE, "limits": limits}
    if options.method in mitigations.origins:
        record["origin"] = mitigations.origins[options.method]
    left_out: dict[str, str] = {}
    derived: dict[str, SteeringVector] = {}
    method = mitigations[options.method]
    acts = bool(heads or options.site or not _acts_on_heads(options.method, method))
    data = DerivationData(
        context.model,
        context.store if acts or options.exportable else None,
        context.discovery,
        heads,
        options={**options.options, "doubt": options.doubt},
        site=options.site,
        positions=options.positions,
    )
    if not acts:
        left_out[options.method] = _NO_HEAD
    else:
        derived = _derive_possible({options.method: partial(make_vector, method, data)}, left_out)
    summary = f"no vector: {left_out.get(options.method, '')}"
    chosen: Row = {"strength": 0.0}
    record |= {"chosen": chosen, "sweep": [chosen], "curves": {}}
    vector: SteeringVector | None = None
    if derived:
        vector = _decaying(derived[options.method], options.decay)
        names = _compared(options.method, heads) if options.compare else []
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
            limits=limits,
        )
        prompts = FreeTextPrompts.of(context.model, _halves(context.discovery)[1])
        _, chosen = choose_guarded(
            context.model, {options.method: (vector, curves[options.method])}, prompts, limits=limits
        )
        vector = vector.scaled(chosen["strength"])
        vector.save(root / "vector.safetensors")
        for name, control in controls.items():
            control.scaled(chosen["strength"]).save(root / control_file(name))
        sweep = curves[options.method]
        guarded = cost_measures(sweep[0])
        record |= {"guards": guarded, "chosen": chosen, "sweep": sweep, "curves": curves}
        loss = f"largest loss in {' and '.join(guarded)}: {max(0.0, chosen['cost']):.3f}"
        if not guarded:
            loss = "no loss could be measured: these data have no questions that a correction must not cost"
        summary = (
            f"{vector.name.split('; ')[0].replace(vector.kind, options.method, 1)}, strength {chosen['strength']:g}: "
            f"on images not tested on, errors {sweep[0]['harm']:.3f} -> {chosen['harm']:.3f}, "
            f"{loss}"
        )
    exportable = _make_exportable(context, root, data, vector, limits, left_out)
    write_json(root / "sweep.json", {**record, "exportable": exportable, "left_out": left_out})
    if exportable is not None and exportable["chosen"]["strength"]:
        before, after = (exportable["curves"][exportable["name"]][0]["harm"], exportable["chosen"]["harm"])
        summary += f"; exportable: {exportable['name']}, errors {before:.3f} -> {after:.3f}"
    return summary


def _acts_on_heads(name: str, method: MitigationMethod) -> bool:
    return not method.own_places and name != "optimize"


def _compared(chosen: str, heads: list[str]) -> list[str]:
    """Return the other methods that the figure of the report shows."""
    usable = mitigations.usable().items()
    return [name for name, method in usable if name != chosen and method.compared and heads]


def _decaying(vector: SteeringVector, decay: float) -> SteeringVector:
    return vector.decaying(decay) if vector.positions == "last+generated" else vector


# ---- the vector that other software can hold


def _make_exportable(
    context: Context,
    root: Path,
    data: DerivationData,
    best: SteeringVector | None,
    limits: Mapping[str, float | None],
    left_out: dict[str, str],
) -> dict[str, Any] | None:
    """Derive the candidates on one half of the discovery images, choose on the other half, and write the best one.

    None if no candidate can be derived, or the chosen vector can itself be written for other software.
    """
    options = context.config.steer
    if not options.exportable or (best is not None and best.strength and can_be_exported(best)):
        return None
    examples, other_half = _halves(data.examples)
    questions = other_half.filter(lambda e: bool(e.candidates))
    middle, last = data.model.n_layers // 2, data.model.n_layers - 1
    two = ", ".join(f"decoder.L{layer}.resid_post" for layer in dict.fromkeys((middle, min(middle + 1, last))))
    sites = options.exportable_sites or [two]
    makers: dict[str, Callable[[], SteeringVector]] = {}
    for name in options.exportable:
        method = mitigations[name]
        places = [""] if method.own_places else sites
        for site in places:
            part = replace(data, examples=examples, site=site or None, positions=options.exportable_positions)
            label = f"{name} at {site}" if site else name
            makers[f"exportable: {label}"] = partial(_exportable_vector, method, part)
    vectors = _derive_possible(makers, left_out)
    if not vectors or not len(questions):
        return None
    units = {f: mitigations[f.removeprefix("exportable: ").split(" at ")[0]].unit for f in vectors}
    sweeps = sweep_strengths(
        context.model,
        questions,
        {f: (v, [units[f] * s for s in options.exportable_strengths]) for f, v in vectors.items()},
        limits=limits,
    )
    prompts = FreeTextPrompts.of(context.model, _halves(context.discovery)[1], captions=CAPTIONS)
    name, chosen, sweeps, caution = _choose_cautiously(context.model, vectors, sweeps, prompts, limits)
    if chosen["strength"]:
        vectors[name].scaled(chosen["strength"]).save(root / EXPORTABLE, data.model)
    method, _, site = name.removeprefix("exportable: ").partition(" at ")
    curves = {f.removeprefix("exportable: "): rows for f, rows in sweeps.items()}
    return {
        "method": method,
        "site": site,
        "name": name.removeprefix("exportable: "),
        "chosen": chosen,
        "caution": caution,
        "curves": curves,
    }


def _choose_cautiously(
    model: Lvlm,
    vectors: Mapping[str, SteeringVector],
    sweeps: Mapping[str, list[Row]],
    prompts: FreeTextPrompts,
    limits: Mapping[str, float | None],
) -> tuple[str, Row, dict[str, list[Row]], float]:
    """Return the chosen vector and row, the rows with their losses on free text, and the caution.

    With few captions the standard errors exceed the limits, and no strength is allowed: then losses are compared without them.
    """
    for caution in (CAUTION, 0.0):
        rows = {name: [dict(row) for row in sweep] for name, sweep in sweeps.items()}
        candidates = {name: (vector, rows[name]) for name, vector in vectors.items()}
        name, chosen = choose_guarded(model, candidates, prompts, limits=limits, caution=caution)
        if chosen["strength"]:
            return name, chosen, rows, caution
    return name, chosen, rows, 0.0


def _halves(examples: ConceptDataset) -> tuple[ConceptDataset, ConceptDataset]:
    """Divide examples by group: derive on the first half, choose on the second."""
    first = set(list(dict.fromkeys(e.group for e in examples))[::2])
    return examples.filter(lambda e: e.group in first), examples.filter(lambda e: e.group not in first)


def _exportable_vector(method: MitigationMethod, data: DerivationData) -> SteeringVector:
    problem = method.problem(data.examples)
    if problem is not None:
        raise DataError(problem)
    vector = make_vector(method, data)
    if not can_be_exported(vector):
        msg = f"{vector}: no other format can represent it; choose a method with one addition for all inputs, such as optimize"
        raise DataError(msg)
    return vector


def can_be_exported(vector: SteeringVector) -> bool:
    """Return whether another format than groundscope's can represent a vector."""
    return bool(set(export.formats_for(vector)) - {"safetensors"})


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
