"""How fast the ground everything stands on is: drawing scenes, loading the embedded model, answering, patching.

    python benchmarks/foundation.py [--quick]

Compares drawing with its goal of 300 scenes a second on one core, loading with 2 seconds, and head patching with the
loop of one whole forward a head that it replaces.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from circuits import Intervention, Replace, intervened, patch_heads
from concepts import CounterfactualPair, counterfactuals, scenes
from concepts.scenes.scene import TEST, generator, sample_scene
from lvlm import Lvlm, Site, load_lvlm


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def draw(count: int, seed: int) -> None:
    """Draw scenes with their pixels."""
    for i in range(count):
        sample_scene(generator(TEST, seed, i), "b").pixels()


def naive(model: Lvlm, pairs: Sequence[CounterfactualPair]) -> None:
    """Patch every head of every pair with one forward of the whole model each."""
    for pair in pairs:
        clean, corrupt = model.encode(pair.clean), model.encode(pair.corrupt)
        values: dict[int, torch.Tensor] = {}
        hooks = [
            model.place("decoder", layer, "z").watch(
                lambda x, layer=layer, values=values: values.update({layer: x.clone()})
            )
            for layer in range(model.n_layers)
        ]
        model.logits(clean.inputs)
        for hook in hooks:
            hook.remove()
        for layer in range(model.n_layers):
            for head in range(model.n_heads):
                span = slice(head * model.head_dim, (head + 1) * model.head_dim)
                change = Replace(values[layer][:, -1, span])
                with intervened(model, [Intervention(Site("decoder", layer, "z"), change, "last", head)]):
                    model.logits(corrupt.inputs)


def main() -> None:
    """Run, print a table and one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    repeats = 3 if parser.parse_args().quick else 9
    torch.set_num_threads(1)
    model = load_lvlm("tiny")
    data = scenes.dataset(60, 5)
    pairs = counterfactuals.pairs(data.where(split="neutral"), "color", limit=4)
    questions = data.filter(lambda e: bool(e.candidates))
    draw(50, 0)
    scene_rates, loaded, answered, slow, fast = [], [], [], [], []
    for i in range(repeats):
        scene_rates.append(500 / seconds(lambda i=i: draw(500, i)))
        loaded.append(seconds(lambda: load_lvlm("tiny")))
        answered.append(
            len(questions) / seconds(lambda: [model.logits(b.inputs) for b in model.batches(questions, 64)])
        )
        order = [(slow, lambda: naive(model, pairs)), (fast, lambda: patch_heads(model, pairs, min_effect=0.0))]
        for times, work in order if i % 2 else order[::-1]:
            times.append(seconds(work))
    rows = {
        "scenes_per_second": (statistics.median(scene_rates), ">= 300", statistics.median(scene_rates) >= 300),
        "load_seconds": (statistics.median(loaded), "<= 2", statistics.median(loaded) <= 2),
        "questions_per_second": (statistics.median(answered), "", True),
        "patching_speedup_vs_one_forward_a_head": (statistics.median(slow) / statistics.median(fast), "", True),
    }
    table = Table("figure", "median", "goal", title=f"one thread, {repeats} repetitions")
    for name, (value, goal, _) in rows.items():
        table.add_row(name, f"{value:.2f}", goal)
    Console().print(table)
    figures = {k: {"value": round(v, 3), "goal": g, "holds": ok, "n": repeats} for k, (v, g, ok) in rows.items()}
    print(
        json.dumps(
            {"benchmark": "foundation", "device": platform.machine(), "torch": torch.__version__, "figures": figures}
        )
    )


if __name__ == "__main__":
    main()
