"""The rows of an arena: training-free methods, steering vectors and controls, from their names and parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from groundscope.core.errors import ConfigError, DataError, GroundscopeError
from groundscope.core.text import format_count, nearest
from mitigation.arena.steering_rows import acts_on_heads, choose_vector, control_of, derive_mitigation
from mitigation.methods import CONTROLS, mitigations
from mitigation.protocol import Mitigation
from mitigation.steering.vector import SteeringVector
from mitigation.training_free.controls.method_control import MethodControl
from mitigation.training_free.method import Regime, check_parameters
from mitigation.training_free.methods.steering import Steering, derivations_for
from mitigation.training_free.registry import training_free_methods

if TYPE_CHECKING:
    from behavior.result import BehaviorResult
    from mitigation.method_data import DerivationData

PLAIN = "unmodified"
"""Name of the row of the model alone."""
_SPEC = re.compile(r"(?P<name>[\w-]+)\s*(?:\((?P<parameters>.*)\))?\s*")


@dataclass(frozen=True, eq=False)
class ArenaRow:
    """One row: a method with its parameters, or the model alone.

    Examples
    --------
    >>> from mitigation.arena.rows import ArenaRow
    >>> ArenaRow("unmodified", None).control
    False
    """

    name: str
    mitigation: Mitigation | None
    """None for the model alone, and for a method that cannot be made (`problem`)."""
    category: str = ""
    """Class of the survey's Figure 2."""
    source: str = ""
    control: bool = False
    """Whether it is a control that methods are compared with."""
    regime: Regime = "greedy"
    """How the method's release writes answers."""
    problem: str | None = None
    """Why the row cannot be measured."""
    answers: BehaviorResult | None = None
    """Answers that were made elsewhere: by a method that needs third models, by another checkpoint, or about other images. The
    row has no price, and no answers of other regimes."""


