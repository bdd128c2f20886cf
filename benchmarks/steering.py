"""Cost of steering and of answering: steered against plain generation, answers against plain forward passes.

    python benchmarks/steering.py [--quick] [--only answering] [--device cuda] [--dtype bfloat16]

The model is a random LLaVA of medium size (``_medium_llava.py``: hidden size 512, 16 layers, 8 heads, 256 image tokens, batch
size 8). The variants of a comparison run in rotating order, after one warm-up; figures are medians over repetitions:

steered_generation_vs_plain
    greedy cached generation of 64 tokens with an additive vector at 48 heads at the last token (as ITI), divided by plain
    generation;
amplified_generation_vs_plain
    the same with an amplification at 6 heads, the method of the default run;
answering_throughput_vs_plain
    `behavior.answer` on six yes-no questions about each of four images, from images to results, with a newly wrapped model; the
    baseline is plain forward passes of inputs that are already encoded. Time of the baseline divided by that of answering.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.table import Table

from behavior import answer
from benchmarks._harness import (
    Figure,
    describe_device,
    figure,
    finish,
    option_parser,
    progress,
    time_call,
    wide_console,
)
from benchmarks._medium_llava import BATCH_SIZE, TEXT, build_network, build_processor, make_questions
from concepts import ConceptDataset
from concepts.question import Question
from concepts.scenes.questions import YES_NO, as_example
from concepts.scenes.scene import TEST, generator, sample_scene
from lvlm import Head, Lvlm, wrap_lvlm
from mitigation import SteeringVector
from mitigation.steering.changes import AddChange, AmplifyChange, VectorChange
from mitigation.steering.places import Key

NEW_TOKENS = 64
NOUNS = ("cat", "dog", "car", "apple", "cup", "bus")
GOALS = {"steered_generation_vs_plain": "<= 1.03", "answering_throughput_vs_plain": ">= 0.9"}


def make_vector(model: Lvlm, kind: Literal["add", "amplify"], count: int) -> SteeringVector:
    """Return a vector of random directions at `count` heads, spread over all layers."""
    rng = np.random.default_rng(0)
    heads = [Head(i, k) for i in range(model.n_layers) for k in range(model.n_heads)]
    changes: dict[Key, VectorChange] = {}
    for head in heads[:: len(heads) // count][:count]:
        v = rng.standard_normal(model.head_dim)
        direction = v / np.linalg.norm(v)
        add = kind == "add"
        changes[head] = AddChange(direction, 0.1) if add else AmplifyChange(direction, reads=direction[None])
    return SteeringVector(changes, "last", 1.0, model.name, model.config_hash)


def rotate(variants: Mapping[str, Callable[[], object]], n: int, device: torch.device) -> dict[str, list[float]]:
    """Time each variant `n` times in rotating order, after one warm-up; return seconds by name."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    with progress(" and ".join(names), (n + 1) * len(names)) as advance:
        for repetition in range(n + 1):
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(time_call(variants[name], device))
                advance()
    return {name: column[1:] for name, column in times.items()}


def time_generation(model: Lvlm, n: int, new_tokens: int) -> dict[str, list[float]]:
    """Time plain and steered generation of one batch."""
    batch = next(model.batches(make_questions(BATCH_SIZE).examples, BATCH_SIZE))

    def generate() -> None:
        with torch.no_grad():
            out = model.hf.generate(
                **batch.inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            )
        generated = out.shape[1] - batch.inputs["input_ids"].shape[1]
        if generated != new_tokens:
            msg = f"generated {generated} tokens instead of {new_tokens}"
            raise RuntimeError(msg)

    def generate_with(vector: SteeringVector) -> None:
        with vector.applied(model):
            generate()

    steered, amplified = make_vector(model, "add", 48), make_vector(model, "amplify", 6)
    variants = {
        "plain": generate,
        "steered": lambda: generate_with(steered),
        "amplified": lambda: generate_with(amplified),
    }
    return rotate(variants, n, model.device)


def make_poll(images: int) -> ConceptDataset:
    """Return questions about whether each of six nouns is in each of `images` images."""
    scenes = [sample_scene(generator(TEST, 1, i), f"p{i}") for i in range(images)]
    questions = [Question(TEXT.replace("cat", noun), "yes", YES_NO, "object", "existence") for noun in NOUNS]
    return ConceptDataset("poll", tuple(as_example(s, q, "neutral") for s in scenes for q in questions))


def time_answering(network: Any, images: int, n: int) -> dict[str, list[float]]:
    """Time plain forward passes of encoded questions, and answering the questions from their images."""
    plain = wrap_lvlm(network, build_processor(), validate=False)
    data = make_poll(images)
    encoded = list(plain.batches(data.examples, BATCH_SIZE))

    def run_forwards() -> None:
        for batch in encoded:
            plain.logits(batch.inputs)

    def answer_questions() -> None:
        # A model caches the encodings of its last images: wrap it again, so that each repetition starts without them.
        answer(wrap_lvlm(network, build_processor(), validate=False), data, batch_size=BATCH_SIZE, progress=False)

    return rotate({"forward passes": run_forwards, "answers": answer_questions}, n, plain.device)


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(__doc__, device=True, dtypes=("float32", "bfloat16", "float16"))
    parser.add_argument("--only", choices=["generation", "answering"], help="measure one of the two parts")
    options = parser.parse_args()
    console = wide_console()
    console.print("Compares steered with plain cached generation, and answering with plain forward passes.")
    n, new_tokens, images = (2, 16, 2) if options.quick else (5, NEW_TOKENS, 4)
    network: Any = build_network()
    network.to(options.device, getattr(torch, options.dtype))
    model = wrap_lvlm(network, build_processor(), validate=False)
    comparisons: dict[str, tuple[list[float], list[float]]] = {}
    if options.only != "answering":
        times = time_generation(model, n, new_tokens)
        comparisons["steered_generation_vs_plain"] = times["plain"], times["steered"]
        comparisons["amplified_generation_vs_plain"] = times["plain"], times["amplified"]
    if options.only != "generation":
        times = time_answering(network, images, n)
        comparisons["answering_throughput_vs_plain"] = times["forward passes"], times["answers"]
    figures: dict[str, Figure] = {}
    table = Table("figure", "plain", "candidate", "value", "goal", "holds", "n")
    for name, (plain, candidate) in comparisons.items():
        over, under = (plain, candidate) if "throughput" in name else (candidate, plain)
        value = statistics.median(a / b for a, b in zip(over, under, strict=True))
        entry = figures[name] = figure(value, GOALS.get(name, ""), n)
        times = [f"{statistics.median(column) * 1000:.0f} ms" for column in (plain, candidate)]
        holds = str(entry["holds"]) if entry["goal"] else ""
        table.add_row(name, *times, str(entry["value"]), entry["goal"], holds, str(n))
    console.print(table)
    console.print(
        f"{model!r}: batch size {BATCH_SIZE}, {new_tokens} new tokens; {len(NOUNS)} questions about each of {images} images"
    )
    finish("steering", describe_device("torch", device=options.device, dtype=options.dtype), figures)


if __name__ == "__main__":
    main()
