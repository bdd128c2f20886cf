"""The same questions under many corrections: what they share is run once."""

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
"""What is changed in a run; nothing for the model as it is. `SteeringVector.interventions` gives one."""
_AT_LAST = ("z", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_LOG = logging.getLogger(__name__)


def logits_under(
    model: Lvlm, conditions: Sequence[Condition], *, memory: int = MEMORY
) -> Callable[[Batch], list[Tensor]]:
    """Return what gives a batch's logits at the last position under each condition, ``[B, V]`` each.

    A change of the decoder at the last token leaves everything before it as it is. So the batch is run once as it is, and
    each such condition resumes it, for the last token alone, from the first layer that it changes; whatever else a
    condition is costs a forward of its own. Each batch is run unchanged beside its conditions and compared; where a model's
    layers cannot be resumed, every condition is a whole forward, and a record of level WARNING of the logger
    ``circuits.execution.conditions`` says so. Results are the same up to the order of floating-point sums.

    Parameters
    ----------
    model
        The model.
    conditions
        What is changed, one run each.
    memory
        Bytes that conditions running side by side may take.

    Raises
    ------
    SiteError, PatchError
        As `intervened` does, when a batch is run.
    """
    late = [i for i, condition in enumerate(conditions) if condition and all(map(_at_last, condition))]
    plain = [i for i, condition in enumerate(conditions) if not condition]
    possible = bool(late)

    def run(batch: Batch) -> list[Tensor]:
        nonlocal possible
        found: dict[int, Tensor] = {}
        if possible:
            try:
                found = _shared(model, batch, {i: conditions[i] for i in late}, plain, memory)
            except NotShared as why:
                possible = False
                _LOG.warning("%s: every condition runs as a whole forward, because %s", model.name, why)
        for i, condition in enumerate(conditions):
            if i not in found:
                with intervened(model, condition):
                    found[i] = model.logits(batch.inputs)
        return [found[i] for i in range(len(conditions))]

    return run


def _at_last(item: Intervention) -> bool:
    """Whether a change is one of the decoder at the last token, whatever the others are."""
    here = item.site.stack == "decoder" and not item.site.cross and item.site.component in _AT_LAST
    return here and item.positions == "last" and item.rows is None and item.gate is None


def _shared(
    model: Lvlm, batch: Batch, late: dict[int, Condition], plain: Sequence[int], memory: int
) -> dict[int, Tensor]:
    """Return the logits of the model as it is, and of conditions at the last token, by their numbers."""
    rows_within = max(1, memory // kept_bytes(model, 1, batch.encodings[0].tokens.length))
    if len(batch.encodings) > rows_within:  # what is recorded is keys and values of every layer and token
        found: dict[int, list[Tensor]] = {}
        for k in range(0, len(batch.encodings), rows_within):
            encodings = batch.encodings[k : k + rows_within]
            part = Batch(batch.index[k : k + rows_within], encodings, model.collate(encodings))
            for number, logits in _shared(model, part, late, plain, memory).items():
                found.setdefault(number, []).append(logits)
        return {number: torch.cat(some) for number, some in found.items()}
    last = batch.encodings[0].tokens.last
    recording = record(model, batch.inputs, last)
    rows = [tuple(replace(placed(model, item), positions=(last,)) for item in condition) for condition in late.values()]
    seen = resume(model, recording, rows, lambda logits: logits[:, :, -1], memory=memory, check=True)  # [B, rows, V]
    resumed = {number: seen[:, k] for k, number in enumerate(late)}
    return {**resumed, **dict.fromkeys(plain, recording.logits[:, -1])}
