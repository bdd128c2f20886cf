"""Decoders: each chooses the tokens of answers while it is active on a model. `RuleDecoder` runs an `AnswerRule`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from lvlm.decoding.loop import first_logits, generate
from lvlm.decoding.rule import AnswerRule, Branch, Prompts, Step

if TYPE_CHECKING:
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling

__all__ = ["AnswerRule", "Branch", "Decoder", "Prompts", "RuleDecoder", "Step"]


class Decoder(Protocol):
    """What chooses the tokens of answers while `Lvlm.decoding_with` is open."""

    def first_logits(self, model: Lvlm, batch: Batch) -> Tensor:
        """Return the logits that the first token of each answer is chosen from, ``[B, V]``."""
        ...

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        """Return each answer as token ids, without its end token."""
        ...


class RuleDecoder:
    """A `Decoder` that chooses token by token under an `AnswerRule`."""

    def start(self, model: Lvlm, batch: Batch) -> AnswerRule:
        """Return the rule for a batch of answers."""
        return AnswerRule()

    def first_logits(self, model: Lvlm, batch: Batch) -> Tensor:
        """Return the logits that the first token of each answer is chosen from, ``[B, V]``."""
        return first_logits(model, batch, self.start(model, batch))

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        """Return each answer as token ids, without its end token."""
        return generate(model, batch, self.start(model, batch), max_new_tokens, sampling=sampling)
