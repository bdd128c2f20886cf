"""What estimating instead of patching costs and what it is worth; what splitting an answer by source costs.

Cost, on the random LLaVA of middle size of benchmarks/trace.py (256 image and 32 question tokens), in turns with plain
forwards of the same prompts: attribution patching of all heads and positions of a pair; the same with gradients at five
points between the runs; `circuits.sources.split` of four questions, over plain forwards of its distinct coalitions in
batches of the same size.

Worth, on the embedded model: how the estimates rank heads beside exact patching, with intervals over scenes, for each
level; and how faithful the best heads alone are (CPR) by exact patching, by the estimates and by chance.

    python benchmarks/attribution.py [--quick] [--save]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.patching import build, pair_of
from benchmarks.trace import alternate, questions
from circuits import HeadScores, attribution, compare, faithfulness, patch_heads, sources
from concepts import counterfactuals, scenes
from lvlm import Lvlm, load_lvlm

RESULTS = Path(__file__).parent / "results" / "attribution.json"
GOALS = {"attribution_patching": 5.0, "five_points": 20.0, "sources": 1.3}
KINDS = {"object": "object", "attribute": "color", "relation": "relation"}
ESTIMATES: dict[str, dict[str, Any]] = {
    "run": {},
    "source": {"point": "source"},
    "path": {"point": "path"},
    "dropped": {"drop": True},
}
"""What each estimate is called and asked for with."""


def cost(n: int) -> dict[str, dict[str, Any]]:
    """Time estimates and splits against plain forwards, in turns."""
    model, cpu = build(), torch.device("cpu")
    pair = pair_of()
    inputs = model.collate([model.encode(pair.corrupt)])
    figures: dict[str, dict[str, Any]] = {}

    def forwards(one: Callable[[], object], count: int) -> Callable[[], object]:
        return lambda: [one() for _ in range(count)]

    options: dict[str, Any] = {"min_effect": 0, "progress": False}
    for name, more in (("attribution_patching", {}), ("five_points", {"point": "path", "steps": 5})):
        times = alternate(
            forwards(lambda: model.logits(inputs), 4),
            lambda more=more: attribution.heads(model, [pair], "image", **options, **more),
            n,
            cpu,
        )
        figures[name] = _figure(name, [taken / (plain / 4) for plain, taken in times], "plain forwards")

    asked = list(questions(4))
    neutral = [asked[0].question.replace("cat", "dog")]

    def split() -> sources.Sources:
        return sources.split(model, asked, neutral_questions=neutral, progress=False, batch_size=8)

    found = split()
    distinct = sum(one.forwards for one in found.examples)
    batch = model.collate([model.encode(e) for e in asked] * 2)
    times = alternate(
        forwards(lambda: model.logits(batch), distinct // 8),
        split,
        n,
        cpu,
    )
    figures["sources"] = _figure("sources", [taken / plain for plain, taken in times], f"forwards of {distinct} inputs")
    return figures


def _figure(name: str, ratios: list[float], of: str) -> dict[str, Any]:
    value = round(statistics.median(ratios), 2)
    spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
    goal = GOALS[name]
    return {"value": value, "of": of, "range": spread, "goal": f"<= {goal}", "holds": value <= goal, "n": len(ratios)}


def worth(model: Lvlm, images: int) -> dict[str, dict[str, Any]]:
    """Compare estimated with exact effects, and how faithful the heads are that each ranks first."""
    figures: dict[str, dict[str, Any]] = {}
    data, held_out = (scenes.dataset(n_images=images, seed=seed) for seed in (0, 1))
    for level, kind in KINDS.items():
        pairs = counterfactuals.pairs(data, kind=kind, limit=images)
        exact = patch_heads(model, pairs, "suffix", progress=False)
        rankings: dict[str, HeadScores | np.ndarray] = {"exact": exact}
        for name, more in ESTIMATES.items():
            estimate = attribution.heads(model, pairs, "suffix", progress=False, **more)
            rankings[name] = estimate
            found = compare(exact, estimate, k=(5,))
            figures[f"{level}_{name}"] = {
                "rank_correlation": str(found.rank_correlation),
                "overlap_at_5": str(found.overlap[5]),
                "pairs": exact.n_pairs,
            }
        examples = [e for e in held_out if e.level == level and e.candidates][:images]
        rng = np.random.Generator(np.random.PCG64(0))
        rankings["random"] = rng.normal(size=exact.shape)
        for name, ranking in rankings.items():
            curve = faithfulness.curve(model, examples, ranking, progress=False)
            figures.setdefault(f"{level}_{name}", {})["cpr"] = str(curve.interval("cpr"))
    return figures


def main() -> None:
    """Run, print tables, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions and images, about a minute")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    console = Console()
    console.print("Compares attribution patching and source attribution with plain forwards, and with exact patching.")
    figures = cost(1 if options.quick else 9)
    table = Table("figure", "times", "of", "range", "goal", "holds", "n")
    for name, f in figures.items():
        table.add_row(name, *(str(f[k]) for k in ("value", "of", "range", "goal", "holds", "n")))
    console.print(table)
    agreement = worth(load_lvlm("tiny"), 8 if options.quick else 120)
    table = Table("embedded model, level and ranking", "rank correlation with exact", "of the best 5", "CPR")
    for name, f in agreement.items():
        table.add_row(name, *(str(f.get(k, "")) for k in ("rank_correlation", "overlap_at_5", "cpr")))
    console.print(table)
    device = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    outcome = {"benchmark": "attribution", "device": device, "figures": {**figures, **agreement}}
    if options.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(outcome, indent=1) + "\n")
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
