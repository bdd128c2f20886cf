"""The rows of an arena: training-free methods, steering vectors and controls, from their names and parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.text import nearest
from mitigation.methods import mitigations
from mitigation.protocol import Mitigation
from mitigation.training_free.method import Regime, check_parameters
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


def row_of(name: str, parameters: Mapping[str, Any], data: DerivationData) -> ArenaRow:
    """Return the row of a method with parameters; see `make_row`."""
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
        mitigation = _make(name, parameters, data)
        mitigation.check(data.model)
    except ConfigError:
        raise
    except GroundscopeError as error:
        return ArenaRow(_named(label, parameters), None, **about, problem=str(error))
    title = mitigation.name if name in training_free_methods else _named(label, parameters)
    return ArenaRow(title, mitigation, **about)


def _make(name: str, parameters: Mapping[str, Any], data: DerivationData) -> Mitigation:
    if name in training_free_methods:
        return training_free_methods[name].derive(data, **parameters)
    entry = mitigations[name]
    mitigation = entry.make(data)
    strength = parameters.get("strength", 1.0) * entry.unit
    scaled = getattr(mitigation, "scaled", None)
    return mitigation if scaled is None else scaled(strength)


def _named(label: str, parameters: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{key}={value}" for key, value in parameters.items())
    return f"{label} ({listed})" if listed else label


def row_needs(name: str) -> tuple[str, ...]:
    """Return what a method is made from beside the model and examples: ``store``, ``heads``, both or neither.

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
    return [name for name in default_rows(data) if training_free_methods[name].control]


def default_rows(data: DerivationData) -> list[str]:
    """Return the names of all methods and controls whose needs the data meet; methods that only detect are left out."""
    available = {"examples"} | ({"store"} if data.store is not None else set()) | ({"heads"} if data.heads else set())
    return [name for name, cls in training_free_methods.usable().items() if set(cls.needs) <= available]