def parse_row(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and parameters of a row such as ``vcd`` or ``vcd(alpha=0.5, step=700)``.

    Raises
    ------
    ConfigError
        For another form, an unknown method or an unknown parameter.

    Examples
    --------
    >>> from mitigation.arena.rows import parse_row
    >>> parse_row("vcd(alpha=0.5)")
    ('vcd', {'alpha': 0.5})
    """
    import yaml

    match = _SPEC.fullmatch(text.strip())
    if match is None:
        msg = (
            f"'{text}' is no row of an arena; write a name, or a name with parameters such as vcd(alpha=0.5, step=700)"
        )
        raise ConfigError(msg)
    name = match["name"]
    parameters: dict[str, Any] = {}
    for part in filter(str.strip, (match["parameters"] or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            msg = f"'{text}': '{part.strip()}' must be parameter=value"
            raise ConfigError(msg)
        try:
            parameters[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            msg = f"'{text}': the value of '{key.strip()}' cannot be read"
            raise ConfigError(msg) from error
    if name in training_free_methods:
        check_parameters(training_free_methods[name], parameters)
    elif name in mitigations:
        _check_steering(text, parameters)
    else:
        names = [*training_free_methods, *mitigations]
        msg = f"unknown method '{name}'; choose from {', '.join(names)}{nearest(name, names)}"
        raise ConfigError(msg)
    return name, parameters


def _check_steering(text: str, parameters: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for parameters that the row of a steering vector does not have."""
    unknown = set(parameters) - {"strength", "control"}
    if unknown:
        msg = f"'{text}': a steering vector has the parameters strength and control, not '{min(unknown)}'"
        raise ConfigError(msg)
    control = parameters.get("control")
    if control is not None and control not in CONTROLS:
        msg = (
            f"'{text}': unknown control '{control}'; choose from {', '.join(CONTROLS)}{nearest(str(control), CONTROLS)}"
        )
        raise ConfigError(msg)


def make_row(text: str, data: DerivationData) -> ArenaRow:
    """Return the row of a name with parameters; a method that cannot be made for the model and data has a `problem`.

    A training-free method has its published parameters; a steering vector acts at the heads of the data, or at its derivation's
    places, with the strength that a run chooses (`mitigation.arena.steering_rows`), unless parameters are given.

    Raises
    ------
    ConfigError
        As for `parse_row`, and for a parameter out of range.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.DerivationData(gs.load_lvlm("tiny"), None, gs.scenes.dataset(10))
    >>> gs.make_row("vcd(alpha=0.5)", data).name
    'VCD (alpha=0.5)'
    """
    return make_rows([text], data)[0]


def make_rows(texts: Sequence[str], data: DerivationData) -> list[ArenaRow]:
    """Return the rows of several names (`make_row`); a steering vector and its controls share the choice of a strength.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.arena.rows import make_rows
    >>> data = gs.DerivationData(gs.load_lvlm("tiny"), None, gs.scenes.dataset(10))
    >>> [row.name for row in make_rows(["pai", "random_text(of=pai)"], data)]
    ['PAI', 'random text tokens in PAI']
    """
    choices: dict[str, tuple[SteeringVector, float]] = {}
    return [row_of(*parse_row(text), data, choices=choices) for text in texts]


def row_of(
    name: str,
    parameters: Mapping[str, Any],
    data: DerivationData,
    *,
    derived: Mitigation | None = None,
    choices: dict[str, tuple[SteeringVector, float]] | None = None,
) -> ArenaRow:
    """Return the row of a method with parameters; see `make_row`.

    `derived` is what `derived_mitigation` returns for the row, if it is known; `choices` collects the strengths that were chosen.
    """
    if name in training_free_methods:
        cls = training_free_methods[name]
        about: dict[str, Any] = {
            "category": cls.category,
            "source": cls.source,
            "control": cls.control,
            "regime": cls.regime,
        }
        label = cls.label
    else:
        control = parameters.get("control")
        about = {"category": "steering", "source": "groundscope", "control": control is not None}
        label = f"steering: {name}" + (f", {control}" if control else "")
    try:
        if name in training_free_methods:
            mitigation: Mitigation = training_free_methods[name].derive(data, **parameters)
            title = mitigation.name
        else:
            mitigation, strength_text = _steering(name, parameters, data, derived, {} if choices is None else choices)
            title = f"{label} ({strength_text})" if strength_text else label
        mitigation.check(data.model)
    except ConfigError:
        raise
    except GroundscopeError as error:
        return ArenaRow(_named(label, parameters), None, **about, problem=str(error))
    return ArenaRow(title, mitigation, **about)


def _steering(
    name: str,
    parameters: Mapping[str, Any],
    data: DerivationData,
    derived: Mitigation | None,
    choices: dict[str, tuple[SteeringVector, float]],
) -> tuple[Mitigation, str]:
    """Return a steering vector or a control of it, and its places and strength for tables."""
    control = parameters.get("control")
    if "strength" in parameters:
        vector = derived or derived_mitigation(name, data, control)
        strength = parameters["strength"]
        if not isinstance(vector, SteeringVector):
            msg = f"strength={strength}: {name} makes '{vector.name}', which has no strength"
            raise DataError(msg)
        return vector.scaled(strength * mitigations[name].unit), f"strength={strength:g}"
    if name not in choices:
        vector = derive_mitigation(name, data)
        if not isinstance(vector, SteeringVector):
            return vector, ""
        choices[name] = choose_vector(name, vector, data)
    vector, strength = choices[name]
    if control is not None:
        vector = control_of(control, name, vector, data).scaled(vector.strength)
    return vector, f"{format_count(len(vector.changes), 'place')}, strength {strength:g}"


def derived_mitigation(name: str, data: DerivationData, control: str | None = None) -> Mitigation:
    """Return what a derivation makes from data, or a control of its vector."""
    mitigation = derive_mitigation(name, data)
    if control is None or not isinstance(mitigation, SteeringVector):
        return mitigation
    return control_of(control, name, mitigation, data)


def _named(label: str, parameters: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{key}={value}" for key, value in parameters.items() if key != "control")
    return f"{label} ({listed})" if listed else label


def row_needs(text: str) -> tuple[str, ...]:
    """Return what a row is made from in addition to the model and examples: ``store``, ``heads``, both or neither.

    Examples
    --------
    >>> from mitigation.arena.rows import row_needs
    >>> row_needs("vcd"), row_needs("random_heads(of=ad_hh)"), row_needs("discriminant")
    ((), ('heads',), ('store', 'heads'))
    """
    name, parameters = parse_row(text)
    if name in training_free_methods:
        needs = {need for n in (name, parameters.get("of", name)) for need in training_free_methods[n].needs}
        return tuple(need for need in ("store", "heads") if need in needs)
    return ("store", "heads")


def control_rows(data: DerivationData, texts: Sequence[str]) -> list[str]:
    """Return the controls of some rows whose needs the data meet: those of all methods, and those of the methods in the rows.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.arena.rows import control_rows
    >>> names = control_rows(gs.DerivationData(gs.load_lvlm("tiny"), None, gs.scenes.dataset(10)), ["pai"])
    >>> "apc_only" in names, "random_text(of=pai)" in names, "random_heads(of=spin)" in names
    (True, True, False)
    """
    names = {parse_row(text)[0] for text in texts}
    rows = []
    for text in default_rows(data):
        name, parameters = parse_row(text)
        if name in training_free_methods and not training_free_methods[name].control:
            continue
        if "of" in parameters and parameters["of"] not in names:
            continue
        if name in training_free_methods or ("control" in parameters and name in names):
            rows.append(text)
    return rows


STEERING_CONTROLS = ("derived at other heads", "random direction")
"""Entries of `mitigation.CONTROLS` that are rows by default, for the derivations that runs compare."""


def default_rows(data: DerivationData) -> list[str]:
    """Return the rows of all methods and controls whose needs the data meet, then of the derivations that they allow.

    Methods that only detect are left out. Derivations of steering vectors are rows if the data have heads and a store.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.arena.rows import default_rows
    >>> names = default_rows(gs.DerivationData(gs.load_lvlm("tiny"), None, gs.scenes.dataset(10)))
    >>> "vcd" in names, "random_layers(of=deco)" in names, "discriminant" in names
    (True, True, False)
    """
    available = {"examples"} | ({"store"} if data.store is not None else set()) | ({"heads"} if data.heads else set())
    rows = []
    for name, cls in training_free_methods.usable().items():
        # Each derivation is a row by its own name, so their adapter is not one.
        if cls is Steering or not set(cls.needs) <= available:
            continue
        if not issubclass(cls, MethodControl) or len(cls.default_of) == 1:
            rows.append(name)
            continue
        default_methods = [of for of in cls.default_of if set(training_free_methods[of].needs) <= available]
        rows += [f"{name}(of={of})" for of in default_methods]
    if not {"store", "heads"} <= available:
        return rows
    derivations = derivations_for(data)
    compared = [name for name in derivations if mitigations[name].compared and acts_on_heads(name)]
    return [*rows, *derivations, *(f"{name}(control={c})" for name in compared for c in STEERING_CONTROLS)]
