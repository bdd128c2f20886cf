"""Control of methods that act on some layers: as many random layers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from groundscope.core.errors import ConfigError, ModelError
from mitigation.training_free.controls.method_control import MethodControl
from mitigation.training_free.controls.random_places import other_layers
from mitigation.training_free.method import TrainingFree
from mitigation.training_free.methods.deco import DeCo
from mitigation.training_free.methods.dola import DoLa
from mitigation.training_free.methods.middle_layers import MiddleLayers
from mitigation.training_free.methods.vaf import VAF

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class RandomLayers(MethodControl):
    """Control: a method at as many random layers, none of which is among its own.

    The layers are drawn by the seed. A method that uses more than half of the model's layers has no such control, and is refused.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.controls.random_layers import RandomLayers
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> with RandomLayers().applied(model):
    ...     answers = gs.answer(model, data)
    >>> RandomLayers().name, len(answers)
    ('random layers in DeCo', 6)
    """

    label: ClassVar[str] = "random layers"
    methods: ClassVar[Mapping[str, type[TrainingFree]]] = MappingProxyType(
        {"deco": DeCo, "dola": DoLa, "middle_layers": MiddleLayers, "vaf": VAF}
    )
    default_of: ClassVar[tuple[str, ...]] = tuple(methods)

    of: TrainingFree = field(default_factory=DeCo)

    def used_parameters(self, model: Lvlm) -> Mapping[str, Any]:
        """Return the parameters with the layers that are drawn."""
        return {**self.parameters, "layers": self._moved(model).used_parameters(model)["layers"]}

    def _moved(self, model: Lvlm) -> TrainingFree:
        """Return the method at other layers."""
        if "layers" not in {f.name for f in fields(self.of)}:
            msg = f"{self.label}: {self.of.name} acts on no layers that could be replaced; choose from {', '.join(self.methods)}"
            raise ConfigError(msg)
        of: Any = self.of
        used = of.used_parameters(model)["layers"]
        try:
            return replace(of, layers=other_layers(model, used, self.seed))
        except ConfigError as error:
            msg = f"{self.label} in {of.name}: {error}"
            raise ModelError(msg) from error

    def _check(self, model: Lvlm) -> None:
        super()._check(model)
        self._moved(model).check(model)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return self._moved(model)._enter(model, stack)
