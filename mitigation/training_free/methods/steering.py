"""Steering vectors of every derivation as rows of a table of training-free methods."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from groundscope.core.errors import ConfigError, DataError, ModelError
from mitigation.methods import mitigations
from mitigation.protocol import ForwardCost, Mitigation
from mitigation.steering.vector import SteeringVector
from mitigation.training_free.method import Category, TrainingFree, check_parameters

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.model import Lvlm
    from mitigation.method_data import DerivationData


@dataclass(frozen=True, eq=False)
class Steering(TrainingFree):
    """A steering vector, or another entry of `mitigation.mitigations`, as a training-free method.

    `derive` makes the vector that a derivation makes for runs: ``Steering.derive(data, derivation="amplify",
    strength=0.5)``. The places, positions and directions are those of `DerivationData` and of the derivation; nothing
    is changed here. The constructor takes a vector that exists.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.steering import Steering, derivations_for
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    >>> material = gs.DerivationData(model, None, data, heads=["L3.H1", "L4.H2"])
    >>> method = Steering.derive(material, derivation="amplify", strength=0.5)
    >>> with method.applied(model):
    ...     answers = gs.answer(model, data)
    >>> method.name, "amplify" in derivations_for(material)
    ('steering (amplify, strength=0.5)', True)
    """

    label: ClassVar[str] = "steering"
    category: ClassVar[Category] = "steering"
    source: ClassVar[str] = "mitigation.derive"
    needs: ClassVar[tuple[str, ...]] = ("heads", "store", "examples")

    derivation: str = "discriminant"
    """Name of an entry of `mitigation.mitigations`, or of the vector."""
    strength: float | None = None
    """Strength in the unit of the derivation (`MitigationMethod.unit`); None for the vector's own."""
    mitigation: Mitigation | None = None
    """The vector; made by `derive`."""

    @classmethod
    def derive(cls, data: DerivationData, **parameters: Any) -> Self:
        """Return a derivation's vector for a model and data.

        Raises
        ------
        ConfigError
            For an unknown derivation or parameter, or an option that the derivation needs and the data lack.
        DataError
            For data that the derivation cannot use.
        """
        check_parameters(cls, parameters)
        name = str(parameters.get("derivation", cls.derivation))
        obstacle = _obstacle(name, data)
        if obstacle is not None:
            raise DataError(obstacle)
        return cls(**{**parameters, "mitigation": mitigations[name].make(data)})

    @property
    def name(self) -> str:
        """Name of the derivation, and the strength if it is set."""
        strength = "" if self.strength is None else f", strength={self.strength:g}"
        return f"{self.label} ({self.derivation}{strength})"

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON values: derivation, strength, and the parameters of the vector."""
        vector = dict(self.mitigation.parameters) if self.mitigation else None
        return {"derivation": self.derivation, "strength": self.strength, "vector": vector}

    @property
    def forward_cost(self) -> ForwardCost:
        """Forward passes that the mitigation needs."""
        return self.mitigation.forward_cost if self.mitigation else self.cost

    def _derived(self) -> Mitigation:
        if self.mitigation is None:
            msg = "steering has no vector yet; make it with Steering.derive(gs.DerivationData(…), derivation=…)"
            raise ModelError(msg)
        return self.mitigation

    def _check(self, model: Lvlm) -> None:
        self._derived().check(model)
        if self.strength is not None and not isinstance(self.mitigation, SteeringVector):
            msg = f"strength={self.strength:g}: '{self.derivation}' makes no steering vector; leave strength out"
            raise ConfigError(msg)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        mitigation = self._derived()
        if self.strength is not None and isinstance(mitigation, SteeringVector):
            entries = mitigations.usable()
            unit = entries[self.derivation].unit if self.derivation in entries else 1.0
            mitigation = mitigation.scaled(self.strength * unit)
        stack.enter_context(mitigation.applied(model))
        return None


def derivations_for(data: DerivationData) -> tuple[str, ...]:
    """Return the names of the derivations that data allow, for `Steering.derive`."""
    return tuple(name for name in mitigations.usable() if _obstacle(name, data) is None)


def _obstacle(name: str, data: DerivationData) -> str | None:
    """Return why a derivation cannot be made from data; None if it can. Raises `ConfigError` for an unknown one."""
    entry = mitigations[name]
    missing = [option for option in entry.required if option not in data.options]
    if missing:
        return f"the derivation {name} needs the option {missing[0]}: DerivationData(…, options={{'{missing[0]}': …}})"
    if entry.reads and data.store is None:
        return f"the derivation {name} reads a store; pass DerivationData(model, store, examples)"
    problem = entry.problem(data.examples)
    return None if problem is None else f"the derivation {name} cannot be made from these data: {problem}"
