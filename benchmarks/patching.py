"""Cost of exact activation patching, against a loop of one full forward pass per patch.

    python benchmarks/patching.py [--quick] [--device cuda] [--dtype bfloat16] [--figure FILE.png]

The model is a random LLaVA of medium size (``_medium_llava.py``: hidden size 512, 16 layers, 8 heads); the prompt has 256 image
tokens followed by 32 question tokens. Three sweeps are timed: each head at the last token (``last_token``), each head at all
question tokens at once (``question_at_once``), and each head at each question token (``question_apart``: 4,096 patches).

The baseline is the usual implementation with plain torch hooks: it caches the clean run's head outputs, then runs one full
forward pass of the corrupt inputs per patch, with one hook and logits at the last position only. Both methods include the two
runs of the pair. Long loops are timed on a random sample of their patches and extrapolated. The methods run in alternating
order. Figures:

..._forwards
    time of a sweep divided by the time of a plain forward pass of one prompt, median over repetitions;
..._speedup
    time of the loop divided by that of the sweep, median over repetitions;
largest_logit_difference
    between both methods, over a sample of patches;
peak_memory_over_budget
    largest number of bytes of live tensors while patches run, divided by the memory budget that the sweep was given.

With ``--figure`` only the growth of ``last_token`` with layers, heads and image tokens is measured and plotted
(``forwards_at_SIZE_AXIS``).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from benchmarks._harness import (
    Figure,
    describe_device,
    figure,
    finish,
    option_parser,
    print_figures,
    progress,
    time_call,
    wide_console,
)
from benchmarks._medium_llava import build_network, build_processor, make_questions
from benchmarks._patching_parts import TensorMemory, plot_growth
from circuits import patch, patch_heads
from circuits.execution.prefix_cache import Recording, observe, record
from circuits.execution.suffix_runner import Row, resume
from circuits.patching.sweep import rows_of
from concepts.counterfactual_pair import CounterfactualPair
from lvlm import FamilySpec, Lvlm, Site, wrap_lvlm

QUESTION = " ".join(["Is there a cat", *["or a dog"] * 8, "in the image"]) + "?"
"""32 tokens: 31 words and the question mark."""
Patch = tuple[int, int, tuple[int, ...]]
"""Layer, head, positions."""


def build_lvlm(layers: int = 16, heads: int = 8, image_side: int = 16) -> Lvlm:
    """Return a random LLaVA whose prompt is the image followed by the question."""
    network = build_network(layers, heads, image_side)
    with torch.no_grad():  # larger weights, so that the effects of heads differ
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= 2
    spec = FamilySpec("llava", template="{image}{question}", special_tokens=False)
    return wrap_lvlm(network, build_processor(image_side), spec=spec, validate=False)


def make_pair() -> CounterfactualPair:
    """Return a pair: the same question about two images."""
    clean, corrupt = make_questions(2, QUESTION)
    corrupt = replace(corrupt, question=clean.question, answer="no")
    return CounterfactualPair(clean, corrupt, "image", "another image")


# -- baseline --------------------------------------------------------------------------------------------------------------


class HookLoop:
    """The baseline: one full forward pass per patch, with plain torch hooks on the Hugging Face modules."""

    def __init__(self, model: Lvlm, pair: CounterfactualPair) -> None:
        self.hf, self.device = model.hf, model.device
        self.head_dim = model.head_dim
        self.modules = [layer.self_attn.o_proj for layer in model.hf.model.language_model.layers]
        self.clean, self.corrupt = (model.collate([model.encode(e)]) for e in (pair.clean, pair.corrupt))
        self.clean_outputs: dict[int, Tensor] = {}

    @torch.no_grad()
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the logits at the last position."""
        return self.hf(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1]

    def run_pair(self) -> None:
        """Run both sides of the pair, and cache the clean run's head outputs."""
        hooks = [
            m.register_forward_pre_hook(lambda _m, args, i=i: self.clean_outputs.update({i: args[0].clone()}))
            for i, m in enumerate(self.modules)
        ]
        self.forward(self.clean)
        for hook in hooks:
            hook.remove()
        self.forward(self.corrupt)

    def patch(self, patch: Patch) -> Tensor:
        """Return the logits of the corrupt run with one head's output replaced by that of the clean run."""
        layer, head, positions = patch
        at, columns = slice(positions[0], positions[-1] + 1), slice(head * self.head_dim, (head + 1) * self.head_dim)

        def replace_output(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].clone()
            z[:, at, columns] = self.clean_outputs[layer][:, at, columns]
            return (z,)

        hook = self.modules[layer].register_forward_pre_hook(replace_output)
        try:
            return self.forward(self.corrupt)
        finally:
            hook.remove()

    def time(self, patches: list[Patch], total: int) -> float:
        """Return the seconds of the loop over `total` patches, extrapolated from the time of `patches`."""
        pair_seconds = time_call(self.run_pair, self.device)
        return pair_seconds + time_call(lambda: [self.patch(p) for p in patches], self.device) * total / len(patches)


