"""Several mitigations as one: a steering vector or an attention method together with a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from groundscope.core.errors import ConfigError, ModelError
from mitigation.protocol import ForwardCost, Mitigation

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.model import Lvlm


@dataclass(frozen=True, eq=False)
class Composition:
    """Mitigations that are active together, applied in their order; a `mitigation.Mitigation`. Made by `compose`."""

    parts: tuple[Mitigation, ...]

    @property
    def name(self) -> str:
        """Names of the parts, joined by a plus sign."""
        return " + ".join(part.name for part in self.parts)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Name and parameters of each part."""
        return {"parts": [{"name": part.name, "parameters": dict(part.parameters)} for part in self.parts]}

    @property
    def forward_cost(self) -> ForwardCost:
        """Sum of what the parts add to the model alone."""
        costs = [part.forward_cost for part in self.parts]
        return ForwardCost(
            per_token=1 + sum(cost.per_token - 1 for cost in costs),
            prompts=sum(cost.prompts for cost in costs),
            written_tokens=sum(cost.written_tokens for cost in costs),
        )

    def check(self, model: Lvlm) -> None:
        """Raise `ModelError` if a part cannot be applied to a model, or if two parts choose the next token."""
        for part in self.parts:
            part.check(model)
        deciding = [part.name for part in self.parts if _decodes(part, model)]
        if len(deciding) > 1:
            msg = (
                f"{' and '.join(deciding)} both choose the next token, so they cannot be combined; combine one of them with "
                "steering vectors or methods that change attention"
            )
            raise ModelError(msg)

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return the first problem of a part with a question, as in `TrainingFree.problem`."""
        checks = (getattr(part, "problem", None) for part in self.parts)
        problems = (problem(model, example) for problem in checks if callable(problem))
        return next((str(problem) for problem in problems if problem is not None), None)

    @contextmanager
    def applied(self, model: Lvlm) -> Iterator[None]:
        """Apply all parts while the context is open; afterwards the model is unchanged."""
        self.check(model)
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.applied(model))
            yield


def compose(*mitigations: Mitigation) -> Mitigation:
    """Return a mitigation that applies several together.

    Changes of activations, attention and weights add up; at most one of the mitigations may choose the next token.

    Raises
    ------
    ConfigError
        Without mitigations. Two decoders are refused by `check`, and by `applied` before any forward pass.

    Examples
    --------
    >>> import numpy as np
    >>> import groundscope as gs
    >>> from mitigation import compose
    >>> from mitigation.training_free.methods.vdd import VDD
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    >>> change = gs.AddChange(np.eye(1, model.width)[0])
    >>> vector = gs.SteeringVector({2: change}, "last+generated", 1.0, model.name, model.config_hash)
    >>> both = compose(vector, VDD())
    >>> both.name
    'add at L2; last+generated, strength 1 + VDD'
    >>> with both.applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers), both.forward_cost.per_token
    (6, 2.0)
    """
    if not mitigations:
        msg = "there is nothing to combine; give at least one mitigation"
        raise ConfigError(msg)
    parts: list[Mitigation] = []
    for item in mitigations:
        parts += item.parts if isinstance(item, Composition) else (item,)
    return Composition(tuple(parts))


def _decodes(part: Mitigation, model: Lvlm) -> bool:
    """Whether a mitigation chooses the next token: it is applied for a moment, without a forward pass."""
    if model.decoder is not None:
        msg = f"a decoder is active already ({type(model.decoder).__name__}); leave its context before you combine mitigations"
        raise ModelError(msg)
    with part.applied(model):
        return model.decoder is not None
