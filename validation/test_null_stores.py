"""False positives of permutation tests on stores in which labels mean nothing: at .05 in at most 5 % of them.

`make validate` runs this folder; `make test` runs a small sample of it (tests/core/test_permutations.py).
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from concepts import scenes
from probes import fit_grid, permutation_test
from probes.protocol.controls import shuffle_labels
from tests.toys.memory_store import MemoryStore
from tests.toys.simulated_data import KINDS, mean_distance_p, null_store

STORES = 300
LEVEL = 0.01
"""Of the binomial test that a rate of .05 gives so many."""


def check(wrong: int, n: int) -> None:
    """Fail where so many p-values up to .05 are unlikely at a rate of .05."""
    assert binomtest(wrong, n, 0.05, alternative="greater").pvalue > LEVEL, f"{wrong} of {n}"


def p_values(store: MemoryStore, concepts: list[str], seed: int) -> list[float]:
    """Return the p-values of a permutation test of a grid's only cell, one a concept."""
    grid = fit_grid(
        store, concepts, "resid_post", folds=3, seed=seed, control=0, resamples=2, C=(1e-2, 1.0), progress=False
    )
    return permutation_test(grid, store, permutations=99, seed=seed, progress=False).p[:, 0, 0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_permutation_test_on_null_stores(kind: str) -> None:
    p = [value for seed in range(STORES) for value in p_values(null_store(kind, seed), ["object:a"], seed)]
    check(sum(value <= 0.05 for value in p), STORES)


@pytest.mark.parametrize("kind", KINDS)
def test_any_statistic_holds(kind: str) -> None:
    """The distance of the classes' means, which reads agreement within groups: the statistic that showed 40 to 50 %."""
    check(sum(mean_distance_p(shuffle_labels, kind, seed) <= 0.05 for seed in range(STORES)), STORES)


def test_permutation_test_with_the_groups_of_scenes() -> None:
    """Labels and numbers of questions as scenes have them, features that belong to the image and mean nothing."""
    concepts = ["object:car", "object:star"]
    p: list[float] = []
    for seed in range(60):
        data = scenes.dataset(120, seed=20000 + seed).filter(lambda e: bool(e.candidates))
        names = np.array([e.group for e in data])
        own, of_row = np.unique(names, return_inverse=True)
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(len(own), 1, 8))[of_row] + 0.3 * rng.normal(size=(len(names), 1, 8))
        store = null_store("equal", 0)
        table = store.table.iloc[:0].reindex(range(len(names)))
        table["id"], table["group"] = [f"r{i}" for i in range(len(names))], names
        for concept in concepts:
            table[concept] = [float(e.labels.get(concept, np.nan)) for e in data]
        p += p_values(MemoryStore(table, {("decoder", "resid_post", "last"): features}), concepts, seed)
    # Two concepts of one store are not independent: each is a sample by itself.
    for part in (p[::2], p[1::2]):
        check(sum(value <= 0.05 for value in part), len(part))
