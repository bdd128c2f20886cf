"""What the rows of activations have seen: image and text together, or one of them alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

RowInput = Literal["both", "text", "image"]
"""``both``: an image and the text about it. ``text``: the text without its image. ``image``: the image without the text."""
INPUTS: tuple[RowInput, ...] = get_args(RowInput)


class WithProvenance(Protocol):
    """Anything with a provenance, such as a store."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Origin of the activations."""
        ...


def row_input(source: WithProvenance) -> RowInput:
    """Return what the rows of a source have seen, ``input`` of its provenance; ``both`` if it has none, as older stores.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from activation_store.row_input import row_input
    >>> table, x = {"id": ["a"], "group": ["g"]}, np.zeros((1, 1, 2))
    >>> row_input(MemorySource({"resid_post": x}, table))
    'both'
    >>> row_input(MemorySource({"resid_post": x}, table, provenance={"input": "text"}))
    'text'
    """
    recorded = source.provenance.get("input", "both")
    return recorded if recorded in INPUTS else "both"


def describe_input(name: RowInput) -> str:
    """Return what rows have seen in words."""
    return {"both": "image and text", "text": "the text alone", "image": "the image alone"}[name]
