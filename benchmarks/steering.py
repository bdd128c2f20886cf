"""What steering and answering cost: steered cached generation against plain, answers by logit margin against plain forwards.

The model is the random LLaVA of middle size of benchmarks/trace.py (hidden 512, 16 layers, 8 heads; 256 image tokens, batch 8).
Generation: 64 new tokens, greedy; steered at 48 heads by an additive vector at the last token, as in ITI, and for comparison by
an amplification at 6 heads, which is what the default run applies. Answering: `behavior.answer` on six yes-no questions about
each of four images, everything from pictures to results, by a model that has not seen the images; the plain forward is given
inputs that are encoded already. What is compared takes turns, whose order rotates, after one to warm up; figures are medians of
the turns' ratios.

    python benchmarks/steering.py [--quick] [--only answering] [--device cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from behavior import answer
from benchmarks.trace import BATCH, TEXT, middle_model, middle_processor, questions, seconds
from concepts import ConceptDataset
from concepts.scenes.questions import as_example
from concepts.scenes.scene import TEST, generator, sample_scene
from concepts.schema import YES_NO, Question
from lvlm import Head, Lvlm, wrap_lvlm
from mitigation import SteeringVector
from mitigation.steering.changes import AddChange, AmplifyChange, VectorChange
from mitigation.steering.places import Key

NEW_TOKENS = 64
ASKED = ("cat", "dog", "car", "apple", "cup", "bus")
GOALS = {"steered_generation_vs_plain": ("<=", 1.03), "answering_throughput_vs_plain": (">=", 0.9)}


def vector(model: Lvlm, kind: str, count: int) -> SteeringVector:
    """Make a vector at so many heads, spread over all layers."""
    rng = np.random.default_rng(0)
    every = [Head(i, k) for i in range(model.n_layers) for k in range(model.n_heads)]
    entries: dict[Key, VectorChange] = {}
    for head in every[:: len(every) // count][:count]:
        v = rng.standard_normal(model.head_dim)
        direction = v / np.linalg.norm(v)
        add = kind == "add"
        entries[head] = AddChange(direction, 0.1) if add else AmplifyChange(direction, reads=direction[None])
    return SteeringVector(entries, "last+generated", 1.0, model.name, model.config_hash)


def turns(
    what: Mapping[str, Callable[[], object]], n: int, device: torch.device, bar: Progress
) -> dict[str, list[float]]:
    """Time each in turn, another first every time, after one turn to warm up; seconds by name."""
    times: dict[str, list[float]] = {name: [] for name in what}
    order = list(what)
    task = bar.add_task(f"{' and '.join(order)}", total=(n + 1) * len(order))
    for turn in range(n + 1):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            times[name].append(seconds(what[name], device))
            bar.advance(task)
    return {name: column[1:] for name, column in times.items()}


def generation(model: Lvlm, n: int, new: int, bar: Progress) -> dict[str, list[float]]:
    """Time plain and steered generation of one batch."""
    batch = next(model.batches(questions(BATCH).examples, BATCH))

    def write() -> None:
        with torch.no_grad():
            out = model.hf.generate(**batch.inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        if out.shape[1] != batch.inputs["input_ids"].shape[1] + new:
            raise SystemExit(f"generated {out.shape[1]} tokens")  # noqa: EM102  # a check, not an error of a user

    def steered(steering: SteeringVector) -> None:
        with steering.applied(model):
            write()

    added, amplified = vector(model, "add", 48), vector(model, "amplify", 6)
    what = {"plain": write, "added": lambda: steered(added), "amplified": lambda: steered(amplified)}
    return turns(what, n, model.device, bar)


def polled(images: int) -> ConceptDataset:
    """Ask about every one of so many images whether each of six things is in it."""
    scenes = [sample_scene(generator(TEST, 1, i), f"p{i}") for i in range(images)]
    object_questions = [Question(TEXT.replace("cat", noun), "yes", YES_NO, "object", "existence") for noun in ASKED]
    return ConceptDataset("polled", tuple(as_example(s, q, "neutral") for s in scenes for q in object_questions))


def answering(network: Any, images: int, n: int, bar: Progress) -> dict[str, list[float]]:
    """Time plain forwards of encoded questions and answering them from the start."""
    plain = wrap_lvlm(network, middle_processor(), validate=False)
    data = polled(images)
    encoded = list(plain.batches(data.examples, BATCH))

    def forwards() -> None:
        for batch in encoded:
            plain.logits(batch.inputs)

    def run_answers() -> None:
        # A model keeps what its last images became; every turn starts without.
        answer(wrap_lvlm(network, middle_processor(), validate=False), data, BATCH, progress=False)

    return turns({"forwards": forwards, "answers": run_answers}, n, plain.device, bar)


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, about a minute")
    parser.add_argument("--only", choices=["generation", "answering"], help="one of the two parts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    console = Console()
    console.print("Compares steered with plain cached generation, and answering by logit margin with plain forwards.")
    n, new, images = (2, 16, 2) if options.quick else (5, NEW_TOKENS, 4)
    network: Any = middle_model()
    network.to(options.device, getattr(torch, options.dtype))
    model = wrap_lvlm(network, middle_processor(), validate=False)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        written = {} if options.only == "answering" else generation(model, n, new, bar)
        answered = {} if options.only == "generation" else answering(network, images, n, bar)
    values = {
        "steered_generation_vs_plain": (written.get("plain"), written.get("added")),
        "amplified_generation_vs_plain": (written.get("plain"), written.get("amplified")),
        "answering_throughput_vs_plain": (answered.get("forwards"), answered.get("answers")),
    }
    figures: dict[str, dict[str, Any]] = {}
    table = Table("figure", "plain", "candidate", "value", "goal", "holds", "n")
    for name, (first, second) in values.items():
        if first is None or second is None:
            continue
        columns = first, second
        sign, bound = GOALS.get(name, ("", 0.0))
        over, under = columns if "throughput" in name else columns[::-1]
        value = statistics.median(a / b for a, b in zip(over, under, strict=True))
        holds = not sign or (value <= bound if sign == "<=" else value >= bound)
        goal = f"{sign} {bound}" if sign else ""
        figures[name] = {"value": round(value, 3), "goal": goal, "holds": holds, "n": n}
        times = [f"{statistics.median(column) * 1000:.0f} ms" for column in columns]
        table.add_row(name, *times, f"{value:.3f}", goal, str(holds), str(n))
    console.print(table)
    cuda = options.device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    console.print(f"{model!r}: batch {BATCH}, {new} new tokens; {len(ASKED)} questions on each of {images} images")
    device = f"{where}, {options.dtype}, torch {torch.__version__}"
    print(json.dumps({"benchmark": "steering", "device": device, "figures": figures}))


if __name__ == "__main__":
    main()
