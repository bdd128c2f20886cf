"""What exact patching costs: every head of a random LLaVA of middle size, against one whole forward a patch.

The model is that of benchmarks/trace.py (hidden 512, 16 layers, 8 heads) and a prompt of 256 image and then 32 question
tokens. Patched are each head at the last token; each head at all 32 question tokens at once; each head at each of them
apart (4,096 patches). Everything is counted: `circuits`' time holds the two runs of the pair, the loop's too.

The loop is what one writes with plain torch hooks: the clean run's head outputs are kept, then one forward a patch of
the corrupt inputs with one hook, on the same threads, with logits at the last position alone. Long loops are timed on a
random sample of their patches and multiplied. Both take turns, in alternating order; figures are medians of the turns'
ratios. "Forwards" are plain forwards of one prompt of that pair. Memory is what live tensors add at their largest while
the patches run, counted at every operation, over the budget they were given.

    python benchmarks/patching.py [--quick] [--device cuda] [--dtype bfloat16] [--figure FILE.png]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks._patching_parts import Live, draw
from benchmarks.trace import middle_processor, questions
from circuits import patch, patch_heads
from circuits.execution.prefix_cache import Recording, observe, record
from circuits.execution.suffix_runner import Row, resume
from circuits.patching.sweep import rows_of
from concepts.schema import CounterfactualPair
from lvlm import FamilySpec, Lvlm, Site, wrap_lvlm
from lvlm.tiny.architecture import IMAGE, vocabulary

TEXT = " ".join(["Is there a cat", *["or a dog"] * 8, "in the image"])  # 31 words, and a question mark
Patch = tuple[int, int, tuple[int, ...]]
"""Layer, head, positions."""


def build(layers: int = 16, heads: int = 8, side: int = 16, seed: int = 0) -> Lvlm:
    """Build the model with random weights, large enough that heads differ; `side` is the image's tokens along an edge."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=14 * side,
            patch_size=14,
            projection_dim=256,
        ),
        text_config=LlamaConfig(
            vocab_size=8192,
            hidden_size=64 * heads,
            intermediate_size=172 * heads,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
        ),
        image_token_index=vocabulary().index(IMAGE),
        vision_feature_layer=-1,
        image_seq_length=side**2,
    )
    network = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= 2
    processor = middle_processor()
    processor.image_processor.size = {"height": 14 * side, "width": 14 * side}
    # The image's tokens and then the question's, and nothing else.
    spec = FamilySpec("llava", template="{image}{question}", special_tokens=False)
    return wrap_lvlm(network, processor, spec=spec, validate=False)


def pair_of(seed: int = 0) -> CounterfactualPair:
    """Ask the same question about two pictures."""
    first, second = questions(2 + seed, f"{TEXT}?").examples[-2:]
    return CounterfactualPair(first, replace(second, question=first.question, answer="no"), "image", "another image")


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time a piece of work to its end on the device."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# -- the loop ------------------------------------------------------------------------------------------------------------


class Loop:
    """One whole forward a patch, with plain torch hooks on the Hugging Face modules."""

    def __init__(self, model: Lvlm, pair: CounterfactualPair) -> None:
        self.hf, self.device = model.hf, model.device
        self.dim = model.head_dim
        self.modules = [layer.self_attn.o_proj for layer in model.hf.model.language_model.layers]
        self.clean, self.corrupt = (model.collate([model.encode(e)]) for e in (pair.clean, pair.corrupt))
        self.kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the logits at the last position."""
        return self.hf(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1]

    def own_runs(self) -> None:
        """Run both sides, and keep the clean one's head outputs."""
        hooks = [
            m.register_forward_pre_hook(lambda _m, args, i=i: self.kept.update({i: args[0].clone()}))
            for i, m in enumerate(self.modules)
        ]
        self.forward(self.clean)
        for hook in hooks:
            hook.remove()
        self.forward(self.corrupt)

    def patch(self, patch: Patch) -> Tensor:
        """Return the logits of the corrupt run with one head's output of the clean run."""
        layer, head, positions = patch
        at, columns = slice(positions[0], positions[-1] + 1), slice(head * self.dim, (head + 1) * self.dim)

        def change(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].clone()
            z[:, at, columns] = self.kept[layer][:, at, columns]
            return (z,)

        hook = self.modules[layer].register_forward_pre_hook(change)
        try:
            return self.forward(self.corrupt)
        finally:
            hook.remove()


# -- what is compared ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """One thing to patch, both ways."""

    name: str
    run: Callable[[], Any]
    patches: list[Patch]


