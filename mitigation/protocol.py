"""The interface of all mitigations: steering vectors, decoding methods, and those of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class ForwardCost:
    """Forward passes of the decoder that a mitigation needs, compared with the model alone.

    Examples
    --------
    >>> from mitigation import ForwardCost
    >>> ForwardCost(per_token=2.0, prompts=1.0)  # contrastive decoding: a second pass for the prompt and for each token
    ForwardCost(per_token=2.0, prompts=1.0, written_tokens=0)
    """

    per_token: float = 1.0
    """Passes for each generated token; 1 for the model alone."""
    prompts: float = 0.0
    """Additional passes over a prompt for each answer."""
    written_tokens: int = 0
    """Largest number of tokens that the model writes before each answer, such as a description of the image."""


@runtime_checkable
class Mitigation(Protocol):
    """A correction that needs no training and is active while a context is open.

    `mitigation.SteeringVector` implements it. A decoding method changes how the model chooses tokens inside the context;
    a steering vector changes its activations.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation import AddChange, Mitigation, SteeringVector
    >>> isinstance(SteeringVector({2: AddChange(np.eye(8)[0])}, "last+generated", 1.0, "m", "c"), Mitigation)
    True
    """

    @property
    def name(self) -> str:
        """Name for tables and for the provenance of answers."""
        ...

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON values that identify the mitigation: its settings and the origin of what it was derived from."""
        ...

    @property
    def forward_cost(self) -> ForwardCost:
        """Forward passes that it needs."""
        ...

    def check(self, model: Lvlm) -> None:
        """Raise `ModelError` if the mitigation cannot be applied to a model."""
        ...

    def applied(self, model: Lvlm) -> AbstractContextManager[None]:
        """Return a context in which the model is corrected; afterwards the model is unchanged."""
        ...
