"""Stores held in memory, with planted concepts: what the tests of probes fit on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from activation_store import ArrayInfo

PLANTED = ("object:apple", "attribute:green", "relation:left of")


class MemoryStore:
    """A store held in memory: arrays [N, L, D] by (stack, component, tokens)."""

    digest = "d" * 64

    def __init__(self, table: pd.DataFrame, arrays: dict[tuple[str, str, str], np.ndarray], n_heads: int = 4) -> None:
        self.table, self.values = table, arrays
        self.arrays = tuple(
            ArrayInfo(*key, n_layers=x.shape[1], width=x.shape[2], n_heads=n_heads if key[1] == "z" else None)
            for key, x in arrays.items()
        )

    @property
    def provenance(self) -> Mapping[str, Any]:
        return {}

    def frame(self) -> pd.DataFrame:
        return self.table.copy()

    def read(self, site: str, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        assert head is None  # a layer is read once, whole
        stack, _, tail = site.partition(".")
        layer, _, component = tail.partition(".")
        if stack == "projector":
            layer, component = "L0", "out"
        return self.values[stack, component, str(tokens)][examples, int(layer[1:])].astype(np.float32)


def make_store(seed: int = 0, n_groups: int = 150, size: int = 4, layers: int = 3, width: int = 6) -> MemoryStore:
    """Images of several questions; features have a part that is common to the image.

    Planted: apple (a property of the image) in L1.H2 of z, green (of the object asked about, undefined for a third) in
    L2.H0, left of nowhere.
    """
    rng = np.random.default_rng(seed)
    n = n_groups * size
    group = np.repeat(np.arange(n_groups), size)
    labels = np.column_stack(
        [np.repeat(rng.random(n_groups) < 0.4, size), rng.random(n) < 0.3, rng.random(n) < 0.5]
    ).astype(float)
    labels[np.repeat(rng.random(n_groups) < 0.33, size), 1] = np.nan

    def noise(count: int, d: int) -> np.ndarray:
        return rng.normal(size=(n_groups, count, d))[group] + rng.normal(size=(n, count, d))

    z = noise(layers, 4 * width) * rng.uniform(0.1, 10, (layers, 4 * width)) + 3
    scale = z.std(axis=0)
    for concept, layer, head in ((0, 1, 2), (1, 2, 0)):
        at = slice(head * width, (head + 1) * width)
        direction = rng.choice([-1.0, 1.0], width)
        z[:, layer, at] += 0.9 * np.nan_to_num(labels[:, concept])[:, None] * direction * scale[layer, at]
    objects = noise(1, 8)
    objects[rng.random(n) < 0.1] = np.nan
    table = pd.DataFrame(
        {
            "id": [f"q{i}" for i in range(n)],
            "group": [f"scene{g}" for g in group],
            "question": "?",
            "answer": "yes",
            "split": "random",
            "kind": np.where(np.arange(n) % 2, "existence", "color"),
            "level": "object",
        }
    )
    for k, concept in enumerate(PLANTED):
        table[concept] = labels[:, k].astype(np.float32)
    arrays = {
        ("decoder", "z", "last"): z,
        ("decoder", "resid_post", "last"): noise(layers, 50),
        ("decoder", "resid_post", "object:mean"): objects,
        ("projector", "out", "image:mean"): noise(1, 8),
    }
    return MemoryStore(table, arrays)
