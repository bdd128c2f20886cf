"""Choose a method's parameters on validation images, with the same number of configurations for every method and control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from groundscope.core.errors import GroundscopeError
from mitigation.arena.measures import Counted, count_answers
from mitigation.arena.rows import ArenaRow, derived_mitigation, parse_row, row_of
from mitigation.strength import PRIOR_ERRORS, RECALL_COST
from mitigation.training_free.controls.method_control import MethodControl
from mitigation.training_free.registry import training_free_methods

if TYPE_CHECKING:
    from concepts.schema import ConceptDataset
    from mitigation.method_data import DerivationData
    from mitigation.protocol import Mitigation

CONFIGURATIONS = 5
"""Number of configurations of each method; the published one is among them."""
_ALPHA = ("alpha", (0.25, 0.5, 1.0, 2.0, 3.0))
GRIDS: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("vcd", "icd", "vdd", "avisc", "sid"), _ALPHA),
    "damro": ("alpha", (0.5, 1.0, 1.5, 2.0, 3.0)),
    "ritual": ("kappa", (0.5, 1.0, 2.0, 3.0, 5.0)),
    "m3id": ("decay", (0.005, 0.01, 0.02, 0.05, 0.1)),
    "pai": ("alpha", (0.1, 0.2, 0.3, 0.5, 0.8)),
    "middle_layers": ("alpha", (0.1, 0.25, 0.5, 0.75, 1.0)),
    "vaf": ("enhance", (1.05, 1.1, 1.15, 1.25, 1.5)),
    "spin": ("factor", (0.02, 0.05, 0.08, 0.2, 0.5)),
    "adapt_vis": ("threshold", (0.2, 0.3, 0.4, 0.5, 0.6)),
    "deco": ("alpha", (0.2, 0.4, 0.6, 0.8, 1.0)),
    "vista": ("strength", (0.01, 0.05, 0.1, 0.17, 0.3)),
    "vhr": ("factor", (1.25, 1.5, 2.0, 2.5, 3.0)),
    "lcd": ("alpha", (0.5, 1.0, 2.0, 3.0, 4.0)),
    "memvr": ("ratio", (0.06, 0.12, 0.2, 0.3, 0.5)),
    "nullu": ("rank", (1, 2, 4, 8, 16)),
    "revisit": ("beta", (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)),
    **dict.fromkeys(("dola", "apc_only"), ("beta", (0.01, 0.05, 0.1, 0.2, 0.5))),
}
"""Method to the parameter that is searched and its values; steering vectors are searched over `STRENGTHS`."""
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Configuration:
    """One configuration on the validation images.

    Examples
    --------
    >>> from mitigation.arena.search import Configuration
    >>> Configuration({"alpha": 0.5}, errors=0.1, denied=0.02, allowed=True).allowed
    True
    """

    parameters: Mapping[str, Any]
    errors: float
    """Mean of the errors by prior, or the share of wrong answers."""
    denied: float
    """Increase of the share of present objects that are denied."""
    allowed: bool
    """Whether `denied` is within the guard."""
    problem: str | None = None


def configurations(text: str) -> list[dict[str, Any]]:
    """Return the configurations of a row that are tried; a control is searched over the parameter of its method.

    One configuration, with the published parameters, for a method that has no grid. Other parameters of the row are not used.

    Examples
    --------
    >>> from mitigation.arena.search import configurations
    >>> configurations("discriminant")[0], configurations("random_text(of=pai)")[0]
    ({'strength': 0.25}, {'of': 'pai', 'alpha': 0.1})
    """
    name, parameters = parse_row(text)
    if name not in training_free_methods:
        control = {key: value for key, value in parameters.items() if key == "control"}
        return [{**control, "strength": value} for value in STRENGTHS]
    cls = training_free_methods[name]
    of = {"of": parameters.get("of", cls.default_of[0])} if issubclass(cls, MethodControl) else {}
    searched = of.get("of", name)
    if searched not in GRIDS:
        return [of]
    parameter, values = GRIDS[searched]
    return [{**of, parameter: value} for value in values]


def choose_parameters(
    text: str,
    data: DerivationData,
    validation: ConceptDataset,
    *,
    max_drop: float = 0.02,
    batch_size: int = 32,
) -> tuple[ArenaRow | None, tuple[Configuration, ...]]:
    """Return the row of a method with the fewest errors by prior within the guard on recall, and what was tried.

    Parameters
    ----------
    text
        Name of the method or of the derivation of a steering vector; of a control with its method, such as
        ``random_text(of=pai)``.
    data
        What the method is made from.
    validation
        Questions about images that are neither in `data` nor among the test images.
    max_drop
        Largest increase of the share of present objects that are denied.
    batch_size
        Number of questions per forward pass.

    Returns
    -------
    tuple
        The row, None if no configuration is within the guard; and each configuration.
    """
    from behavior import answer

    model = data.model
    before = count_answers(answer(model, validation, batch_size=batch_size, progress=False), validation)
    tried: list[tuple[Configuration, ArenaRow | None]] = []
    name = parse_row(text)[0]
    derived = _derived(text, data)
    for parameters in configurations(text):
        row = row_of(name, parameters, data, derived=derived)
        if row.mitigation is None:
            tried.append((Configuration(parameters, 1.0, 1.0, allowed=False, problem=row.problem), None))
            continue
        try:
            with row.mitigation.applied(model):
                after = count_answers(answer(model, validation, batch_size=batch_size, progress=False), validation)
        except GroundscopeError as error:
            tried.append((Configuration(parameters, 1.0, 1.0, allowed=False, problem=str(error)), None))
            continue
        denied = _value(after, RECALL_COST) - _value(before, RECALL_COST)
        tried.append((Configuration(parameters, _errors(after), denied, allowed=denied <= max_drop), row))
    allowed = [(c, row) for c, row in tried if c.allowed and row is not None]
    best = min(allowed, key=lambda item: item[0].errors, default=None)
    return None if best is None else best[1], tuple(c for c, _ in tried)


def _derived(text: str, data: DerivationData) -> Mitigation | None:
    """Return what a derivation makes, which all strengths share; None for other methods, and if it makes nothing."""
    name, parameters = parse_row(text)
    if name in training_free_methods:
        return None
    with suppress(GroundscopeError):
        return derived_mitigation(name, data, parameters.get("control"))
    return None


def _value(counted: Counted, name: str) -> float:
    return counted.estimate(name).value if name in counted.counts else 0.0


def _errors(counted: Counted) -> float:
    names = [name for name in PRIOR_ERRORS if name in counted.counts]
    if not names:
        return 1 - _value(counted, "all: right")
    return sum(_value(counted, name) for name in names) / len(names)


def search_summary(tried: Sequence[Configuration]) -> str:
    """Return what was tried in one line."""
    parts = []
    for c in tried:
        listed = ", ".join(f"{key}={value}" for key, value in c.parameters.items()) or "published parameters"
        outcome = c.problem or f"errors {100 * c.errors:.1f} %, denied {100 * c.denied:+.1f} points"
        parts.append(f"{listed}: {outcome}" + ("" if c.allowed else " (not allowed)"))
    return "; ".join(parts)
