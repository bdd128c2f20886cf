"""Probabilities and attention with which a model writes each token of an answer, from one pass over the whole text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from concepts.schema import Example
from groundscope.core.errors import DataError
from lvlm.image_tokens import image_in_sequence, image_tokens

if TYPE_CHECKING:
    from lvlm.model import Lvlm


@dataclass(frozen=True, eq=False)
class WrittenTokens:
    """A written answer as the model reads it."""

    example: Example
    tokens: tuple[int, ...]
    """Tokens of the prefix."""
    log_p: np.ndarray
    """Log-probabilities of the whole vocabulary before each token, float64 ``[T, V]``."""
    image_attention: np.ndarray
    """Attention to the image, summed over its tokens, of the query that precedes each token: float64 ``[T, heads]``."""
    mentions: tuple[tuple[int, int], ...]
    """First and last token of each mention of the example."""

    @property
    def chosen(self) -> np.ndarray:
        """Log-probability of each token of the answer, float64 ``[T]``."""
        return self.log_p[np.arange(len(self.tokens)), self.tokens]


def read_written_tokens(
    model: Lvlm, examples: Sequence[Example], *, layer: int | None = None
) -> Iterator[WrittenTokens]:
    """Yield the written answer of each example, in order; one forward pass each.

    Parameters
    ----------
    model
        The model.
    examples
        Examples whose answer is written and whose mentions are marked: `concepts.with_mentions`.
    layer
        Block whose attention to the image is read; None for no attention (``[T, 0]``). Attention is computed step by
        step.

    Raises
    ------
    DataError
        For an example without a written answer.
    """
    for example in examples:
        if not example.prefix:
            msg = f"example '{example.id}' has no written answer; make the examples with gs.with_mentions(data, texts)"
            raise DataError(msg)
        encoding = model.encode(example)
        positions = encoding.tokens.prefix
        inputs = model.collate([encoding])
        ids = inputs["decoder_input_ids" if model.encoder_decoder else "input_ids"][0].tolist()
        with torch.no_grad():
            logits = model.forward(inputs, keep=len(positions) + 1)[0, :-1].double()
        attention = np.zeros((len(positions), 0))
        if layer is not None and image_in_sequence(model):
            site = f"decoder.L{layer}.pattern"
            pattern = model.read(inputs, [site], quiet=True)[site][0]  # [heads, queries, keys]
            image = image_tokens(model, inputs)[0].to(pattern.device)
            queries = [p - 1 for p in positions]
            attention = pattern[:, queries][..., image].double().sum(-1).T.cpu().numpy()
        first = positions[0]
        yield WrittenTokens(
            example,
            tuple(ids[p] for p in positions),
            logits.log_softmax(-1).cpu().numpy(),
            attention,
            tuple((start - first, stop - first) for start, stop in encoding.tokens.mentions),
        )
