"""Select evenly spaced examples to measure for an estimate, and encode them as the trace does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from concepts.schema import ConceptDataset, Example

if TYPE_CHECKING:
    from lvlm.model import Encoding


def encode_planned(encoding: Encoding, tokens: Sequence[str]) -> Encoding:
    """Return the encoding with an empty answer if `tokens` select tokens of the answer, otherwise unchanged."""
    from activation_store.tracing.continuation import choose_continuation

    if not choose_continuation(tokens, 0):
        return encoding
    return replace(encoding, tokens=replace(encoding.tokens, generated=()))


def spread(data: ConceptDataset, count: int) -> list[Example]:
    """Return `count` evenly spaced examples, because lengths and images may change along the data."""
    return [data.examples[i * len(data) // count] for i in range(count)]
