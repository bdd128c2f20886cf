"""Estimate of bytes, forward passes and hours of a trace, in a minute or less."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from concepts.schema import ConceptDataset
from experiments.planning.measured_examples import encode_planned, spread
from experiments.planning.sizes import array_bytes, stored_rows, table_bytes, unembedding_bytes
from experiments.planning.times import build_thin, measure_thin, measure_trace
from experiments.run.context import Context
from experiments.stages.trace import traced_examples, traced_reductions, traced_sites, traced_tokens
from groundscope.core.errors import ConfigError

if TYPE_CHECKING:
    from activation_store.tracing.plan import Plan
    from lvlm.model import Encoding, Lvlm

SECONDS = 30.0
"""Default time to measure, in seconds; with the time to load the model about a minute."""
MOST_SECONDS = 60.0
"""Longest time to measure, in seconds."""
TFLOPS = 100.0
"""Default speed of a GPU that this machine does not have, in 10^12 operations per second: a third of an A100's peak."""
_SAMPLE = 64
"""Examples whose tokens and table rows give the sizes."""
_ENCODING_SECONDS = 10.0
"""Longest time to encode examples for the count of forward passes, in seconds."""


@dataclass(frozen=True)
class Estimate:
    """Estimated size and time of a trace."""

    examples: int
    measured: int
    """Examples that ran for the estimate; 0 if nothing ran."""
    sites: dict[str, float]
    """Bytes of each array for all examples."""
    on_disk: float
    """Bytes of the whole store, with tables, digests and the arrays of the model."""
    forwards: int
    seconds: float | None
    """Seconds for all examples in one process, without loading the model; None if nothing was measured."""
    loading: float | None
    """Seconds to load the model, in each process; None if nothing was measured."""
    weights: int = 0
    """Bytes of the model's weights."""
    method: str = "measured"
    """How the seconds were estimated: `measured` with the weights, `thin` with two layers of random weights, or `operations`."""
    tera_operations: float = 0.0
    """Floating-point operations of all forward passes, in 10^12."""

    def hours(self, parts: int) -> float | None:
        """Return the hours of each of `parts` processes on as many equal machines; None if nothing was measured."""
        if self.seconds is None or self.loading is None:
            return None
        return (self.seconds / parts + self.loading) / 3600


def estimate(
    context: Context, examples: int | None = None, seconds: float = SECONDS, tflops: float = TFLOPS
) -> Estimate:
    """Estimate size and time of a trace.

    Parameters
    ----------
    context
        The planned run; nothing is written into its folder.
    examples
        Number of examples; by default those of the configured data.
    seconds
        Approximate time to measure; at most `MOST_SECONDS`.
    tflops
        Speed of a GPU that this machine does not have, in 10^12 operations per second.

    Raises
    ------
    ConfigError
        If the data have no question to trace.
    """
    from activation_store.tracing.plan import outline_plan
    from lvlm.load_checks import devices
    from lvlm.loading import has_weights
    from lvlm.thin_model import weight_bytes

    data, options = traced_examples(context), context.config.trace
    if not len(data):
        msg = "the configured data have no question with candidate answers, so nothing would be traced"
        raise ConfigError(msg)
    count = len(data) if examples is None else examples
    outline, tokens = context.outline, traced_tokens(context)
    reduce = traced_reductions(options)
    planned = [*tokens, *reduce]
    first = encode_planned(outline.encode(data.examples[0]), planned)
    plan = outline_plan(outline, first, traced_sites(options), tokens, options.dtype, options.heads, reduce)
    encodings = [encode_planned(outline.encode(e), planned) for e in spread(data, min(len(data), _SAMPLE))]
    sites = array_bytes(plan, encodings, count)
    arrays = {a.name: 1.0 if a.ragged else stored_rows(count) / count for a in plan.schema.arrays}
    on_disk = sum(size * arrays[name] for name, size in sites.items())
    on_disk += table_bytes(outline, data, plan, encodings, count)
    on_disk += unembedding_bytes(outline, plan) if options.unembedding else 0
    each, images = _forwards_of_each(outline, data, plan, first, options.batch_size)
    forwards, described = math.ceil(each * count), context.config.model
    operations = _operations(outline, encodings, images) * count / 1e12
    size = {"weights": weight_bytes(outline), "tera_operations": operations}
    seconds = min(seconds, MOST_SECONDS)
    has_device = described.device == "auto" or described.device in devices() or described.device == "cpu:0"
    if not has_device:
        return Estimate(count, 0, sites, on_disk, forwards, operations / tflops, 0.0, **size, method="operations")
    if has_weights(described.path, revision=described.revision, cache_dir=described.cache_dir):
        start = time.perf_counter()
        model = context.model
        loading = time.perf_counter() - start
        measured, time_of_each = measure_trace(options, model, data, tokens, seconds)
        return Estimate(count, measured, sites, on_disk, forwards, time_of_each * count, loading, **size)
    thin = build_thin(outline, described.device)
    if thin is None:
        return Estimate(count, 0, sites, on_disk, forwards, None, None, **size)
    measured, time_of_each = measure_thin(thin, outline, encodings, images, seconds)
    whole = time_of_each * (count + 1)  # a trace begins with a forward pass of one example
    return Estimate(count, measured, sites, on_disk, forwards, whole, 0.0, **size, method="thin")


def _operations(outline: Lvlm, encodings: Sequence[Encoding], images: float) -> float:
    """Return the floating-point operations of an example, with `images` runs of the vision tower per example."""
    from lvlm.thin_model import count_flops

    parts = np.array([count_flops(outline, e) for e in encodings])
    return float(parts[:, 0].mean() * images + parts[:, 1].mean())


def _forwards_of_each(
    model: Lvlm, data: ConceptDataset, plan: Plan, first: Encoding, batch_size: int
) -> tuple[float, float]:
    """Return forward passes and runs of the vision tower per example, from as many chunks as a bounded time allows.

    Rows of a batch about one image share a run of the vision tower.
    """
    from activation_store.tracing.plan import chunk_batches

    size = chunk_batches(plan, first.tokens, batch_size) * batch_size
    start, done, forwards, images = time.perf_counter(), 0, 0, 0
    while done < len(data):
        chunk = data.examples[done : done + size]
        for batch in model.batches(chunk, batch_size):
            forwards += 1
            images += len({*batch.images})
        done += len(chunk)
        if time.perf_counter() - start > _ENCODING_SECONDS:
            break
    return forwards / done, images / done
