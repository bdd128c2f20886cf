"""Speed of basic operations: drawing scenes, loading the embedded model, answering questions, patching heads.

    python benchmarks/basic_operations.py [--quick]

One thread; medians over repetitions. Figures:

scenes_per_second
    random icon scenes, sampled and drawn;
load_seconds
    loading the embedded model;
questions_per_second
    forward passes of questions in batches of 64, including encoding;
patching_speedup_vs_one_forward_a_head
    `patch_heads` on four pairs, against the baseline of one full forward pass per head.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._harness import (
    alternate,
    describe_device,
    figure,
    finish,
    option_parser,
    print_figures,
    progress,
    time_call,
)
from circuits import Intervention, Replace, intervened, patch_heads
from concepts import CounterfactualPair, counterfactuals, scenes
from concepts.scenes.scene import TEST, generator, sample_scene
from lvlm import Lvlm, Site, load_lvlm

SCENES = 500


def draw_scenes(count: int, seed: int) -> None:
    """Sample and draw random scenes."""
    for i in range(count):
        sample_scene(generator(TEST, seed, i), "b").pixels()


def patch_one_by_one(model: Lvlm, pairs: list[CounterfactualPair]) -> None:
    """Patch every head of every pair with one full forward pass each: the baseline."""
    for pair in pairs:
        clean, corrupt = model.encode(pair.clean), model.encode(pair.corrupt)
        outputs: dict[int, torch.Tensor] = {}
        hooks = [
            model.place("decoder", layer, "z").watch(
                lambda x, layer=layer, outputs=outputs: outputs.update({layer: x.clone()})
            )
            for layer in range(model.n_layers)
        ]
        model.logits(clean.inputs)
        for hook in hooks:
            hook.remove()
        for layer in range(model.n_layers):
            for head in range(model.n_heads):
                columns = slice(head * model.head_dim, (head + 1) * model.head_dim)
                change = Replace(outputs[layer][:, -1, columns])
                with intervened(model, [Intervention(Site("decoder", layer, "z"), change, "last", head)]):
                    model.logits(corrupt.inputs)


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    n = 3 if option_parser(__doc__).parse_args().quick else 9
    torch.set_num_threads(1)
    model = load_lvlm("tiny")
    data = scenes.dataset(60, 5)
    pairs = counterfactuals.pairs(data.where(split="neutral"), "color", limit=4)
    questions = data.filter(lambda e: bool(e.candidates))
    draw_scenes(50, 0)  # warm-up
    drawing, loading, answering = [], [], []
    with progress("repetitions", n) as advance:
        for i in range(n):
            drawing.append(SCENES / time_call(lambda i=i: draw_scenes(SCENES, i)))
            loading.append(time_call(lambda: load_lvlm("tiny")))
            seconds = time_call(lambda: [model.logits(batch.inputs) for batch in model.batches(questions, 64)])
            answering.append(len(questions) / seconds)
            advance()
    with progress("patching"):
        times = alternate(
            lambda: patch_one_by_one(model, list(pairs)), lambda: patch_heads(model, pairs, min_effect=0.0), n
        )
    speedup = statistics.median(baseline / candidate for baseline, candidate in times)
    figures = {
        "scenes_per_second": figure(statistics.median(drawing), ">= 300", n),
        "load_seconds": figure(statistics.median(loading), "<= 2", n),
        "questions_per_second": figure(statistics.median(answering), "", n),
        "patching_speedup_vs_one_forward_a_head": figure(speedup, "", n),
    }
    print_figures(figures, f"one thread, {n} repetitions")
    finish("basic_operations", describe_device("torch"), figures)


if __name__ == "__main__":
    main()
