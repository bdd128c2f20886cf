"""Named methods that make a mitigation for a model, and the controls that a steering vector is compared with.

`mitigations` is an open table: a package adds a method with ``mitigations.register(name, MitigationMethod(make))`` or an entry
point of the group ``groundscope.mitigations``, and runs use it with ``steer.method=name``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from circuits import random_heads
from concepts.schema import ConceptDataset
from groundscope.core.errors import DataError
from groundscope.core.registry import Registry
from lvlm.sites import Head
from mitigation import published_methods
from mitigation.method_data import (
    DerivationData,
    answer_contrast,
    blank_contrast,
    change_contrast,
    without_changes,
    without_yes_or_no,
)
from mitigation.steering import derive
from mitigation.steering.controls import match_displacement, move_to_heads
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from activation_store import ActivationStore
    from mitigation.protocol import Mitigation


@dataclass(frozen=True)
class MitigationMethod:
    """A named way to make a mitigation, an entry of `mitigations`.

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.mitigations["prior_removal"].unit
    -0.5
    """

    make: Callable[[DerivationData], Mitigation]
    """Make the mitigation. Methods whose result can be swept over strengths return a `SteeringVector`."""
    unit: float = 1.0
    """Strength that corresponds to 1 in a list of strengths for several methods; negative for methods that remove."""
    problem: Callable[[ConceptDataset], str | None] = lambda _: None
    """Return why a method cannot be applied to a dataset, with the fix; None if it can. Called before any work starts."""
    required: tuple[str, ...] = ()
    """Names of the options of `DerivationData` that the method needs."""
    own_places: bool = False
    """Whether the method selects its places itself, so that `DerivationData.site` has no effect."""
    own_positions: bool = False
    """Whether the method's positions are fixed, so that `DerivationData.positions` has no effect."""
    compared: bool = True
    """Whether runs with ``steer.compare=true`` try it, for the figure of the report, when it is not the chosen method."""
    reads: str = ""
    """Component whose activations at the last token of every example must be in the store, such as ``z``; empty for none."""


def _discriminant(data: DerivationData) -> SteeringVector:
    return derive.discriminant(answer_contrast(data), doubt=data.options.get("doubt", 0.0), **data.where)


def _check(entry: MitigationMethod) -> str | None:
    if not isinstance(entry, MitigationMethod) or not callable(entry.make):
        return "it must be a mitigation.MitigationMethod with a function that makes a mitigation"
    return None


mitigations: Registry[MitigationMethod] = Registry(
    "mitigation method",
    {
        "discriminant": MitigationMethod(_discriminant, problem=without_yes_or_no, reads="z"),
        "amplify": MitigationMethod(lambda data: derive.amplification(blank_contrast(data), **data.where)),
        # Strength -1 removes the whole component.
        "prior_removal": MitigationMethod(
            lambda data: derive.prior_removal(blank_contrast(data), **data.where), unit=-0.5
        ),
        "pair_difference": MitigationMethod(
            lambda data: derive.mean_difference(change_contrast(data), **data.where), problem=without_changes
        ),
        **{name: MitigationMethod(compared=False, **entry) for name, entry in published_methods.ENTRIES.items()},
    },
    group="groundscope.mitigations",
    check=_check,
)
"""Methods by name: every function of `mitigation.derive`, each on the data that it needs."""


# ---- controls


def make_vector(method: MitigationMethod, data: DerivationData) -> SteeringVector:
    """Return the steering vector of a method; raises `DataError` for a method that makes another mitigation."""
    vector = method.make(data)
    if not isinstance(vector, SteeringVector):
        msg = f"the method made '{vector.name}', which is not a steering vector, so no strength can be chosen"
        raise DataError(msg)
    return vector


def other_heads(data: DerivationData, seed: int = 0) -> tuple[Head, ...]:
    """Return as many random heads that are not among the selected ones."""
    shape = (data.model.n_layers, data.model.n_heads)
    return random_heads(shape, len(data.heads), exclude=data.heads, seed=seed)


def _random_direction(vector: SteeringVector, _method: MitigationMethod, _data: DerivationData) -> SteeringVector:
    return vector.randomized(0)


def _shuffled_labels(vector: SteeringVector, method: MitigationMethod, data: DerivationData) -> SteeringVector:
    control = make_vector(method, replace(data, shuffle_seed=0)).decaying(vector.decay)
    return match_displacement(control, vector, _store_of(data))


def _moved(vector: SteeringVector, _method: MitigationMethod, data: DerivationData) -> SteeringVector:
    return move_to_heads(vector, other_heads(data), _store_of(data))


def _derived_elsewhere(vector: SteeringVector, method: MitigationMethod, data: DerivationData) -> SteeringVector:
    control = make_vector(method, replace(data, heads=other_heads(data))).decaying(vector.decay)
    return match_displacement(control, vector, _store_of(data))


def _store_of(data: DerivationData) -> ActivationStore:
    if data.store is None:
        msg = "a control with the same displacement needs activations; pass a store"
        raise DataError(msg)
    return data.store


Control = Callable[[SteeringVector, MitigationMethod, DerivationData], SteeringVector]
"""From a vector, its method and the data that it was made from to a control."""
CONTROLS: Mapping[str, Control] = MappingProxyType(
    {
        "random direction": _random_direction,
        "shuffled labels": _shuffled_labels,
        "moved to other heads": _moved,
        "derived at other heads": _derived_elsewhere,
    }
)
"""Controls with the displacement of the vector: random directions; the method with labels without information; the same
directions at heads that were not selected; and the method at those heads, which shows how much depends on the selection."""
