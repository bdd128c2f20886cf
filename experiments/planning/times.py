"""Seconds of a forward pass and of a trace, measured in a bounded time, with the weights or with two layers of the same width."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from concepts.schema import ConceptDataset
from experiments.config import TraceConfig
from experiments.planning.measured_examples import encode_planned, spread
from experiments.stages.trace import traced_reductions, traced_sites

if TYPE_CHECKING:
    from lvlm.model import Encoding, Lvlm

THIN_BYTES = 6 << 30
"""Largest size of the weights of a model with two layers."""


def measure_trace(
    options: TraceConfig, model: Lvlm, data: ConceptDataset, tokens: Sequence[str], seconds: float
) -> tuple[int, float]:
    """Return the number of traced examples and the seconds per example."""
    from activation_store.tracing.continuation import choose_continuation
    from activation_store.tracing.plan import make_plan
    from activation_store.tracing.tracer import Tracer

    measuring_start = time.perf_counter()
    first = encode_planned(model.encode(data.examples[0]), tokens)
    forward_seconds = time_one_forward(model, first, seconds / 2)
    # The plan needs a forward pass too, and a first chunk and a longer one must fit.
    if 8 * forward_seconds > seconds:
        return 1, forward_seconds
    reduce = traced_reductions(options)
    plan = make_plan(model, first, traced_sites(options), tokens, options.dtype, options.heads, reduce)
    tracer = Tracer.begin(
        model, data, plan, options.batch_size, answers=True, continuation=choose_continuation(tokens, 0)
    )
    count = max(1, min(len(data), options.batch_size, int(seconds / (8 * forward_seconds))))
    while True:
        start = time.perf_counter()
        tracer.chunk(spread(data, count), lambda _: None)
        took = time.perf_counter() - start
        # Longer runs reduce the share of one-time costs; the last run counts.
        if count == len(data) or time.perf_counter() - measuring_start + 2 * took > seconds:
            return count, took / count
        count = min(len(data), 2 * count)


class _StopForward(Exception):  # control flow, not an error
    """Stops a forward pass that has run for long enough."""


def time_one_forward(model: Lvlm, encoding: Encoding, seconds: float) -> float:
    """Return the seconds of a forward pass of one example; stop it between two decoder layers after `seconds`.

    For a stopped pass the time of the remaining layers is the mean of the layers that ran.
    """
    from lvlm.active_interventions import mark_observer

    times: list[float] = []

    @mark_observer
    def layer(*_: object) -> None:
        times.append(time.perf_counter())
        if len(times) > 1 and times[-1] - start > seconds:
            raise _StopForward

    with ExitStack() as hooks:
        for module in model.layers("decoder"):
            hooks.callback(module.register_forward_pre_hook(layer).remove)
        start = time.perf_counter()
        try:
            model.logits(model.collate([encoding]))
        except _StopForward:
            each = (times[-1] - times[0]) / (len(times) - 1)
            return times[0] - start + each * model.n_layers
    return time.perf_counter() - start


def build_thin(outline: Lvlm, device: str) -> Lvlm | None:
    """Return a model of the same width with two layers; None if the family cannot be built so, or it is too large."""
    from groundscope.core.errors import ModelError
    from lvlm.thin_model import LAYERS, thin_model, weight_bytes

    layers = [layer for stack in ("decoder", "vision") for layer in outline.layers(stack)[LAYERS:]]
    left_out = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
    if weight_bytes(outline) - left_out > THIN_BYTES:
        return None
    try:
        return thin_model(outline, device="cpu" if device == "auto" else device)
    except ModelError:
        return None


def measure_thin(
    thin: Lvlm, outline: Lvlm, encodings: Sequence[Encoding], images: float, seconds: float
) -> tuple[int, float]:
    """Return the number of forward passes and the seconds per example of the full model.

    A pass takes the time of its layers and of the other modules. The layers' times are multiplied by the ratio of their numbers
    in the full and the thin model; the vision tower runs `images` times per example.
    """
    took: list[float] = []
    start = time.perf_counter()
    while not took or time.perf_counter() - start + 1.2 * took[-1] < seconds:
        encoding = encodings[len(took) % len(encodings)]
        spent, parts = time_layers(thin, encoding)
        full = spent - parts["decoder"] - parts["vision"]
        full += parts["decoder"] * outline.n_layers / max(1, thin.n_layers)
        full += images * parts["vision"] * outline.n_vision_layers / max(1, thin.n_vision_layers)
        took.append(full)
        if len(took) == len(encodings):
            break
    # The first pass also allocates memory and starts threads.
    return len(took), float(np.median(took[1:] or took))


def time_layers(model: Lvlm, encoding: Encoding) -> tuple[float, dict[str, float]]:
    """Return the seconds of a forward pass, and those within the layers of each stack."""
    from lvlm.active_interventions import mark_observer

    spent, begin = {"decoder": 0.0, "vision": 0.0}, [0.0]

    @mark_observer
    def before(*_: object) -> None:
        begin[0] = time.perf_counter()

    with ExitStack() as hooks:
        for stack in spent:

            @mark_observer
            def after(*_: object, stack: str = stack) -> None:
                spent[stack] += time.perf_counter() - begin[0]

            for module in model.layers(stack):
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        start = time.perf_counter()
        model.logits(model.collate([encoding]))
        return time.perf_counter() - start, spent
