"""How many patches run side by side within a budget of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from circuits.execution.prefix_attention import SCORES
from circuits.execution.prefix_cache import Recording
from concepts.schema import Example
from groundscope.core.errors import PatchError
from lvlm.family.specification import resolve
from lvlm.model import Lvlm

MEMORY = 2**30
"""Bytes that patches running side by side may take where nothing else is said."""


def rows_within(model: Lvlm, run: Recording, start: int, examples: int, memory: int, most: int | None = None) -> int:
    """Return how many rows a budget has room for, each as often as there are examples.

    Raises
    ------
    PatchError
        Where there is not room for one; it says how much one needs.
    """
    kept = run.logits.shape[1]
    fixed, each = SCORES, examples * row_bytes(model, run.length - start, run.length, kept)
    most_wanted = memory if most is None else most
    # The block of scores is at least that of one row, however small it is meant to be.
    fixed = min(2 * fixed, each)
    if fixed + each > memory:
        msg = (
            f"memory={memory:,}: one patch of {run.length - start} of {run.length} positions"
            f"{f' of {examples} examples' if examples > 1 else ''} needs {fixed + each:,} bytes beside the model and the "
            "recorded runs; give at least that, or patch fewer positions"
        )
        raise PatchError(msg)
    return max(1, min((memory - fixed) // each, most_wanted))


def row_bytes(model: Lvlm, size: int, length: int, kept: int = 1) -> int:
    """Return about the most bytes that one row of `size` positions takes on its way through a layer and to its logits."""
    width, attended, inner, vocabulary = _widths(model)
    item = model.dtype.itemsize
    # The residual stream before and after, its norm, and what is added; then attention's or the MLP's own tensors.
    attention = 8 * attended * item + attended * 8
    scores = 8 * model.n_heads * length
    layer = size * (6 * width * item + max(attention + scores, 4 * inner * item))
    return layer + kept * vocabulary * (item + 8)


def kept_bytes(model: Lvlm, size: int, length: int) -> int:
    """Return about how many bytes the two recorded runs of one pair take, of which `size` positions may be patched."""
    width, attended, _, _ = _widths(model)
    return model.n_layers * model.dtype.itemsize * (2 * length * attended + size * (width + attended))


def batch_rows(
    model: Lvlm, examples: Sequence[Example], most: int, memory: int = MEMORY, *, recorded: bool = False
) -> int:
    """Return how many examples a forward of a step whose batch size no user chooses takes side by side.

    Parameters
    ----------
    model, examples
        What runs; the first example stands for all.
    most
        As many as are wanted where memory is no matter.
    memory
        Bytes that a batch may take, about.
    recorded
        Whether the forward is kept, to be resumed with changes (`circuits.execution.prefix_cache.record`).
    """
    if not examples:
        return most
    encoding = model.encode(examples[0])
    length = max(encoding.tokens.length, encoding.inputs["input_ids"].shape[1])
    each = row_bytes(model, length, length) if not recorded else kept_bytes(model, 1, length)
    return max(1, min(most, memory // each))


def _widths(model: Lvlm) -> tuple[int, int, int, int]:
    """Return the widths of the residual stream, of all heads, of the widest map within a layer, and the vocabulary."""
    inner = max(
        m.out_features for layer in model.layers("decoder") for m in layer.modules() if isinstance(m, nn.Linear)
    )
    unembedding: Any = resolve(model.hf, model.spec.unembedding, model.spec)
    return model.width, model.n_heads * model.head_dim, inner, int(unembedding.weight.shape[0])
