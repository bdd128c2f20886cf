"""Record questions that continue shared prefixes, so that changes at their last tokens resume from the recording."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from circuits.execution.prefix_attention import NotShared
from circuits.execution.prefix_cache import Recording, cache_argument, layer_mask, named_arguments
from lvlm.decoding.prefix_run import PrefixBatch
from lvlm.model import Lvlm


@torch.no_grad()
def record_tails(model: Lvlm, batch: PrefixBatch) -> Recording:
    """Run the tails of a batch once without changes, and record what changes at the last token need.

    All prompts of the batch end in the same column, so one position is the last token of every row. The prefixes run at most
    once, for this and any other use of the batch.

    Raises
    ------
    NotShared
        If the model calls its layers with unknown arguments.
    """
    inputs = batch.inputs_after()
    cache: Any = inputs["past_key_values"]
    layers = range(model.n_layers)
    residual: dict[int, Tensor] = {}
    calls: dict[int, dict[str, Any]] = {}
    with ExitStack() as hooks:
        for layer in layers:

            def called(module: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                calls[layer] = named_arguments(module, args, kwargs)

            def entered(x: Tensor, layer: int = layer) -> None:
                residual[layer] = x[:, -1:].clone()

            place = model.place("decoder", layer, "resid_pre")
            hooks.callback(place.module.register_forward_pre_hook(called, with_kwargs=True).remove)
            hooks.callback(place.watch(entered).remove)
        logits = batch.run_tails(inputs)
    if len(calls) != model.n_layers:
        msg = "its forward pass does not call its layers"
        raise NotShared(msg)
    keys, values = zip(*(cache.layers[i].of_rows() for i in layers), strict=True)
    return Recording(
        batch.width + batch.tail - 1,
        batch.width + batch.tail,
        logits,
        {},
        tuple(residual[i] for i in layers),
        keys,
        values,
        tuple(layer_mask(model, i, calls[i]) for i in layers),
        tuple({n: v for n, v in calls[i].items() if v is not cache} | cache_argument(calls[i], cache) for i in layers),
        frozenset(),
        (),
        batch.width,
    )
