"""Cost of tracing: a traced forward pass that is written to HDF5, against a plain forward pass of the same inputs.

    python benchmarks/trace.py [--quick] [--device cuda] [--dtype bfloat16]

The model is a random LLaVA of medium size (``_medium_llava.py``: hidden size 512, 16 layers, 8 heads, 256 image and 32 text
tokens, batch size 8, scaled dot product attention). The plain forward passes run on a copy of the model that nnsight has never
wrapped. Both run in alternating order. Figures:

overhead_vs_plain
    time of tracing divided by that of plain forward passes, median over repetitions. Tracing includes everything after
    encoding: forward pass, selection of tokens, table of examples, writing, sealing and syncing of files;
fixed_cost_ms
    milliseconds that tracing adds to the forward pass of one example at one site of the embedded model's architecture,
    without writing;
transformer_lens_vs_plain
    for comparison, TransformerLens' `run_with_cache` at the same sites of the decoder, divided by the plain forward pass. It
    keeps the cache in memory, writes nothing, and computes attention step by step instead of with the fused kernel;
peak_memory_10x
    peak resident memory of a process that traces ten times as many examples, divided by that of one that does not.
"""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.table import Table

from activation_store import StoreWriter
from activation_store.tracing.plan import make_plan
from activation_store.tracing.tracer import Tracer
from benchmarks._harness import alternate, describe_device, figure, finish, option_parser, progress, wide_console
from benchmarks._medium_llava import BATCH_SIZE, build_network, build_processor, make_questions
from lvlm import Lvlm, wrap_lvlm
from lvlm.tiny import architecture as tiny
from lvlm.transformer_lens import as_transformer_lens

SITES = ["resid_post", "z"]
TOKENS = ["last", "image:mean", "question:mean"]
GOALS = {"overhead_vs_plain": "<= 1.11", "fixed_cost_ms": "<= 2.0", "peak_memory_10x": "<= 1.10"}
MEMORY_SCRIPT = Path(__file__).resolve().parent / "_trace_memory.py"
Times = list[tuple[float, float]]
"""Seconds of baseline and candidate in each repetition."""


def time_tracing(n: int, batches: int, device: str, dtype: torch.dtype) -> tuple[Times, Lvlm, int]:
    """Time plain against traced and written forward passes; also return the traced model and the prompt's length."""
    network: Any = build_network()
    network.to(device, dtype)
    plain = wrap_lvlm(copy.deepcopy(network), build_processor(), validate=False)
    traced = wrap_lvlm(network, build_processor(), validate=False)
    data = make_questions(BATCH_SIZE * batches)
    encoded = list(traced.batches(data.examples, BATCH_SIZE))
    plan = make_plan(traced, encoded[0].encodings[0], SITES, TOKENS, "float32")
    tracer = Tracer.begin(traced, data, plan, BATCH_SIZE, answers=True)

    def baseline() -> None:
        for batch in encoded:
            plain.logits(batch.inputs)

    def candidate() -> None:
        with tempfile.TemporaryDirectory() as folder, StoreWriter(folder, plan.schema, {}) as writer:
            for batch in encoded:
                writer.append(*tracer.batch(batch))

    times = alternate(baseline, candidate, n, traced.device)
    return times, traced, encoded[0].encodings[0].tokens.length


def time_one_site(n: int) -> Times:
    """Time a plain against a traced forward pass of one example, at one site of a small model."""
    network = tiny.build_model()
    plain = wrap_lvlm(copy.deepcopy(network), tiny.build_processor(), validate=False)
    traced = wrap_lvlm(network, tiny.build_processor(), validate=False)
    data = make_questions(1, "Is there a cat in the image?")
    batch = next(traced.batches(data.examples, 1))
    plan = make_plan(traced, batch.encodings[0], ["decoder.L5.resid_post"], ["last"], "float32")
    tracer = Tracer.begin(traced, data, plan, 1, answers=True)
    return alternate(lambda: plain.logits(batch.inputs), lambda: tracer.forward(batch), n, traced.device)


def time_transformer_lens(n: int, device: str, dtype: torch.dtype) -> Times:
    """Time a plain forward pass of one batch against TransformerLens' run_with_cache at the decoder's sites."""
    network: Any = build_network()
    network.to(device, dtype)
    plain = wrap_lvlm(network, build_processor(), validate=False)
    bridge = as_transformer_lens(plain)
    batch = next(plain.batches(make_questions(BATCH_SIZE).examples, BATCH_SIZE))
    inputs = dict(batch.inputs)
    ids = inputs.pop("input_ids")

    def is_traced(name: str) -> bool:
        return name.endswith(("hook_resid_post", "attn.hook_z")) and name.startswith("blocks.")

    def run() -> None:
        with torch.no_grad():
            bridge.run_with_cache(ids, names_filter=is_traced, **inputs)

    return alternate(lambda: plain.logits(batch.inputs), run, n, plain.device)


def measure_peak_memory(examples: int) -> float:
    """Return the peak resident memory, in MiB, of a process that traces `examples` examples."""
    command = [sys.executable, str(MEMORY_SCRIPT), str(examples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    options = option_parser(__doc__, device=True, dtypes=("float32", "bfloat16", "float16")).parse_args()
    console = wide_console()
    console.print(
        "Compares tracing (forward pass, selection of tokens, HDF5) with plain forward passes of the same inputs."
    )
    n, batches, small_n, examples = (3, 1, 20, 64) if options.quick else (9, 4, 100, 128)
    dtype = getattr(torch, options.dtype)
    with progress("tracing"):
        times, model, length = time_tracing(n, batches, options.device, dtype)
    with progress("fixed cost, TransformerLens"):
        one_site = time_one_site(small_n)
        lens = time_transformer_lens(n, options.device, dtype)
    with progress("memory"):
        memory = [measure_peak_memory(examples), measure_peak_memory(10 * examples)]
    values = {
        "overhead_vs_plain": (statistics.median(traced / plain for plain, traced in times), n, times),
        "fixed_cost_ms": (statistics.median(1000 * (traced - plain) for plain, traced in one_site), small_n, one_site),
        "transformer_lens_vs_plain": (statistics.median(cached / plain for plain, cached in lens), n, lens),
    }
    figures = {name: figure(value, GOALS.get(name, ""), count) for name, (value, count, _) in values.items()}
    figures["peak_memory_10x"] = figure(memory[1] / memory[0], GOALS["peak_memory_10x"])
    medians = {
        name: [1000 * statistics.median(column) for column in zip(*t, strict=True)]
        for name, (_, _, t) in values.items()
    }
    measured = {name: [f"{milliseconds:.1f} ms" for milliseconds in pair] for name, pair in medians.items()}
    measured["peak_memory_10x"] = [f"{mebibytes:.0f} MiB" for mebibytes in memory]
    table = Table("figure", "baseline", "candidate", "value", "goal", "holds", "n")
    for name, entry in figures.items():
        holds = str(entry["holds"]) if entry["goal"] else ""
        table.add_row(name, *measured[name], str(entry["value"]), entry["goal"], holds, str(entry["n"]))
    console.print(table)
    sites = f"{', '.join(SITES)} at {', '.join(TOKENS)}"
    console.print(f"{model!r}: {batches} batches of {BATCH_SIZE} x {length} tokens per repetition; {sites}")
    finish("trace", describe_device("torch", device=options.device, dtype=options.dtype), figures)


if __name__ == "__main__":
    main()
