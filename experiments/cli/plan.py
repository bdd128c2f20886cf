"""``groundscope plan …``: estimate bytes, forward passes and hours of a trace, in a minute or less.

Sizes come from the configuration of the model, its processor and the data, without reading weights. If the weights are on this
machine, some examples are traced for a bounded time and hours are extrapolated; a forward pass that takes longer is stopped
between two layers. Without weights, a model of the same width with two layers and random weights runs, and the times of its
layers are multiplied. For a GPU that this machine does not have, hours are operations divided by a stated speed, which is not
checked. Hours are for this machine; bytes and forward passes are for any.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from concepts.schema import ConceptDataset, Example
from experiments.run.context import Context
from experiments.stages.trace import traced_examples, traced_sites, traced_tokens
from groundscope.core.errors import ConfigError
from groundscope.core.text import format_count

if TYPE_CHECKING:
    from activation_store.tracing.plan import Plan
    from lvlm.model import Encoding, Lvlm

SECONDS = 30.0
"""Default time to measure, in seconds; with the time to load the model about a minute."""
MOST_SECONDS = 60.0
"""Longest time to measure, in seconds."""
TFLOPS = 100.0
"""Default speed of a GPU that this machine does not have, in 10^12 operations per second: a third of an A100's peak."""
THIN_BYTES = 6 << 30
"""Largest size of the weights of a model with two layers."""
_SAMPLE = 64
"""Examples whose tokens and table rows give the sizes."""
_ENCODING_SECONDS = 10.0
"""Longest time to encode examples for the count of forward passes, in seconds."""
_SHARD = 512
"""Examples per file of a store, the default of `activation_store.trace`."""
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


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
    first = _planned(outline.encode(data.examples[0]), tokens)
    plan = outline_plan(outline, first, traced_sites(options), tokens, options.dtype)
    encodings = [_planned(outline.encode(e), tokens) for e in _spread(data, min(len(data), _SAMPLE))]
    sites = _array_bytes(plan, encodings, count)
    arrays = {a.name: 1.0 if a.ragged else _stored_rows(count) / count for a in plan.schema.arrays}
    on_disk = sum(size * arrays[name] for name, size in sites.items())
    on_disk += _table_bytes(outline, data, plan, encodings, count)
    on_disk += _own_bytes(outline, plan) if options.unembedding else 0
    each, images = _forwards_of_each(outline, data, plan, first, options.batch_size)
    forwards, described = math.ceil(each * count), context.config.model
    operations = _operations(outline, encodings, images) * count / 1e12
    known = {"weights": weight_bytes(outline), "tera_operations": operations}
    seconds = min(seconds, MOST_SECONDS)
    there = described.device == "auto" or described.device in devices() or described.device == "cpu:0"
    if not there:
        return Estimate(count, 0, sites, on_disk, forwards, operations / tflops, 0.0, **known, method="operations")
    if has_weights(described.path, revision=described.revision, cache_dir=described.cache_dir):
        start = time.perf_counter()
        model = context.model
        loading = time.perf_counter() - start
        measured, time_of_each = _measure(context, model, data, tokens, seconds)
        return Estimate(count, measured, sites, on_disk, forwards, time_of_each * count, loading, **known)
    thin = _thin(outline, described.device)
    if thin is None:
        return Estimate(count, 0, sites, on_disk, forwards, None, None, **known)
    measured, time_of_each = _measure_thin(thin, outline, encodings, images, seconds)
    whole = time_of_each * (count + 1)  # a trace begins with a forward pass of one example
    return Estimate(count, measured, sites, on_disk, forwards, whole, 0.0, **known, method="thin")


def _operations(outline: Lvlm, encodings: Sequence[Encoding], images: float) -> float:
    """Return the floating-point operations of an example, with `images` runs of the vision tower per example."""
    from lvlm.thin_model import count_flops

    parts = np.array([count_flops(outline, e) for e in encodings])
    return float(parts[:, 0].mean() * images + parts[:, 1].mean())


def _thin(outline: Lvlm, device: str) -> Lvlm | None:
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


def _measure_thin(
    thin: Lvlm, outline: Lvlm, encodings: Sequence[Encoding], images: float, seconds: float
) -> tuple[int, float]:
    """Return the number of forward passes and the seconds per example of the full model.

    A pass takes the time of its layers and a rest. The layers' times are multiplied by the ratio of their numbers in the full
    and the thin model; the vision tower runs `images` times per example.
    """
    took: list[float] = []
    start = time.perf_counter()
    while not took or time.perf_counter() - start + 1.2 * took[-1] < seconds:
        encoding = encodings[len(took) % len(encodings)]
        spent, parts = _timed_forward(thin, encoding)
        full = spent - parts["decoder"] - parts["vision"]
        full += parts["decoder"] * outline.n_layers / max(1, thin.n_layers)
        full += images * parts["vision"] * outline.n_vision_layers / max(1, thin.n_vision_layers)
        took.append(full)
        if len(took) == len(encodings):
            break
    # The first pass also allocates memory and starts threads.
    return len(took), float(np.median(took[1:] or took))


