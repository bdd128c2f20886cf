"""What probes find in the embedded model: where colour, noun and relation are decodable, also where it answers by prior.

    python benchmarks/probes_embedded.py [--quick] [--save]

Everything is synthetic. Scores are balanced accuracies on held-out images, means over the concepts named; chance is 0.5.
Probes are fitted on the neutral split only. "Wrong by prior" are answers on the conflict split that the model gets wrong;
their images are other ones than those the probes were fitted to.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from activation_store import ActivationStore, trace
from concepts import scenes
from lvlm import load_lvlm
from probes import ProbeGrid, alignment, fit_grid, lens, probeable

RESULTS = Path(__file__).parent / "results" / "probes_embedded.json"
SITES = ["resid_post", "vision.resid_post", "projector.out"]
TOKENS = ["last", "image:mean", "object:mean", "question:mean"]
PLACES = (
    ("color", "vision", "resid_post", "object:mean"),
    ("color", "projector", "out", "object:mean"),
    ("color", "decoder", "resid_post", "object:mean"),
    ("color", "decoder", "resid_post", "last"),
    ("noun", "vision", "resid_post", "image:mean"),
    ("noun", "projector", "out", "image:mean"),
    ("noun", "decoder", "resid_post", "image:mean"),
    ("relation", "vision", "resid_post", "image:mean"),
    ("relation", "projector", "out", "image:mean"),
    ("relation", "decoder", "resid_post", "last"),
)


def by_layer(grid: ProbeGrid, score: str = "balanced_accuracy") -> list[float]:
    """Return the mean over concepts at each layer."""
    return [round(float(v), 3) for v in getattr(grid, score).mean(axis=(0, 2))]


def measure(store: ActivationStore) -> dict[str, Any]:
    """Fit every place and collect figures."""
    frame = store.frame()
    neutral = (frame["split"] == "neutral").to_numpy()
    wrong = ((frame["split"] == "conflict") & (frame["correct"] == 0)).to_numpy()
    possible = [c for c in probeable(store, folds=3, rows=neutral) if not c.endswith(":named")]
    kinds = {
        "color": [c for c in possible if c.startswith("attribute:")],
        "noun": [c for c in possible if c.startswith("object:")][:6],
        "relation": [c for c in possible if c.startswith("relation:")],
    }
    figures: dict[str, Any] = {}
    for kind, stack, component, tokens in PLACES:
        if not kinds[kind]:
            continue
        grid = fit_grid(store, kinds[kind], component, tokens, stack, folds=3, control=1, rows=neutral)
        entry: dict[str, Any] = {
            "value": by_layer(grid),
            "low": by_layer(grid, "low"),
            "control": by_layer(grid, "control"),
            "concepts": len(kinds[kind]),
            "n": int(grid.n_test.max()),
        }
        if kind == "color":
            moved: Any = grid.transfer({"wrong by prior": (store, wrong)}, resamples=1)
            entry["where_wrong_by_prior"] = [
                round(float(v), 3) for v in moved.groupby("layer")["balanced_accuracy"].mean()
            ]
            entry["n_wrong_by_prior"] = int(moved["n"].max())
        figures[f"{kind} at {stack}.{component} {tokens}"] = entry
    vocabulary = lens.read_vocabulary(store.path)
    words = [c for c in kinds["noun"] if c.split(":")[1] in vocabulary]
    if words:
        read: Any = lens.object_readout(store, words, vocabulary, rows=neutral, resamples=200)
        auc = [round(float(v), 3) for v in read.groupby("layer")["auc"].mean()]
        figures["noun by the unembedding at image:mean, auc"] = {"value": auc, "n": int(read["n"].max())}
    alike: Any = alignment.layerwise(store, permutations=100)
    for name, part in alike.groupby("measure"):
        figures[f"image and question tokens, {name}"] = {
            "value": [round(float(v), 3) for v in part["value"]],
            "baseline": [round(float(v), 3) for v in part["baseline"]],
            "n": int(part["n"].max()),
        }
    return figures


def main() -> None:
    """Trace, fit, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images, about a minute")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    console.print("Compares what probes read from the embedded model, place by place, with shuffled labels.")
    data = scenes.dataset(n_images=80 if options.quick else 250, seed=0).filter(lambda e: bool(e.candidates))
    model = load_lvlm("tiny")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        trace(model, data, sites=SITES, tokens=TOKENS, out=path)
        lens.keep_vocabulary(path, model.processor.tokenizer.get_vocab())
        figures = measure(ActivationStore(path))
    table = Table("where", "by layer", "beside it", "n")
    for name, f in figures.items():
        beside = {k: v for k, v in f.items() if k not in {"value", "n"}}
        table.add_row(name, str(f["value"]), "; ".join(f"{k} {v}" for k, v in beside.items()), str(f["n"]))
    console.print(table)
    device = f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}"
    outcome = {"benchmark": "probes_embedded", "device": device, "figures": figures}
    if options.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(outcome, indent=1) + "\n")
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
