"""Run the same questions under many conditions, computing their shared prefix once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from circuits.execution.memory import MEMORY, kept_bytes
from circuits.execution.prefix_attention import NotShared
from circuits.execution.prefix_cache import record
from circuits.execution.suffix_runner import resume
from circuits.interventions.intervention import Intervention, intervened, placed
from lvlm.model import Batch, Lvlm

Condition = Sequence[Intervention]
"""Changes of one run; empty for the unchanged model. `SteeringVector.interventions` returns one."""
_AT_LAST = ("z", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_LOG = logging.getLogger(__name__)


def logits_under(
    model: Lvlm, conditions: Sequence[Condition], *, memory: int = MEMORY
) -> Callable[[Batch], list[Tensor]]:
    """Return a function from a batch to its logits at the last position under each condition, ``[B, V]`` each.

    A change of the decoder at the last token does not affect earlier positions. So the batch is run once without changes,
    and each such condition resumes it for the last token, from the first layer that it changes; any other condition takes
    a full forward pass. Each resumed batch includes an unchanged row as a check; if a model's layers cannot be resumed,
    every condition takes a full forward pass, and the logger ``circuits.execution.conditions`` emits a WARNING. Both ways
    give the same results up to the order of floating-point sums.

    Parameters
    ----------
    model
        The model.
    conditions
        Changes of each run.
    memory
        Largest number of bytes for the conditions of one batch.

    Raises
    ------
    SiteError, PatchError
        As `intervened`, when a batch is run.
    """
    late = [i for i, condition in enumerate(conditions) if condition and all(map(_at_last, condition))]
    plain = [i for i, condition in enumerate(conditions) if not condition]
    possible = bool(late)

    def run(batch: Batch) -> list[Tensor]:
        nonlocal possible
        results: dict[int, Tensor] = {}
        if possible:
            try:
                results = _shared(model, batch, {i: conditions[i] for i in late}, plain, memory)
            except NotShared as why:
                possible = False
                _LOG.warning("%s: every condition runs as a full forward pass, because %s", model.name, why)
        for i, condition in enumerate(conditions):
            if i not in results:
                with intervened(model, condition):
                    results[i] = model.logits(batch.inputs)
        return [results[i] for i in range(len(conditions))]

    return run


def _at_last(item: Intervention) -> bool:
    """Whether a change applies to the decoder at the last token only."""
    here = item.site.stack == "decoder" and not item.site.cross and item.site.component in _AT_LAST
    return here and item.positions == "last" and item.rows is None and item.gate is None


def _shared(
    model: Lvlm, batch: Batch, late: dict[int, Condition], plain: Sequence[int], memory: int
) -> dict[int, Tensor]:
    """Return the logits of the unchanged model, and of conditions at the last token, by index of the condition."""
    rows_within = max(1, memory // kept_bytes(model, 1, batch.encodings[0].tokens.length))
    if len(batch.encodings) > rows_within:  # a recording has keys and values of every layer and token
        parts: dict[int, list[Tensor]] = {}
        for k in range(0, len(batch.encodings), rows_within):
            encodings = batch.encodings[k : k + rows_within]
            part = Batch(batch.index[k : k + rows_within], encodings, model.collate(encodings))
            for number, logits in _shared(model, part, late, plain, memory).items():
                parts.setdefault(number, []).append(logits)
        return {number: torch.cat(logits) for number, logits in parts.items()}
    last = batch.encodings[0].tokens.last
    recording = record(model, batch.inputs, last)
    rows = [tuple(replace(placed(model, item), positions=(last,)) for item in condition) for condition in late.values()]
    resumed_logits = resume(
        model, recording, rows, lambda logits: logits[:, :, -1], memory=memory, check=True
    )  # [B, rows, V]
    resumed = {number: resumed_logits[:, k] for k, number in enumerate(late)}
    return {**resumed, **dict.fromkeys(plain, recording.logits[:, -1])}
