"""``groundscope plan …``: estimate bytes, forward passes and hours of a trace, in a minute or less.

Sizes come from the configuration of the model, its processor and the data, without reading weights. If the weights are on this
machine, some examples are traced for a bounded time and hours are extrapolated; a forward pass that takes longer is stopped
between two layers. Hours are for this machine; bytes and forward passes are for any.
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
from experiments.stages.trace import traced_examples, traced_tokens
from groundscope.core.errors import ConfigError

if TYPE_CHECKING:
    from activation_store.tracing.plan import Plan
    from lvlm.model import Encoding, Lvlm

SECONDS = 30.0
"""Default time to measure, in seconds; with the time to load the model about a minute."""
MOST_SECONDS = 60.0
"""Longest time to measure, in seconds."""
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
    """Examples that were traced for the estimate; 0 if the weights are not on this machine."""
    sites: dict[str, float]
    """Bytes of each array for all examples."""
    on_disk: float
    """Bytes of the whole store, with tables, digests and the arrays of the model."""
    forwards: int
    seconds: float | None
    """Seconds for all examples in one process, without loading the model; None if nothing was measured."""
    loading: float | None
    """Seconds to load the model, in each process; None if nothing was measured."""

    def hours(self, parts: int) -> float | None:
        """Return the hours of each of `parts` processes on as many equal machines; None if nothing was measured."""
        if self.seconds is None or self.loading is None:
            return None
        return (self.seconds / parts + self.loading) / 3600


def estimate(context: Context, examples: int | None = None, seconds: float = SECONDS) -> Estimate:
    """Estimate size and time of a trace.

    Parameters
    ----------
    context
        The planned run; nothing is written into its folder.
    examples
        Number of examples; by default those of the configured data.
    seconds
        Approximate time to measure; at most `MOST_SECONDS`.

    Raises
    ------
    ConfigError
        If the data have no question to trace.
    """
    from activation_store.tracing.plan import outline_plan
    from lvlm.loading import has_weights

    data, options = traced_examples(context), context.config.trace
    if not len(data):
        msg = "the configured data have no question with candidate answers, so nothing would be traced"
        raise ConfigError(msg)
    count = len(data) if examples is None else examples
    outline, tokens = context.outline, traced_tokens(context)
    first = _planned(outline.encode(data.examples[0]), tokens)
    plan = outline_plan(outline, first, options.sites, tokens, options.dtype)
    encodings = [_planned(outline.encode(e), tokens) for e in _spread(data, min(len(data), _SAMPLE))]
    sites = _array_bytes(plan, encodings, count)
    arrays = {a.name: 1.0 if a.ragged else _stored_rows(count) / count for a in plan.schema.arrays}
    on_disk = sum(size * arrays[name] for name, size in sites.items())
    on_disk += _table_bytes(outline, data, plan, encodings, count) + _own_bytes(outline, plan)
    forwards = math.ceil(_forwards_of_each(outline, data, plan, first, options.batch_size) * count)
    described = context.config.model
    if not has_weights(described.path, revision=described.revision, cache_dir=described.cache_dir):
        return Estimate(count, 0, sites, on_disk, forwards, None, None)
    start = time.perf_counter()
    model = context.model
    loading = time.perf_counter() - start
    measured, each = _measure(context, model, data, tokens, min(seconds, MOST_SECONDS))
    return Estimate(count, measured, sites, on_disk, forwards, each * count, loading)


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
    """Return the bytes of final norm and unembedding in float32, which are stored once if the decoder is traced."""
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


def _forwards_of_each(model: Lvlm, data: ConceptDataset, plan: Plan, first: Encoding, batch_size: int) -> float:
    """Return the forward passes per example, from as many chunks of the data as a bounded time allows."""
    from activation_store.tracing.plan import chunk_batches

    size = chunk_batches(plan, first.tokens, batch_size) * batch_size
    start, done, forwards = time.perf_counter(), 0, 0
    while done < len(data):
        chunk = data.examples[done : done + size]
        forwards += sum(1 for _ in model.batches(chunk, batch_size))
        done += len(chunk)
        if time.perf_counter() - start > _ENCODING_SECONDS:
            break
    return forwards / done


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
    plan = make_plan(model, first, options.sites, tokens, options.dtype)
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

    numbers = {w.partition("=")[0]: w.partition("=")[2] for w in arguments if w.startswith(("examples=", "seconds="))}
    words = [w for w in arguments if w.partition("=")[0] not in numbers]
    try:
        examples = int(numbers["examples"]) if "examples" in numbers else None
        seconds = float(numbers.get("seconds", SECONDS))
    except ValueError as error:
        msg = f"groundscope plan: {error}; write examples=100000 or seconds=30"
        raise ConfigError(msg) from error
    if (examples is not None and examples < 1) or not seconds > 0:
        msg = "groundscope plan: examples and seconds must be above 0"
        raise ConfigError(msg)
    config, _ = compose(read(words).first())
    check(config)
    config.model.validate = False  # the estimate needs no verification of the model
    console = plain_console()
    with tempfile.TemporaryDirectory() as folder:
        context = Context(config, RunFolder(Path(folder)), console)
        with console.status("measuring") if console.is_terminal else nullcontext():
            result = estimate(context, examples, seconds)
    measured = f"measured on {result.measured}" if result.measured else "sizes from the configuration only"
    console.print(
        f"model {config.model.path} on {config.model.device}, {result.examples} examples; {measured}", markup=False
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("array")
    table.add_column("bytes", justify="right")
    for name, count in result.sites.items():
        table.add_row(Text(name), size(count))
    table.add_row("total on disk", size(result.on_disk))
    console.print(table)
    if result.seconds is None:
        console.print(
            f"{result.forwards} forward passes; hours are not estimated, because the weights of {config.model.path} are not "
            "on this machine",
            markup=False,
        )
        return 0
    each = result.seconds / result.examples
    console.print(
        f"{result.forwards} forward passes, {1000 * each:.1f} ms per example, {result.loading:.0f} s to load the model"
    )
    for parts in sorted({1, 4, config.trace.shards}):
        label = "one process" if parts == 1 else f"{parts} processes, trace.shards={parts}"
        console.print(f"{label}: {result.hours(parts):.2f} hours" + ("" if parts == 1 else " each"))
    console.print("hours are for this machine; several processes need as many equal machines")
    return 0
