"""Beam search: the most likely of several answers, without any correction."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lvlm.decoding.beam import BeamDecoder, Beams
from mitigation.protocol import ForwardCost
from mitigation.training_free.method import Category, Regime, TrainingFree

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.model import Lvlm


@dataclass(frozen=True)
class BeamSearch(TrainingFree):
    """Beam search, the plain row that methods whose release uses beams are compared with.

    `beams` answers are continued together; the answer with the largest ``sum of log p / n ** length_penalty`` over its n tokens
    is written, as by ``generate(num_beams=5)`` of transformers. One beam is greedy decoding. Questions that are answered by the
    first token have the answers of the model alone.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.beam import BeamSearch
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(20).where(kind="caption")
    >>> with BeamSearch().applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers), BeamSearch().name
    (2, 'beam 5')
    """

    label: ClassVar[str] = "beam"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "transformers"
    regime: ClassVar[Regime] = "beam"

    beams: int = 5
    """Number of answers that are continued together; at least 1."""
    length_penalty: float = 1.0
    """Exponent of the length that the score is divided by."""

    def __post_init__(self) -> None:
        Beams(self.beams, self.length_penalty)

    @property
    def name(self) -> str:
        """Number of beams, and the length penalty if it is not 1."""
        penalty = "" if self.length_penalty == 1 else f" (length_penalty={self.length_penalty:g})"
        return f"{self.label} {self.beams}{penalty}"

    @property
    def forward_cost(self) -> ForwardCost:
        """One forward pass of a token for each beam."""
        return ForwardCost(per_token=float(self.beams))

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return None if self.beams == 1 else BeamDecoder(Beams(self.beams, self.length_penalty))
