"""The rows of an arena: training-free methods, steering vectors and controls, from their names and parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.text import format_count, nearest
from mitigation.arena.steering_rows import choose_vector, derive_mitigation
from mitigation.methods import mitigations
from mitigation.protocol import Mitigation
from mitigation.steering.vector import SteeringVector
from mitigation.training_free.method import Regime, check_parameters
from mitigation.training_free.methods.steering import Steering, derivations_for
from mitigation.training_free.table import training_free_methods

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
        unknown = set(parameters) - {"strength"}
        if unknown:
            msg = f"'{text}': a steering vector has the parameter strength only, not '{min(unknown)}'"
            raise ConfigError(msg)
    else:
        names = [*training_free_methods, *mitigations]
        msg = f"unknown method '{name}'; choose from {', '.join(names)}{nearest(name, names)}"
        raise ConfigError(msg)
    return name, parameters


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
    name, parameters = parse_row(text)
    return row_of(name, parameters, data)


def row_of(
    name: str, parameters: Mapping[str, Any], data: DerivationData, *, derived: Mitigation | None = None
) -> ArenaRow:
    """Return the row of a method with parameters; see `make_row`. `derived` is what a derivation made from the data, if known."""
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
        about = {"category": "steering", "source": "groundscope"}
        label = f"steering: {name}"
    try:
        mitigation, title = _made(name, parameters, data, derived)
        mitigation.check(data.model)
    except ConfigError:
        raise
    except GroundscopeError as error:
        return ArenaRow(_named(label, parameters), None, **about, problem=str(error))
    return ArenaRow(title, mitigation, **about)


def _made(
    name: str, parameters: Mapping[str, Any], data: DerivationData, derived: Mitigation | None
) -> tuple[Mitigation, str]:
    """Return a method and its name in tables."""
    if name in training_free_methods:
        method = training_free_methods[name].derive(data, **parameters)
        return method, method.name
    label, vector = f"steering: {name}", derived or derive_mitigation(name, data)
    if not isinstance(vector, SteeringVector):
        return vector, _named(label, parameters)
    if "strength" in parameters:
        return vector.scaled(parameters["strength"] * mitigations[name].unit), _named(label, parameters)
    chosen, strength = choose_vector(name, vector, data)
    return chosen, f"{label} ({format_count(len(chosen.changes), 'place')}, strength {strength:g})"


def _named(label: str, parameters: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{key}={value}" for key, value in parameters.items())
    return f"{label} ({listed})" if listed else label


def row_needs(name: str) -> tuple[str, ...]:
    """Return what a method is made from besides the model and examples: ``store``, ``heads``, both or neither.

    Examples
    --------
    >>> from mitigation.arena.rows import row_needs
    >>> row_needs("vcd"), row_needs("discriminant")
    ((), ('store', 'heads'))
    """
    if name in training_free_methods:
        return tuple(need for need in training_free_methods[name].needs if need in {"store", "heads"})
    return ("store", "heads")


def control_rows(data: DerivationData) -> list[str]:
    """Return the names of the controls whose needs the data meet."""
    return [n for n in default_rows(data) if n in training_free_methods and training_free_methods[n].control]


def default_rows(data: DerivationData) -> list[str]:
    """Return the names of all methods and controls whose needs the data meet, then of the derivations that they allow.

    Methods that only detect are left out. Derivations of steering vectors are rows if the data have heads and a store.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.arena.rows import default_rows
    >>> names = default_rows(gs.DerivationData(gs.load_lvlm("tiny"), None, gs.scenes.dataset(10)))
    >>> "vcd" in names, "discriminant" in names
    (True, False)
    """
    available = {"examples"} | ({"store"} if data.store is not None else set()) | ({"heads"} if data.heads else set())
    # Each derivation is a row by its own name, so the adapter is none.
    methods = {name: cls for name, cls in training_free_methods.usable().items() if cls is not Steering}
    names = [name for name, cls in methods.items() if set(cls.needs) <= available]
    return [*names, *(derivations_for(data) if {"store", "heads"} <= available else ())]
