"""Fallback: run each patch as a full forward pass, several patches per batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from circuits.execution.memory import row_bytes
from circuits.execution.prefix_cache import See, crosses
from circuits.execution.suffix_runner import Reader, Row
from circuits.interventions.intervention import intervened
from groundscope.core.errors import PatchError
from lvlm.model import Lvlm


@torch.no_grad()
def run_whole(
    model: Lvlm,
    inputs: Mapping[str, Tensor],
    rows: Sequence[Row],
    read: Reader,
    *,
    keep: int = 1,
    memory: int,
    most: int | None = None,
    see: See | None = None,
) -> Tensor:
    """Run each row of changes as full forward passes and return what `read` computes from the logits, ``[P, rows, …]``.

    Parameters
    ----------
    model
        Any model.
    inputs
        Inputs of P examples of equal shape.
    rows
        Changes; one run per row.
    read
        Function of the logits ``[P, n, keep, V]`` of n rows.
    keep
        Number of last positions with logits.
    memory
        Largest number of bytes for the rows of one batch.
    most
        Largest number of rows per batch; None for no limit but memory.
    see
        Called with each layer's head outputs, at all positions.

    Raises
    ------
    PatchError
        If `memory` is too small for one row.
    """
    ids = inputs["decoder_input_ids" if model.encoder_decoder else "input_ids"]
    examples, length = ids.shape
    each = examples * row_bytes(model, length, length, keep)
    if each > memory:
        msg = (
            f"memory={memory:,}: is too small: one patch of {length} positions needs {each:,} bytes; pass at least that"
        )
        raise PatchError(msg)
    size = max(1, min(memory // each, len(rows) if most is None else most))
    outputs = []
    for k in range(0, len(rows), size):
        part = rows[k : k + size]
        many = {name: torch.cat([x] * len(part)) for name, x in inputs.items()}
        items = [
            replace(item, rows=tuple(range(number * examples, (number + 1) * examples)))
            for number, row in enumerate(part)
            for item in row
        ]
        with ExitStack() as stack:
            stack.enter_context(intervened(model, items))
            if see is not None:
                numbers = tuple(range(k, k + len(part)))
                for layer in range(model.n_layers):

                    def look(x: Tensor, layer: int = layer, numbers: tuple[int, ...] = numbers) -> None:
                        see(layer, numbers, x.unflatten(0, (len(numbers), examples)).transpose(0, 1))

                    place = model.place("decoder", layer, "z", cross=crosses(model, layer))
                    stack.callback(place.watch(look).remove)
            logits = model.forward(many, keep=keep)
        outputs.append(read(logits.unflatten(0, (len(part), examples)).transpose(0, 1)))
    return torch.cat(outputs, dim=1)
