"""Six questions about each image: answering and tracing to disk with a shared prefix, against one forward pass a question.

    python benchmarks/prefix.py [--quick] [--save] [--clock cpu]

The model is a LLaVA with random weights and 576 image tokens. A hook that does nothing, but whose effect is unknown to the
library, turns sharing off, so that baseline and candidate are the same calls. The baseline takes one question in a forward pass;
batches of whole prompts, in which rows about one image share the vision tower, are shown too. Times are wall clock, or CPU
seconds with ``--clock cpu`` if other processes use the machine.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from activation_store import ActivationStore, trace
from behavior import answer
from benchmarks._harness import describe_device, figure, finish, option_parser, print_figures, progress
from benchmarks._medium_llava import build_network, build_processor
from concepts import ConceptDataset
from concepts.question import Question
from concepts.scenes.questions import YES_NO, as_example
from concepts.scenes.scene import TEST, generator, sample_scene
from lvlm import Lvlm, wrap_lvlm

IMAGE_SIDE = 24
QUESTIONS = (
    "Is there a cat in the image?",
    "Is there a dog or a cat in the image?",
    "Is there a big apple in the image?",
    "Is there a big cat or a dog or a dog in the image?",
    "Is there a bus or a car in the image?",
    "Is there a red car in the image?",
)
SITES, TOKENS = ("resid_post", "z"), ("last", "image:mean", "suffix:mean")


def questions(images: int) -> ConceptDataset:
    """Return six questions of different length about each image."""
    examples = []
    for i in range(images):
        scene = sample_scene(generator(TEST, 0, i), f"b{i}")
        for n, text in enumerate(QUESTIONS):
            question = Question(text, "yes", YES_NO, "object", f"existence {n}")
            examples.append(as_example(scene, question, "neutral"))
    return ConceptDataset("prefix", tuple(examples))


@contextmanager
def unshared(model: Lvlm) -> Iterator[None]:
    """Turn sharing off while the context is open."""
    handle = model.hf.register_forward_hook(lambda _module, _args, _output: None)
    try:
        yield
    finally:
        handle.remove()


def read_all(store: ActivationStore) -> dict[str, np.ndarray]:
    """Return every stored array by name and layer."""
    return {
        f"{a.name} {layer}": np.asarray(store.read(f"{a.stack}.L{layer}.{a.component}", a.tokens))
        for a in store.arrays
        for layer in a.layers
    }


def main() -> None:
    """Measure, print and save."""
    parser = option_parser(__doc__, save=True, device=True, dtypes=("float32", "float16", "bfloat16"))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="wall clock (default) or CPU seconds")
    args = parser.parse_args()
    layers, heads, images, repetitions = (8, 8, 2, 5) if args.quick else (12, 16, 4, 5)
    dtype = getattr(torch, args.dtype)
    network = build_network(layers, heads, IMAGE_SIDE).to(args.device, dtype)
    model = wrap_lvlm(network, build_processor(IMAGE_SIDE), name="random", validate=False)
    data = questions(images)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    batch_size = 6 * images

    def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
        start = clock()
        result = work()
        if args.device.startswith("cuda"):
            torch.cuda.synchronize(args.device)
        return clock() - start, result

    def ask(size: int, *, share: bool) -> Any:
        if share:
            return answer(model, data, batch_size=size, progress=False)
        with unshared(model):
            return answer(model, data, batch_size=size, progress=False)

    def traced(size: int, *, share: bool) -> dict[str, np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {"batch_size": size, "unembedding": False, "progress": False}
            if share:
                return read_all(trace(model, data, SITES, TOKENS, Path(folder) / "store", **options))
            with unshared(model):
                return read_all(trace(model, data, SITES, TOKENS, Path(folder) / "store", **options))

    figures: dict[str, Any] = {}
    works = {"answering": (ask, ">= 3.5"), "tracing": (traced, ">= 2.5")}
    with progress("prefix", len(works) * (repetitions + 1) * 3) as advance:
        for name, (work, goal) in works.items():
            times: dict[str, list[float]] = {"single": [], "batched": [], "shared": []}
            results: dict[str, Any] = {}
            for repetition in range(repetitions + 1):
                order = ["single", "batched", "shared"]
                for kind in order if repetition % 2 else reversed(order):
                    size = 1 if kind == "single" else batch_size
                    spent, results[kind] = seconds(lambda w=work, s=size, k=kind: w(s, share=k == "shared"))
                    if repetition:  # the first is a warm-up
                        times[kind].append(spent)
                    advance()
            medians = {kind: statistics.median(values) for kind, values in times.items()}
            n = {"n": repetitions, "seconds": {kind: round(value, 3) for kind, value in medians.items()}}
            figures[f"{name}: one forward a question / shared"] = figure(
                medians["single"] / medians["shared"], goal, **n
            )
            figures[f"{name}: batches of whole prompts / shared"] = figure(
                medians["batched"] / medians["shared"], n=repetitions
            )
            if name == "answering":
                rows = zip(results["single"].answers, results["shared"].answers, strict=True)
                error = max(abs(a.margin - b.margin) for a, b in rows)
                if results["shared"].provenance.get("prefixes") != "shared":
                    sys.exit("the prefixes were not shared")
            else:
                error = max(float(np.abs(results["single"][k] - results["shared"][k]).max()) for k in results["single"])
            limit = ("<= 1e-4" if name == "answering" else "<= 1e-5") if args.dtype == "float32" else ""
            what = "largest difference of margins" if name == "answering" else "largest difference of stored values"
            figures[f"{name}: {what}"] = figure(error, limit, n=len(data))
    tokens = [model.encode(e).tokens.length for e in data.examples[:6]]
    print(
        f"{layers} layers, hidden size {64 * heads}, {IMAGE_SIDE**2} image tokens, prompts of {min(tokens)}-{max(tokens)} tokens"
    )
    print_figures(figures, f"six questions about each of {images} images, {args.clock} seconds")
    device = describe_device("torch", "transformers", device=args.device, dtype=args.dtype)
    finish("prefix", device, figures, save=args.save, clock=args.clock, layers=layers, width=64 * heads)


if __name__ == "__main__":
    main()