def sweeps(model: Lvlm, pair: CounterfactualPair) -> list[Sweep]:
    """Return the three sweeps of the figures."""
    last = model.encode(pair.clean).tokens.last
    image = model.encode(pair.clean).tokens.image
    suffix = tuple(range(max(image) + 1, last + 1))
    heads = [(i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
    return [
        Sweep(
            "each head, last token",
            lambda: patch_heads(model, [pair], min_effect=0, progress=False),
            [(i, h, (last,)) for i, h in heads],
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
class Measured:
    """Medians over turns."""

    forward: float
    """Seconds of a plain forward."""
    ours: float
    loop: float
    """Seconds of the whole loop, long ones from a sample."""
    forwards: float
    speedup: float
    n: int


def measure(model: Lvlm, pair: CounterfactualPair, sweep: Sweep, turns: int, sample: int) -> Measured:
    """Time a sweep and its loop in turn."""
    loop, device = Loop(model, pair), model.device
    draw = np.random.default_rng(0)
    seconds(loop.own_runs, device)
    rows = []
    for turn in range(turns):
        chosen = [
            sweep.patches[i] for i in draw.choice(len(sweep.patches), min(sample, len(sweep.patches)), replace=False)
        ]
        plain = statistics.median(seconds(lambda: loop.forward(loop.corrupt), device) for _ in range(3))
        work = [lambda: seconds(sweep.run, device), lambda c=chosen: _loop_seconds(loop, c, len(sweep.patches))]
        times = [w() for w in work] if turn % 2 else [w() for w in work[::-1]][::-1]
        after = statistics.median(seconds(lambda: loop.forward(loop.corrupt), device) for _ in range(3))
        rows.append((min(plain, after), *times))
    forward, ours, whole = (statistics.median(column) for column in zip(*rows, strict=True))
    return Measured(
        forward,
        ours,
        whole,
        statistics.median(o / f for f, o, _ in rows),
        statistics.median(w / o for _, o, w in rows),
        turns,
    )


def _loop_seconds(loop: Loop, chosen: list[Patch], count: int) -> float:
    own = seconds(loop.own_runs, loop.device)
    return own + seconds(lambda: [loop.patch(p) for p in chosen], loop.device) * count / len(chosen)


@dataclass(frozen=True)
class Parts:
    """What the engine is given for some patches."""

    run: Recording
    rows: list[Row]


def parts(model: Lvlm, pair: CounterfactualPair, patches: list[Patch]) -> Parts:
    """Record the pair and make a row of each patch."""
    clean, corrupt = (model.collate([model.encode(e)]) for e in (pair.clean, pair.corrupt))
    sites = [Site("decoder", i, "z") for i in range(model.n_layers)]
    start = min(p[0] for _, _, p in patches)
    source, run = observe(model, clean, start, sites), record(model, corrupt, start, sites)
    return Parts(run, [rows_of(model, [((sites[i], h),)], [at], source)[0] for i, h, at in patches])


def largest_difference(model: Lvlm, pair: CounterfactualPair, count: int) -> float:
    """Return the largest difference of any logit to the loop's, over a sample of each sweep's patches."""
    loop = Loop(model, pair)
    loop.own_runs()
    draw, worst = np.random.default_rng(1), 0.0
    for sweep in sweeps(model, pair):
        chosen = [sweep.patches[i] for i in draw.choice(len(sweep.patches), count, replace=False)]
        parts_of_pair = parts(model, pair, chosen)
        ours = resume(model, parts_of_pair.run, parts_of_pair.rows, lambda x: x[:, :, -1], memory=2**30)[0]
        theirs = torch.stack([loop.patch(p) for p in chosen])
        worst = max(worst, float((ours.float() - theirs.float()).abs().max()))
    return worst


def peak_share(model: Lvlm, pair: CounterfactualPair, memory: int) -> float:
    """Return the most bytes that patching every head at all question tokens adds to what was recorded, over its budget."""
    parts_of_pair = parts(model, pair, sweeps(model, pair)[1].patches)
    with Live() as live:
        resume(model, parts_of_pair.run, parts_of_pair.rows, lambda x: x[:, :, -1, :2].clone(), memory=memory)
    return live.most / memory


def growth(turns: int) -> dict[str, list[tuple[int, float, float]]]:
    """Time all heads at the last token for models that grow in one way: size, our forwards, the loop's forwards."""
    grown: dict[str, list[tuple[int, float, float]]] = {}
    for name, sizes in (("layers", (4, 8, 16, 24)), ("heads", (4, 8, 12)), ("image tokens", (64, 256, 576, 1024))):
        for size in sizes:
            model = build(
                layers=size if name == "layers" else 16,
                heads=size if name == "heads" else 8,
                side=round(size**0.5) if name == "image tokens" else 16,
            )
            sweep, loop = sweeps(model, pair_of())[0], Loop(model, pair_of())
            seconds(loop.own_runs, model.device)
            ratios = []
            for _ in range(turns):
                plain = seconds(lambda c=loop: c.forward(c.corrupt), model.device)
                ours = seconds(sweep.run, model.device)
                ratios.append(ours / min(plain, seconds(lambda c=loop: c.forward(c.corrupt), model.device)))
            grown.setdefault(name, []).append((size, statistics.median(ratios), len(sweep.patches) + 2.0))
    return grown


def show_growth(console: Console, path: Path, turns: int) -> None:
    """Measure and draw growth, and print it as a table and a line of JSON."""
    grown = growth(turns)
    draw(grown, path)
    table = Table("grown in", "to", "forwards", "one forward a head")
    for name, rows in grown.items():
        for size, ours, whole in rows:
            table.add_row(name, str(size), f"{ours:.2f}", f"{whole:.0f}")
    console.print(table)
    figures = {
        f"forwards_at_{size}_{name.replace(' ', '_')}": {"value": round(ours, 3), "goal": "", "holds": True, "n": turns}
        for name, rows in grown.items()
        for size, ours, _ in rows
    }
    print(json.dumps({"benchmark": "patching", "device": device_name("cpu", "float32"), "figures": figures}))


def device_name(device: str, dtype: str) -> str:
    """Say what was measured on."""
    cuda = device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return f"{where}, {dtype}, torch {torch.__version__}"


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, about a minute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--figure", type=Path, help="instead draw growth with layers, heads and image tokens to this file"
    )
    options = parser.parse_args()
    console = Console()
    console.print(
        "Compares exact patching of heads with the loop of one whole forward a patch; each counts all its runs."
    )
    if options.figure:
        show_growth(console, options.figure, 1 if options.quick else 5)
        return
    model = build()
    model.hf.to(options.device, getattr(torch, options.dtype))
    pair = pair_of()
    length, question = model.encode(pair.clean).tokens.length, len(sweeps(model, pair)[1].patches[0][2])
    console.print(f"{model!r}: {length} tokens, {question} of them after the image, {torch.get_num_threads()} threads")
    turns = (3, 1, 1) if options.quick else (5, 3, 1)
    sample = 4 if options.quick else 8
    table = Table("sweep", "patches", "seconds", "loop", "plain forward", "forwards", "times the loop", "n")
    measured = []
    for sweep, n in zip(sweeps(model, pair), turns, strict=True):
        measurement = measure(model, pair, sweep, n, sample)
        measured.append(measurement)
        console.print(f"{sweep.name}: {measurement}")
        times = (f"{measurement.ours:.2f}", f"{measurement.loop:.1f}", f"{measurement.forward:.3f}")
        table.add_row(
            sweep.name,
            str(len(sweep.patches)),
            *times,
            f"{measurement.forwards:.2f}",
            f"{measurement.speedup:.1f}",
            str(n),
        )
    console.print(table)
    figures: dict[str, dict[str, Any]] = {}

    def add(name: str, value: float, goal: str, n: int) -> None:
        sign, _, bound = goal.partition(" ")
        holds = not goal or (value <= float(bound) if sign == "<=" else value >= float(bound))
        figures[name] = {"value": float(f"{value:.4g}"), "goal": goal, "holds": holds, "n": n}

    last, joint, separate = measured
    add("last_token_forwards", last.forwards, "<= 3", last.n)
    add("last_token_speedup", last.speedup, ">= 40", last.n)
    add("question_at_once_forwards", joint.forwards, "<= 10", joint.n)
    add("question_at_once_speedup", joint.speedup, "", joint.n)
    add("question_apart_speedup", separate.speedup, ">= 25", separate.n)
    count = 4 if options.quick else 12
    error = largest_difference(model, pair, count)
    add("largest_logit_difference", error, "<= 1e-5" if options.dtype == "float32" else "", 3 * count)
    if options.device == "cpu":
        budgets = (2**26, 2**28)
        add("peak_memory_over_budget", max(peak_share(model, pair, m) for m in budgets), "<= 1", len(budgets))
    rows = Table("figure", "value", "goal", "holds")
    for name, figure in figures.items():
        rows.add_row(name, f"{figure['value']:g}", figure["goal"], str(figure["holds"]))
    console.print(rows)
    device = device_name(options.device, options.dtype)
    print(json.dumps({"benchmark": "patching", "device": device, "figures": figures}))


if __name__ == "__main__":
    main()
