"""Speed of the digest of a model's weights, and of the check that the weights have not changed since.

    python benchmarks/weights_hash.py [--quick] [--device cuda]

The model is a stack of bfloat16 matrices of 4096 x 4096. Compared are the digest of all bytes, its repetition for unchanged
weights (which reuses the digest), the sampled digest of the first release, and, as baselines, hash functions of Python on one
core. Figures, as medians over repetitions:

GB/s
    gigabytes per second of the digest of all bytes;
seconds for 7 billion bfloat16
    the same, as time for the 14 GB of a model of 7 billion parameters;
ms where nothing changed
    milliseconds of the digest of unchanged weights.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._harness import (
    describe_device,
    figure,
    finish,
    option_parser,
    print_figures,
    progress,
    time_call,
    wide_console,
)
from lvlm.weights_hash import forget, sampled_weights_hash, weights_hash

WIDTH = 4096


def main() -> None:
    """Run, print tables, and as the last line one JSON object."""
    options = option_parser(__doc__, device=True).parse_args()
    matrices, n = (8, 3) if options.quick else (64, 5)
    model = nn.Module()
    for i in range(matrices):
        setattr(model, f"layer{i}", nn.Linear(WIDTH, WIDTH, bias=False, device=options.device, dtype=torch.bfloat16))
    size = sum(p.nbytes for p in model.parameters())
    matrix = next(model.parameters()).detach().cpu().view(torch.uint8).numpy().data
    times: dict[str, list[float]] = {"all bytes": [], "unchanged": [], "sample (first release)": []}
    with progress("digests", n) as advance:
        for _ in range(n):
            forget(model)
            times["all bytes"].append(time_call(lambda: weights_hash(model)))
            times["unchanged"].append(time_call(lambda: weights_hash(model)))
            times["sample (first release)"].append(time_call(lambda: sampled_weights_hash(model)))
            advance()
    medians = {name: statistics.median(values) for name, values in times.items()}
    title = f"{size / 1e9:.2f} GB in {matrices} matrices of bfloat16, {torch.get_num_threads()} threads"
    table = Table("digest", "ms", "GB/s on one core", title=title)
    for name, seconds in medians.items():
        table.add_row(name, f"{seconds * 1e3:.1f}", "")
    for name in ("sha256", "blake2b", "sha512", "sha3_256"):
        seconds = min(time_call(lambda name=name: hashlib.new(name, matrix)) for _ in range(n))
        table.add_row(f"one matrix by {name}", f"{seconds * 1e3:.1f}", f"{matrix.nbytes / seconds / 1e9:.2f}")
    wide_console().print(table)
    speed = size / medians["all bytes"] / 1e9
    figures = {
        "GB/s": figure(speed, ">= 1", n),
        "seconds for 7 billion bfloat16": figure(14 / speed, "<= 14", n),
        "ms where nothing changed": figure(medians["unchanged"] * 1e3, "<= 50", n),
    }
    print_figures(figures)
    finish("weights_hash", describe_device("torch", device=options.device), figures)


if __name__ == "__main__":
    main()
