"""How fast a model's weights are identified: all bytes, by each algorithm, and the check that nothing changed since.

python benchmarks/weights_hash.py [--quick] [--device cuda]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from lvlm.weights_hash import forget, sampled_weights_hash, weights_hash

WIDTH = 4096


def timed(run: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    matrices, rounds = (8, 3) if options.quick else (64, 5)
    model = nn.Module()
    for i in range(matrices):
        setattr(model, f"layer{i}", nn.Linear(WIDTH, WIDTH, bias=False, device=options.device, dtype=torch.bfloat16))
    size = sum(p.nbytes for p in model.parameters())
    some = next(model.parameters()).detach().cpu().view(torch.uint8).numpy().data
    print(
        f"{size / 1e9:.2f} GB in {matrices} matrices {WIDTH} x {WIDTH} of bfloat16, {torch.get_num_threads()} threads"
    )
    seconds: dict[str, list[float]] = {"all bytes": [], "unchanged": [], "sample of the first release": []}
    for _ in range(rounds):
        forget(model)
        seconds["all bytes"].append(timed(lambda: weights_hash(model)))
        seconds["unchanged"].append(timed(lambda: weights_hash(model)))
        seconds["sample of the first release"].append(timed(lambda: sampled_weights_hash(model)))
    took = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in took.items():
        print(f"{name:30} {value * 1e3:9.1f} ms")
    for name in ("sha256", "blake2b", "sha512", "sha3_256"):
        best = min(timed(lambda name=name: hashlib.new(name, some)) for _ in range(rounds))
        print(f"{name:30} {some.nbytes / best / 1e9:9.2f} GB/s on one core")
    speed = size / took["all bytes"] / 1e9
    figures = {
        "GB/s": {"value": round(speed, 2), "goal": ">= 1", "holds": speed >= 1, "n": rounds},
        "seconds for 7 billion bfloat16": {
            "value": round(14 / speed, 1),
            "goal": "<= 14",
            "holds": speed >= 1,
            "n": rounds,
        },
        "ms where nothing changed": {
            "value": round(took["unchanged"] * 1e3, 2),
            "goal": "<= 50",
            "holds": took["unchanged"] <= 0.05,
            "n": rounds,
        },
    }
    print(json.dumps({"benchmark": "weights_hash", "device": options.device, "figures": figures}))


if __name__ == "__main__":
    main()
