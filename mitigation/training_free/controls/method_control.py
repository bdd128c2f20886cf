"""Controls that keep a method, its rule and its parameters, and replace what it acts on by something random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from groundscope.core.errors import ConfigError
from groundscope.core.text import nearest
from lvlm.intervention_digest import digest_of
from mitigation.protocol import ForwardCost
from mitigation.training_free.method import TrainingFree, check_parameters

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.model import Lvlm
    from mitigation.method_data import DerivationData


@dataclass(frozen=True)
class MethodControl(TrainingFree):
    """A control of a method; subclasses state `methods` and override `_enter`.

    `derive` takes the name of the method, and parameters of the method next to those of the control:
    ``RandomText.derive(data, of="pai", alpha=0.3)``.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.controls.random_text_tokens import RandomText
    >>> data = gs.DerivationData(gs.load_lvlm("tiny"), None, gs.scenes.dataset(10))
    >>> RandomText.derive(data, of="pai", alpha=0.3).name
    'random text tokens in PAI (alpha=0.3)'
    """

    control: ClassVar[bool] = True
    methods: ClassVar[Mapping[str, type[TrainingFree]]] = MappingProxyType({})
    """Methods that the control is made for, by their names in the table of methods."""
    default_of: ClassVar[tuple[str, ...]] = ()
    """Those of `methods` of which tables have the control by default."""

    of: TrainingFree = field(default_factory=TrainingFree)
    """The method whose rule and parameters are used."""
    seed: int = 0
    """Seed of what is drawn."""

    @classmethod
    def parameter_names(cls, parameters: Mapping[str, Any]) -> list[str]:
        """Return the names of the parameters of the control and of its method."""
        of = parameters.get("of", cls.default_of[0])
        method = cls._method(of) if isinstance(of, str) else type(of)
        return list(dict.fromkeys([*(f.name for f in fields(cls)), *(f.name for f in fields(method))]))

    @classmethod
    def _method(cls, name: str) -> type[TrainingFree]:
        if name not in cls.methods:
            msg = f"{cls.label} is no control of '{name}'; choose from {', '.join(cls.methods)}{nearest(name, cls.methods)}"
            raise ConfigError(msg)
        return cls.methods[name]

    @classmethod
    def derive(cls, data: DerivationData, **parameters: Any) -> Self:
        """Return the control of a method, which is made from the data too.

        Raises
        ------
        ConfigError
            For an unknown parameter, or a method that the control is not made for.
        """
        check_parameters(cls, parameters)
        own = {f.name for f in fields(cls)} - {"of"}
        of = parameters.pop("of", cls.default_of[0])
        own_options = {name: parameters.pop(name) for name in list(parameters) if name in own}
        if isinstance(of, str):
            of = cls._method(of).derive(data, **parameters)
        return cls(of=of, **{**cls._derived(data), **own_options})

    @classmethod
    def _derived(cls, data: DerivationData) -> Mapping[str, Any]:
        """Return the fields that are made from data."""
        return {}

    @property
    def name(self) -> str:
        """The control and its method."""
        return f"{self.label} in {self.of.name}" + (f" (seed={self.seed})" if self.seed else "")

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Parameters of the control and of its method."""
        return {"of": self.of.label, "of_parameters": dict(self.of.parameters), "seed": self.seed}

    @property
    def forward_cost(self) -> ForwardCost:
        """Forward passes of the method."""
        return self.of.forward_cost

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return the problem of the method."""
        return self.of.problem(model, example)

    def _digest(self) -> str | None:
        return digest_of([type(self).__name__, type(self.of).__name__, dict(self.parameters)])

    def _check(self, model: Lvlm) -> None:
        self.of.check(model)
