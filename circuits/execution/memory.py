"""How many patches fit into one batch within a memory budget."""

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
"""Default largest number of bytes for the patches of one batch."""


def rows_within(model: Lvlm, run: Recording, start: int, examples: int, memory: int, most: int | None = None) -> int:
    """Return how many rows fit into a memory budget, with `examples` copies of each row.

    Raises
    ------
    PatchError
        If not even one row fits; the message states how much one row needs.
    """
    positions = run.logits.shape[1]
    fixed, each = SCORES, examples * row_bytes(model, run.length - start, run.length, positions)
    row_limit = memory if most is None else most
    # The block of scores has at least the size of one row.
    fixed = min(2 * fixed, each)
    if fixed + each > memory:
        msg = (
            f"memory={memory:,} is too small: one patch of {run.length - start} of {run.length} positions"
            f"{f' of {examples} examples' if examples > 1 else ''} needs {fixed + each:,} bytes in addition to the "
            "model and the recorded runs; pass at least that, or patch fewer positions"
        )
        raise PatchError(msg)
    return max(1, min((memory - fixed) // each, row_limit))


def row_bytes(model: Lvlm, size: int, length: int, positions: int = 1) -> int:
    """Estimate the peak number of bytes of one row of `size` positions, in a layer and at its logits."""
    width, attended, inner, vocabulary = _widths(model)
    item = model.dtype.itemsize
    # Residual stream before and after, its norm and the update; plus the larger of attention's and the MLP's tensors.
    attention = 8 * attended * item + attended * 8
    scores = 8 * model.n_heads * length
    layer = size * (6 * width * item + max(attention + scores, 4 * inner * item))
    return layer + positions * vocabulary * (item + 8)


def kept_bytes(model: Lvlm, size: int, length: int) -> int:
    """Estimate the number of bytes of the two recorded runs of one pair with `size` patchable positions."""
    width, attended, _, _ = _widths(model)
    return model.n_layers * model.dtype.itemsize * (2 * length * attended + size * (width + attended))


def batch_rows(
    model: Lvlm, examples: Sequence[Example], most: int, memory: int = MEMORY, *, recorded: bool = False
) -> int:
    """Return the batch size of a step without a user-selected batch size.

    Parameters
    ----------
    model, examples
        The model and its inputs; the first example represents all.
    most
        Largest batch size.
    memory
        Approximate largest number of bytes of a batch.
    recorded
        Whether the forward pass is recorded (`circuits.execution.prefix_cache.record`).
    """
    if not examples:
        return most
    encoding = model.encode(examples[0])
    length = max(encoding.tokens.length, encoding.inputs["input_ids"].shape[1])
    each = row_bytes(model, length, length) if not recorded else kept_bytes(model, 1, length)
    return max(1, min(most, memory // each))


def _widths(model: Lvlm) -> tuple[int, int, int, int]:
    """Return the widths of the residual stream, all heads, the widest linear layer, and the vocabulary."""
    inner = max(
        m.out_features for layer in model.layers("decoder") for m in layer.modules() if isinstance(m, nn.Linear)
    )
    unembedding: Any = resolve(model.hf, model.spec.unembedding, model.spec)
    return model.width, model.n_heads * model.head_dim, inner, int(unembedding.weight.shape[0])
