"""Shared by the parts of benchmarks/store.py: timing of variants in random order, and stores to measure."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activation_store import ArrayInfo, Schema, StoreWriter
from benchmarks._harness import progress

WIDTH, HEADS = 4096, 32


class Bench:
    """Times variants in random order."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self._random = random.Random(0)

    def time(
        self, label: str, variants: Mapping[str, Callable[[], object]], before: Callable[[str], object] | None = None
    ) -> dict[str, list[float]]:
        """Time each variant `repeats` times after one warm-up; `before` is called before each and not timed."""
        times: dict[str, list[float]] = {name: [] for name in variants}
        with progress(label, self.repeats + 1) as advance:
            for _ in range(self.repeats + 1):
                for name in self._random.sample(list(variants), len(variants)):
                    if before:
                        before(name)
                    start = time.perf_counter()
                    variants[name]()
                    times[name].append(time.perf_counter() - start)
                advance()
        return {name: column[1:] for name, column in times.items()}


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median ratio over repetitions."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def ms(times: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return round(1000 * statistics.median(times), 2)


def info(layers: int, component: str = "z") -> ArrayInfo:
    """Return the array that is written: z, with heads of 128."""
    return ArrayInfo("decoder", component, "last", layers, WIDTH, HEADS)


def batches(examples: int, layers: int, batch: int) -> list[np.ndarray]:
    """Return up to four different batches [batch, L, D], which are written repeatedly."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, layers, WIDTH), np.float32) for _ in range(min(4, examples // batch))]


def fill(writer: StoreWriter, data: Sequence[np.ndarray], examples: int, array: ArrayInfo) -> None:
    """Append `examples` examples."""
    batch = len(data[0])
    for at in range(0, examples, batch):
        names = [str(i) for i in range(at, at + batch)]
        writer.append({array.key: data[at // batch % len(data)]}, {"id": names, "group": names})


def write_store(
    folder: Path, data: Sequence[np.ndarray], examples: int, layers: int, shard: int, **options: Any
) -> None:
    """Write a store."""
    shutil.rmtree(folder, ignore_errors=True)
    with StoreWriter(folder, Schema((info(layers),), **options), {}, shard_size=shard) as writer:
        fill(writer, data, examples, info(layers))
