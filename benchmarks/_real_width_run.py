"""Run by benchmarks/real_width.py in a separate process: one step on a model, whose peak memory is printed as JSON.

    python benchmarks/_real_width_run.py STEP FOLDER DTYPE DEVICE [THREADS]

The JSON object has ``weights`` and ``peak`` in bytes, and ``tokens``, the length of a prompt.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from activation_store import ActivationStore, ConceptDirection, trace
from circuits import HeadSet, ablate, patch_heads
from concepts import CounterfactualPair, counterfactuals, scenes
from concepts.schema import ConceptDataset, Example
from diagnosis import diagnose
from lvlm import Head, Lvlm, Site, load_lvlm
from lvlm.site_width import site_width
from mitigation import Contrast, derive

EXAMPLES, BATCH = 2, 2
SITES = ["resid_post", "z", "mlp_out", "vision.resid_post", "projector.out"]
TOKENS = ["last", "image:mean", "object:mean"]
QUESTION = "Please answer yes or no : {question}"


def questions(count: int, kind: str = "existence") -> ConceptDataset:
    """Return yes-no questions of equal length about `count` scenes."""
    data = scenes.dataset(10, 0, splits=("neutral",)).filter(lambda e: e.kind == kind)
    first = list({e.group: e for e in data}.values())[:count]
    long_questions = {e.id: replace(e, question=QUESTION.format(question=e.question)) for e in first}
    return ConceptDataset(data.name, tuple(long_questions.values()), {})


def do_trace(model: Lvlm, folder: Path) -> ActivationStore:
    """Trace the sites and tokens of the default run."""
    return trace(model, questions(EXAMPLES), SITES, TOKENS, folder / "store", batch_size=BATCH, progress=False)


def do_patch(model: Lvlm, _: Path) -> None:
    """Patch every head of one pair."""
    patch_heads(model, pairs(1), min_effect=0.0, progress=False)


def do_ablate(model: Lvlm, _: Path) -> None:
    """Ablate all heads at all tokens, by means and by resampling."""
    examples = list(questions(EXAMPLES))
    heads = [Head(layer, h) for layer in range(model.n_layers) for h in range(model.n_heads)]
    for method in ("mean", "resample"):
        ablate(model, examples, [HeadSet(heads)], method=method, tokens="all", batch_size=BATCH, progress=False)  # type: ignore[arg-type]


def do_steer(model: Lvlm, _: Path) -> None:
    """Derive a vector from pairs, and answer and generate with it."""
    from behavior import answer

    keys = [Head(layer, head) for layer in range(model.n_layers) for head in range(0, model.n_heads, 8)]
    vector = derive.mean_difference(Contrast.from_pairs(model, pairs(2)), heads=keys)
    with vector.applied(model):
        answer(model, questions(EXAMPLES), batch_size=BATCH, progress=False)
        model.generate_batch(next(model.batches(list(questions(1)), 1)), 4)


def do_diagnose(model: Lvlm, folder: Path) -> None:
    """Diagnose answers with probes of random directions."""
    store = do_trace(model, folder)
    reset()
    rng = np.random.default_rng(0)
    last = f"decoder.L{model.n_layers - 1}.resid_post"
    places = (f"vision.L{model.n_vision_layers - 1}.resid_post", "projector.out", last)
    nouns = [c for c in store.labels if c.startswith("object:") and c != "object:named"]
    widths = {site: site_width(model, Site.parse(site)) for site in places}
    directions = [
        ConceptDirection(site, "image:all", noun, unit(rng, width)) for site, width in widths.items() for noun in nouns
    ]
    directions.append(ConceptDirection(last, "last", "object:named", unit(rng, model.width)))
    diagnose(model, store, directions, list(questions(EXAMPLES)), progress=False)


def pairs(count: int) -> list[CounterfactualPair]:
    """Return pairs whose questions have the length of `questions`."""
    data = scenes.dataset(20, 1, splits=("neutral",))
    short_pairs = counterfactuals.pairs(data, "object", limit=count)

    def longer(example: Example) -> Example:
        return replace(example, question=QUESTION.format(question=example.question))

    return [replace(p, clean=longer(p.clean), corrupt=longer(p.corrupt)) for p in short_pairs]


def unit(rng: np.random.Generator, width: int) -> np.ndarray:
    """Return a random vector of length 1."""
    vector = rng.normal(size=width)
    return vector / np.linalg.norm(vector)


def reset() -> None:
    """Reset the peak memory of the process to its current memory."""
    Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def memory_bytes(name: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


STEPS: dict[str, Callable[[Lvlm, Path], object]] = {
    "trace": do_trace,
    "patch": do_patch,
    "ablate": do_ablate,
    "steer": do_steer,
    "diagnose": do_diagnose,
}


def main() -> None:
    """Run the step, and print its memory."""
    step, folder, dtype, device = sys.argv[1:5]
    torch.set_num_threads(int(sys.argv[5]) if len(sys.argv) > 5 else torch.get_num_threads())
    idle = memory_bytes("VmRSS")
    reset()
    model = load_lvlm(folder, dtype=dtype, device=device, validate=step == "load")
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    tokens = model.encode(questions(1).examples[0]).tokens.length
    if step != "load":
        reset()
        with tempfile.TemporaryDirectory() as place:
            STEPS[step](model, Path(place))
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else memory_bytes("VmHWM") - idle
    print(json.dumps({"weights": weights, "peak": peak, "tokens": tokens}))


if __name__ == "__main__":
    main()