# -- sweeps ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """A set of patches, and the call of `circuits` that runs all of them."""

    name: str
    run: Callable[[], Any]
    patches: list[Patch]


def make_sweeps(model: Lvlm, pair: CounterfactualPair) -> list[Sweep]:
    """Return the three sweeps."""
    tokens = model.encode(pair.clean).tokens
    suffix = tuple(range(max(tokens.image) + 1, tokens.last + 1))
    heads = [(i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
    return [
        Sweep(
            "each head, last token",
            lambda: patch_heads(model, [pair], min_effect=0, progress=False),
            [(i, h, (tokens.last,)) for i, h in heads],
        ),
        Sweep(
            "each head, all question tokens at once",
            lambda: patch_heads(model, [pair], tokens="suffix:all", min_effect=0, progress=False),
            [(i, h, suffix) for i, h in heads],
        ),
        Sweep(
            "each head, each question token",
            lambda: patch(model, [pair], "z", tokens="suffix:each", min_effect=0, progress=False),
            [(i, h, (p,)) for i, h in heads for p in suffix],
        ),
    ]


@dataclass(frozen=True)
class SweepTimes:
    """Medians over repetitions."""

    forward: float
    """Seconds of a plain forward pass."""
    sweep: float
    """Seconds of the sweep."""
    loop: float
    """Seconds of the whole loop; extrapolated from a sample if it is long."""
    forwards: float
    """Time of the sweep divided by that of a plain forward pass."""
    speedup: float
    """Time of the loop divided by that of the sweep."""
    n: int


def time_sweep(model: Lvlm, pair: CounterfactualPair, sweep: Sweep, n: int, sample_size: int) -> SweepTimes:
    """Time a sweep and its loop in alternating order."""
    loop, device = HookLoop(model, pair), model.device
    rng, total = np.random.default_rng(0), len(sweep.patches)
    time_call(loop.run_pair, device)  # warm-up

    def time_forward() -> float:
        return statistics.median(time_call(lambda: loop.forward(loop.corrupt), device) for _ in range(3))

    rows = []
    for repetition in range(n):
        sample = [sweep.patches[i] for i in rng.choice(total, min(sample_size, total), replace=False)]
        before = time_forward()
        if repetition % 2:
            sweep_seconds, loop_seconds = time_call(sweep.run, device), loop.time(sample, total)
        else:
            loop_seconds, sweep_seconds = loop.time(sample, total), time_call(sweep.run, device)
        rows.append((min(before, time_forward()), sweep_seconds, loop_seconds))
    forward, sweep_median, loop_median = (statistics.median(column) for column in zip(*rows, strict=True))
    return SweepTimes(
        forward,
        sweep_median,
        loop_median,
        statistics.median(s / f for f, s, _ in rows),
        statistics.median(whole / s for _, s, whole in rows),
        n,
    )


# -- exactness and memory --------------------------------------------------------------------------------------------------


def prepare_rows(model: Lvlm, pair: CounterfactualPair, patches: list[Patch]) -> tuple[Recording, list[Row]]:
    """Return the recorded corrupt run and one row per patch, the inputs of `resume`."""
    clean, corrupt = (model.collate([model.encode(e)]) for e in (pair.clean, pair.corrupt))
    sites = [Site("decoder", i, "z") for i in range(model.n_layers)]
    start = min(positions[0] for _, _, positions in patches)
    source, run = observe(model, clean, start, sites), record(model, corrupt, start, sites)
    return run, [rows_of(model, [((sites[i], h),)], [positions], source)[0] for i, h, positions in patches]


def largest_difference(model: Lvlm, pair: CounterfactualPair, sample_size: int) -> float:
    """Return the largest difference of a logit between both methods, over a sample of the patches of each sweep."""
    loop = HookLoop(model, pair)
    loop.run_pair()
    rng, largest = np.random.default_rng(1), 0.0
    for sweep in make_sweeps(model, pair):
        sample = [sweep.patches[i] for i in rng.choice(len(sweep.patches), sample_size, replace=False)]
        run, rows = prepare_rows(model, pair, sample)
        patched = resume(model, run, rows, lambda x: x[:, :, -1], memory=2**30)[0]
        expected = torch.stack([loop.patch(p) for p in sample])
        largest = max(largest, float((patched.float() - expected.float()).abs().max()))
    return largest


def measure_peak_share(model: Lvlm, pair: CounterfactualPair, memory: int) -> float:
    """Return the peak memory of patching every head at all question tokens, divided by the budget `memory`, both in bytes.

    The recording of the run is not included.
    """
    run, rows = prepare_rows(model, pair, make_sweeps(model, pair)[1].patches)
    with TensorMemory() as counter:
        resume(model, run, rows, lambda x: x[:, :, -1, :2].clone(), memory=memory)
    return counter.peak / memory


# -- growth ----------------------------------------------------------------------------------------------------------------


def measure_growth(n: int) -> dict[str, list[tuple[int, float, float]]]:
    """Time patching of all heads at the last token in models of different sizes.

    Returns
    -------
    growth
        Varied axis to (size, cost of `patch_heads`, cost of one forward pass per head), in plain forward passes.
    """
    growth: dict[str, list[tuple[int, float, float]]] = {}
    axes = {"layers": (4, 8, 16, 24), "heads": (4, 8, 12), "image tokens": (64, 256, 576, 1024)}
    pair = make_pair()
    with progress("model sizes", sum(map(len, axes.values()))) as advance:
        for axis, sizes in axes.items():
            for size in sizes:
                model = build_lvlm(
                    layers=size if axis == "layers" else 16,
                    heads=size if axis == "heads" else 8,
                    image_side=round(size**0.5) if axis == "image tokens" else 16,
                )
                sweep, loop = make_sweeps(model, pair)[0], HookLoop(model, pair)
                time_call(loop.run_pair, model.device)  # warm-up
                ratios = []
                for _ in range(n):
                    before = time_call(lambda loop=loop: loop.forward(loop.corrupt), model.device)
                    seconds = time_call(sweep.run, model.device)
                    after = time_call(lambda loop=loop: loop.forward(loop.corrupt), model.device)
                    ratios.append(seconds / min(before, after))
                growth.setdefault(axis, []).append((size, statistics.median(ratios), len(sweep.patches) + 2.0))
                advance()
    return growth


def report_growth(path: Path, n: int) -> None:
    """Measure and plot growth, and print it as a table and one JSON object."""
    growth = measure_growth(n)
    plot_growth(growth, path)
    table = Table("varied", "size", "plain forward passes", "one forward pass per head")
    for axis, rows in growth.items():
        for size, cost, loop_cost in rows:
            table.add_row(axis, str(size), f"{cost:.2f}", f"{loop_cost:.0f}")
    wide_console().print(table)
    figures = {
        f"forwards_at_{size}_{axis.replace(' ', '_')}": figure(cost, "", n)
        for axis, rows in growth.items()
        for size, cost, _ in rows
    }
    finish("patching", describe_device("torch", dtype="float32"), figures)


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(__doc__, device=True, dtypes=("float32", "bfloat16"))
    parser.add_argument(
        "--figure", type=Path, help="only measure growth with the size of the model, and plot it to this file"
    )
    options = parser.parse_args()
    console = wide_console()
    console.print(
        "Compares exact patching of heads with one full forward pass per patch; both include the runs of the pair."
    )
    if options.figure:
        report_growth(options.figure, 1 if options.quick else 5)
        return
    model = build_lvlm()
    model.hf.to(options.device, getattr(torch, options.dtype))
    pair = make_pair()
    sweeps = make_sweeps(model, pair)
    length, suffix_length = model.encode(pair.clean).tokens.length, len(sweeps[1].patches[0][2])
    threads = torch.get_num_threads()
    console.print(f"{model!r}: {length} tokens, {suffix_length} of them after the image, {threads} threads")
    repetitions, sample_size = ((3, 1, 1), 4) if options.quick else ((5, 3, 1), 8)
    table = Table("sweep", "patches", "sweep, s", "loop, s", "plain forward, s", "plain forwards", "speedup", "n")
    results = []
    for sweep, n in zip(sweeps, repetitions, strict=True):
        with progress(sweep.name):
            times = time_sweep(model, pair, sweep, n, sample_size)
        results.append(times)
        seconds = (f"{times.sweep:.2f}", f"{times.loop:.1f}", f"{times.forward:.3f}")
        ratios = (f"{times.forwards:.2f}", f"{times.speedup:.1f}")
        table.add_row(sweep.name, str(len(sweep.patches)), *seconds, *ratios, str(n))
    console.print(table)
    last, at_once, separate = results
    figures: dict[str, Figure] = {
        "last_token_forwards": figure(last.forwards, "<= 3", last.n),
        "last_token_speedup": figure(last.speedup, ">= 40", last.n),
        "question_at_once_forwards": figure(at_once.forwards, "<= 10", at_once.n),
        "question_at_once_speedup": figure(at_once.speedup, "", at_once.n),
        "question_apart_speedup": figure(separate.speedup, ">= 25", separate.n),
    }
    count = 4 if options.quick else 12
    with progress("exactness and memory"):
        difference = largest_difference(model, pair, count)
        goal = "<= 1e-5" if options.dtype == "float32" else ""
        figures["largest_logit_difference"] = figure(difference, goal, 3 * count)
        if options.device == "cpu":
            budgets = (2**26, 2**28)
            share = max(measure_peak_share(model, pair, memory) for memory in budgets)
            figures["peak_memory_over_budget"] = figure(share, "<= 1", len(budgets))
    print_figures(figures)
    finish("patching", describe_device("torch", device=options.device, dtype=options.dtype), figures)


if __name__ == "__main__":
    main()
