"""Activations in memory read like a store with the same content, and are refused where a store would refuse them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from activation_store import ActivationSource, ActivationStore, ArrayInfo, MemorySource, Schema, StoreWriter
from groundscope.core.errors import SiteError, StoreError
from probes import fit_grid

N = 60
TABLE = {"id": [f"e{i}" for i in range(N)], "group": [f"g{i // 2}" for i in range(N)]}
LABEL = (np.arange(N) // 2 % 2).astype(float)
Z = np.random.default_rng(0).normal(size=(N, 2, 8)).astype(np.float32) + LABEL[:, None, None]


def test_a_memory_source_reads_like_a_store(tmp_path: Path) -> None:
    table = {**TABLE, "object:cat": LABEL.tolist()}
    memory = MemorySource({("z", "image:mean"): Z}, table, n_heads=4)
    info = ArrayInfo("decoder", "z", "image:mean", n_layers=2, width=8, n_heads=4)
    with StoreWriter(tmp_path, Schema((info,)), {}) as writer:
        writer.append({info.key: Z}, table)
    store = ActivationStore(tmp_path)
    sources: list[ActivationSource] = [memory, store]
    assert memory.arrays == store.arrays
    assert len(memory) == len(store)
    for rows in (None, [3, 1], np.arange(N) % 3 == 0, slice(4, 9)):
        for head in (None, 2):
            first, second = (s.read("decoder.L1.z", "image:mean", head, rows) for s in sources)
            np.testing.assert_array_equal(first, second)
    grids = [
        fit_grid(s, ["object:cat"], "z", tokens="image:mean", folds=2, control=0, resamples=2, progress=False)
        for s in sources
    ]
    np.testing.assert_array_equal(grids[0].weights, grids[1].weights)


def test_the_digest_covers_values_and_table() -> None:
    source = MemorySource({"resid_post": Z}, TABLE)
    assert source.digest == MemorySource({"resid_post": Z.copy()}, pd.DataFrame(TABLE)).digest
    changed = Z.copy()
    changed[0, 0, 0] += 1
    others = [
        MemorySource({"resid_post": changed}, TABLE),
        MemorySource({"resid_post": Z}, {**TABLE, "object:cat": LABEL}),
        MemorySource({"mlp_out": Z}, TABLE),
    ]
    assert len({source.digest, *(s.digest for s in others)}) == 4


def test_arrays_and_tables_of_different_length_are_refused() -> None:
    with pytest.raises(StoreError, match="misses the column group"):
        MemorySource({"z": Z}, {"id": TABLE["id"]})
    with pytest.raises(StoreError, match="repeats an id"):
        MemorySource({"z": Z}, {**TABLE, "id": ["a"] * N})
    with pytest.raises(StoreError, match=r"give \[N, layers, width\] with N = 60"):
        MemorySource({"z": Z[:3]}, TABLE)
    with pytest.raises(SiteError, match="unknown site 'zz'"):
        MemorySource({"zz": Z}, TABLE)
    source = MemorySource({"z": Z}, TABLE)
    with pytest.raises(SiteError, match=r"layer 5 of decoder\.L5\.z not in this source"):
        source.read("decoder.L5.z", "last")
    with pytest.raises(SiteError, match=r"choose from decoder.z at last"):
        source.read("decoder.L0.z", "image:mean")
    with pytest.raises(SiteError, match=r"head 1 of decoder.L0.z not in this source: it has no heads"):
        source.read("decoder.L0.z", "last", 1)