def _timed_forward(model: Lvlm, encoding: Encoding) -> tuple[float, dict[str, float]]:
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


def _planned(encoding: Encoding, tokens: Sequence[str]) -> Encoding:
    """Return an encoding with an empty answer if tokens of the answer are traced too."""
    from activation_store.tracing.continuation import choose_continuation

    if not choose_continuation(tokens, 0):
        return encoding
    return replace(encoding, tokens=replace(encoding.tokens, generated=()))


def _spread(data: ConceptDataset, count: int) -> list[Example]:
    """Return `count` evenly spaced examples, because lengths and images may change along the data."""
    return [data.examples[i * len(data) // count] for i in range(count)]


def _array_bytes(plan: Plan, encodings: Sequence[Encoding], examples: int) -> dict[str, float]:
    """Return the bytes of each array for `examples` examples that are like the encoded ones."""
    from lvlm.token_selection import TokenSelection

    sizes = {}
    for array in plan.schema.arrays:
        tokens = 1.0
        if array.ragged:
            selection, stack = TokenSelection.parse(array.tokens), array.stack
            tokens = float(np.mean([len(e.tokens.positions(selection, stack)) for e in encodings]))  # type: ignore[arg-type]
        sizes[array.name] = examples * tokens * array.n_layers * array.width * _BYTES[plan.schema.dtype]
    return sizes


def _stored_rows(examples: int) -> int:
    """Return the rows on disk of an array with one vector per example: whole chunks, in a shard of several chunks."""
    from activation_store.format.schema import CHUNK_ROWS

    last = examples % _SHARD
    return examples - last + (last if last <= CHUNK_ROWS else -(-last // CHUNK_ROWS) * CHUNK_ROWS)


def _own_bytes(model: Lvlm, plan: Plan) -> float:
    """Return the bytes of final norm and unembedding, which are stored once."""
    from activation_store.tracing.provenance import read_unembedding

    arrays = read_unembedding(model, plan) or {}
    return float(sum(rows.nbytes for rows in arrays.values()))


def _table_bytes(model: Lvlm, data: ConceptDataset, plan: Plan, encodings: Sequence[Encoding], examples: int) -> float:
    """Return the bytes of tables, indexes and digests, measured on small stores with the same rows and arrays of width 1."""
    concepts = tuple(sorted({concept for example in data for concept in example.labels}))
    few = max(1, len(encodings) // 4)
    with tempfile.TemporaryDirectory() as folder:
        small, large = (
            _narrow_store(model, plan, encodings[:n], concepts, Path(folder) / str(n)) for n in (few, len(encodings))
        )
    if len(encodings) == few:
        return large * examples / few
    each = (large - small) / (len(encodings) - few)
    shards = math.ceil(examples / _SHARD)
    return examples * each + shards * max(0.0, large - len(encodings) * each)


def _narrow_store(
    model: Lvlm, plan: Plan, encodings: Sequence[Encoding], concepts: tuple[str, ...], folder: Path
) -> float:
    """Write a store with arrays of one layer and one column; return its bytes without these columns."""
    import torch

    from activation_store.format.ragged import Ragged
    from activation_store.format.schema import Schema
    from activation_store.tracing.example_table import build_row, build_spans
    from activation_store.writing.writer import StoreWriter
    from lvlm.family.specification import resolve

    arrays = tuple(replace(a, n_layers=1, width=1, n_heads=None, layers=(0,)) for a in plan.schema.arrays)
    count = len(encodings)
    nothing = np.zeros((count, 1, 1), np.float32)
    values: dict[Any, Any] = {a.key: Ragged(nothing, np.arange(count + 1)) if a.ragged else nothing for a in arrays}
    unembedding: Any = resolve(model.hf, model.spec.unembedding or "", model.spec)
    logits = torch.zeros(int(unembedding.weight.shape[0]))
    roles = [role for role in plan.roles if role not in {"generated", "answer"}]
    rows = [
        {**build_row(model, e, logits, concepts), **build_spans(e.tokens, roles), "image": "0" * 64} for e in encodings
    ]
    with StoreWriter(folder, Schema(arrays, plan.schema.dtype), {}) as writer:
        writer.append(values, {name: [one[name] for one in rows] for name in rows[0]})
    written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return float(written - count * len(arrays) * _BYTES[plan.schema.dtype])


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


def _measure(
    context: Context, model: Lvlm, data: ConceptDataset, tokens: Sequence[str], seconds: float
) -> tuple[int, float]:
    """Return the number of traced examples and the seconds per example."""
    from activation_store.tracing.continuation import choose_continuation
    from activation_store.tracing.plan import make_plan
    from activation_store.tracing.tracer import Tracer

    options = context.config.trace
    measuring_start = time.perf_counter()
    first = _planned(model.encode(data.examples[0]), tokens)
    one = _one_forward(model, first, seconds / 2)
    # The plan needs a forward pass too, and a first chunk and a longer one must fit.
    if 8 * one > seconds:
        return 1, one
    plan = make_plan(model, first, traced_sites(options), tokens, options.dtype)
    tracer = Tracer.begin(
        model, data, plan, options.batch_size, answers=True, continuation=choose_continuation(tokens, 0)
    )
    some = max(1, min(len(data), options.batch_size, int(seconds / (8 * one))))
    while True:
        start = time.perf_counter()
        tracer.chunk(_spread(data, some), lambda _: None)
        took = time.perf_counter() - start
        # Longer runs reduce the share of one-time costs; the last run counts.
        if some == len(data) or time.perf_counter() - measuring_start + 2 * took > seconds:
            return some, took / some
        some = min(len(data), 2 * some)


class _StopForward(Exception):  # control flow, not an error
    """Stops a forward pass that has run for long enough."""


def _one_forward(model: Lvlm, encoding: Encoding, seconds: float) -> float:
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


def show(arguments: Sequence[str]) -> int:
    """Print the estimate for a trace with these options.

    Raises
    ------
    ConfigError
        For invalid options, as for a run.
    """
    from rich.table import Table
    from rich.text import Text

    from experiments.cli.overrides import compose, read
    from experiments.run.folder import RunFolder
    from experiments.terminal_text import plain_console, size
    from experiments.validation import check

    numbers = {
        w.partition("=")[0]: w.partition("=")[2]
        for w in arguments
        if w.startswith(("examples=", "seconds=", "tflops="))
    }
    words = [w for w in arguments if w.partition("=")[0] not in numbers]
    try:
        examples = int(numbers["examples"]) if "examples" in numbers else None
        seconds = float(numbers.get("seconds", SECONDS))
        tflops = float(numbers.get("tflops", TFLOPS))
    except ValueError as error:
        msg = f"groundscope plan: {error}; write examples=100000, seconds=30 or tflops=100"
        raise ConfigError(msg) from error
    if (examples is not None and examples < 1) or not seconds > 0 or not tflops > 0:
        msg = "groundscope plan: examples, seconds and tflops must be above 0"
        raise ConfigError(msg)
    config, _ = compose(read(words).first())
    check(config)
    config.model.validate = False  # the estimate needs no verification of the model
    console = plain_console()
    with tempfile.TemporaryDirectory() as folder:
        context = Context(config, RunFolder(Path(folder)), console)
        with console.status("measuring") if console.is_terminal else nullcontext():
            result = estimate(context, examples, seconds, tflops)
    how = {
        "measured": f"measured on {result.measured}",
        "thin": f"measured on {result.measured} with two layers of random weights",
        "operations": "operations counted, not measured",
    }
    measured = how[result.method] if result.seconds is not None else "sizes from the configuration only"
    console.print(
        f"model {config.model.path} on {config.model.device}, {size(result.weights)} of weights, "
        f"{format_count(result.examples, 'example')} to trace; {measured}",
        markup=False,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("array")
    table.add_column("bytes", justify="right")
    for name, count in result.sites.items():
        table.add_row(Text(name), size(count))
    table.add_row("total on disk", size(result.on_disk))
    console.print(table)
    if result.seconds is None or result.loading is None:
        console.print(
            f"{result.forwards} forward passes; hours are not estimated, because the weights of {config.model.path} are not "
            "on this machine, and a model of its width with two layers cannot be built or takes too much memory",
            markup=False,
        )
        return 0
    each = result.seconds / result.examples
    operations = f"{result.tera_operations:.3g} x 10^12 operations"
    passes = f"{result.forwards} forward passes, {operations}, {1000 * each:.1f} ms per example"
    loading = f", {result.loading:.0f} s to load the model" if result.method == "measured" else ""
    console.print(f"{passes}{loading}", markup=False)
    for parts in sorted({1, 4, config.trace.shards}):
        label = "one process" if parts == 1 else f"{parts} processes, trace.shards={parts}"
        console.print(f"{label}: {result.hours(parts):.2f} hours" + ("" if parts == 1 else " each"))
    console.print(_basis(result.method, config.model.device, tflops), markup=False)
    return 0


def _basis(method: str, device: str, tflops: float) -> str:
    """Return what the hours rest on."""
    if method == "operations":
        return (
            f"not checked: this machine has no device '{device}', so hours are operations (two per weight and token, and "
            f"attention) at {tflops:g} x 10^12 per second, without loading and writing; set tflops= to the speed of your GPU"
        )
    without = "; without the time to load the model and to write" if method == "thin" else ""
    return f"hours are for this machine; several processes need as many equal machines{without}"
