"""What the parts of the store's benchmark share: turns in random order, and stores to be measured."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from activation_store import ArrayInfo, Schema, StoreWriter

WIDTH, HEADS = 4096, 32
Figure = dict[str, Any]


class Bench:
    """Runs variants in turn, in random order, and keeps their times in seconds."""

    def __init__(self, repeats: int, progress: Progress) -> None:
        self.repeats = repeats
        self._progress = progress
        self._random = random.Random(0)

    def turns(
        self, what: str, variants: Mapping[str, Callable[[], object]], before: Callable[[str], object] | None = None
    ) -> dict[str, list[float]]:
        """Time each variant so many times, after once to warm up; `before` is not timed."""
        times: dict[str, list[float]] = {name: [] for name in variants}
        task = self._progress.add_task(what, total=self.repeats + 1)
        for _ in range(self.repeats + 1):
            for name in self._random.sample(list(variants), len(variants)):
                if before:
                    before(name)
                start = time.perf_counter()
                variants[name]()
                times[name].append(time.perf_counter() - start)
            self._progress.advance(task)
        return {name: column[1:] for name, column in times.items()}


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the ratios of each turn."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def ms(times: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return round(1000 * statistics.median(times), 2)


def info(layers: int, component: str = "z") -> ArrayInfo:
    """Return the array that is written: z, with heads of 128."""
    return ArrayInfo("decoder", component, "last", layers, WIDTH, HEADS)


def batches(examples: int, layers: int, batch: int) -> list[np.ndarray]:
    """Return a few different batches [batch, L, D] to be given again and again."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, layers, WIDTH), np.float32) for _ in range(min(4, examples // batch))]


def fill(writer: StoreWriter, data: Sequence[np.ndarray], examples: int, array: ArrayInfo) -> None:
    """Append so many examples."""
    batch = len(data[0])
    for at in range(0, examples, batch):
        names = [str(i) for i in range(at, at + batch)]
        writer.append({array.key: data[at // batch % len(data)]}, {"id": names, "group": names})


def written(folder: Path, data: Sequence[np.ndarray], examples: int, layers: int, shard: int, **options: Any) -> None:
    """Write a store."""
    shutil.rmtree(folder, ignore_errors=True)
    with StoreWriter(folder, Schema((info(layers),), **options), {}, shard_size=shard) as writer:
        fill(writer, data, examples, info(layers))
