"""Training-free methods: what each is, the table of all, and the parts that they share.

A method is a frozen dataclass whose fields are its parameters. It is a `mitigation.Mitigation`: `applied` opens a context in
which the model's answers are corrected, by a decoder (`lvlm.decoding`), by changes of attention, activations or weights, or by
both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from groundscope.core.errors import ConfigError, ModelError
from groundscope.core.text import nearest
from lvlm.active_interventions import ActiveIntervention
from lvlm.intervention_digest import digest_of
from mitigation.protocol import ForwardCost

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.decoding.decoder import Decoder
    from lvlm.model import Lvlm
    from mitigation.method_data import DerivationData

Category = Literal["steering", "decoding", "attention", "heads", "layers", "weights", "prompt", "post-hoc"]
"""Class of a method in Figure 2 of the survey (arXiv 2501.01346), divided by what it changes."""
Regime = Literal["greedy", "sampling", "beam"]
"""How a method's release writes answers."""
Variant = Literal["paper", "release"]
"""Form of a rule: as the paper states it, or as its released code computes it."""
_KIND = "training-free method"


@dataclass(frozen=True)
class TrainingFree:
    """A training-free method; subclasses add their parameters as fields and override `_check` and `_enter`.

    Examples
    --------
    >>> from mitigation import TrainingFree
    >>> TrainingFree().parameters
    {}
    """

    label: ClassVar[str] = "unmodified"
    """Name in tables."""
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = ""
    """arXiv number, or another reference."""
    regime: ClassVar[Regime] = "greedy"
    """How the method's release writes answers."""
    cost: ClassVar[ForwardCost] = ForwardCost()
    control: ClassVar[bool] = False
    """Whether this is a control, a row that a method must beat, and not a published method."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What `derive` reads of `DerivationData` in addition to the model: ``heads``, ``store``, ``examples``."""

    @property
    def name(self) -> str:
        """Name and parameters that differ from their defaults."""
        changed = (
            f"{f.name}={_short(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default
        )
        listed = ", ".join(changed)
        return f"{self.label} ({listed})" if listed else self.label

    @property
    def parameters(self) -> Mapping[str, Any]:
        """All parameters, for provenance."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def used_parameters(self, model: Lvlm) -> Mapping[str, Any]:
        """Return the effective `parameters` for a model: with layers and counts scaled to its size, for provenance."""
        return self.parameters

    @property
    def forward_cost(self) -> ForwardCost:
        """Forward passes that the method needs."""
        return self.cost

    @classmethod
    def parameter_names(cls, parameters: Mapping[str, Any]) -> list[str]:
        """Return the names of the parameters; for controls of other methods they depend on the method."""
        return [f.name for f in fields(cls)]

    @classmethod
    def derive(cls, data: DerivationData, **parameters: Any) -> Self:
        """Return the method for a model and data; methods without `needs` ignore the data.

        Raises
        ------
        ConfigError
            For an unknown parameter.
        """
        check_parameters(cls, parameters)
        return cls(**parameters)

    def check(self, model: Lvlm) -> None:
        """Raise `ModelError` if the method cannot be applied to a model."""
        self._check(model)

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return why the method cannot answer a question, such as prompt words that the tokenizer does not know; else None."""
        return None

    @contextmanager
    def applied(self, model: Lvlm) -> Iterator[None]:
        """Correct the model's answers while the context is open; afterwards the model is unchanged."""
        self.check(model)
        with ExitStack() as stack:
            others = [item.name for item in model.interventions if item.kind == _KIND]
            active = ActiveIntervention(_KIND, self.name, self._digest)
            stack.callback(model.register(active).remove)
            decoder = self._enter(model, stack)
            if decoder is not None:
                if model.decoder is not None and others:
                    msg = f"{self.name} chooses the next token, and so does {' or '.join(others)}; apply one of them"
                    raise ModelError(msg)
                stack.enter_context(model.decoding_with(decoder))
            yield

    def _digest(self) -> str | None:
        """Return a digest of everything that determines the effect; None if it contains code."""
        return digest_of(self)

    def _check(self, model: Lvlm) -> None:
        """Raise `ModelError` if a family lacks what the method needs."""

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        """Change the model until `stack` closes, and return the decoder that writes the answers; None for the model's own."""
        return None


def check_parameters(method: type[TrainingFree], parameters: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a parameter that a method does not have."""
    names = method.parameter_names(parameters)
    unknown = next((name for name in parameters if name not in names), None)
    if unknown is not None:
        listed = ", ".join(names) or "none"
        msg = f"{method.label} has no parameter '{unknown}'{nearest(unknown, names)}; its parameters are: {listed}"
        raise ConfigError(msg)


def check_range(name: str, value: float, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Raise `ConfigError` if a parameter is not a number in ``[low, high]``, or ``(low, high]`` with `above`."""
    inside = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if inside and (value > low if above else value >= low) and value <= high:
        return
    bound = f"above {low:g}" if above else f"at least {low:g}"
    msg = f"{name}={value}: must be a number {bound}" + (f" and at most {high:g}" if high < math.inf else "")
    raise ConfigError(msg)


def check_count(name: str, value: int, low: int = 1) -> None:
    """Raise `ConfigError` if a parameter is not a whole number of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        msg = f"{name}={value}: must be a whole number of at least {low}"
        raise ConfigError(msg)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` if a parameter is not one of its named values."""
    if value not in choices:
        msg = f"unknown {name} '{value}'; choose from {', '.join(choices)}"
        raise ConfigError(msg)


def check_image_tokens(model: Lvlm, label: str) -> None:
    """Raise `ModelError` for a family whose decoder has no image tokens in its sequence."""
    from lvlm.image_tokens import image_in_sequence

    if not image_in_sequence(model):
        reader = "an encoder" if model.encoder_decoder else "cross-attention"
        msg = (
            f"{label} acts on image tokens of the decoder, and in {model.name} ({model.spec.model_type}) {reader} reads the "
            "image"
        )
        raise ModelError(msg)


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
