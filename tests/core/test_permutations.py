"""Exchanging groups: which permutations are drawn, how often, who can move, and what a test on null data says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest, chisquare

from concepts.counterfactual_pair import CounterfactualPair
from concepts.schema import Example
from groundscope.core.errors import PatchError, ProbeError
from groundscope.core.permutations import exchange_groups, movable_groups
from mitigation.steering.shuffling import shuffle_mask, swap_sides
from probes import fit_grid, permutation_test
from probes.protocol.controls import movable, shuffle_labels
from tests.toys.simulated_data import mean_distance_p, null_store


def test_every_exchange_of_whole_groups_is_drawn_equally_often() -> None:
    """Two groups of two rows, three of one, one of three that is alone: 2 * (2 * 2) * 6 * 6 permutations."""
    groups = np.array(["a", "b", "a", "c", "d", "b", "e", "f", "f", "f"])
    rng = np.random.default_rng(0)
    n = 8_000
    counts = Counter(tuple(exchange_groups(groups, np.zeros(10), rng).tolist()) for _ in range(n))
    assert len(counts) == 2 * 4 * 6 * 6
    assert chisquare(list(counts.values())).pvalue > 1e-3
    for order in counts:
        assert sorted(order) == list(range(10))
        for name in np.unique(groups):
            sources = set(groups[np.array(order)[groups == name]].tolist())
            assert len(sources) == 1  # of one group, whole
            assert (groups == sources.pop()).sum() == (groups == name).sum()


def test_groups_stay_in_their_part() -> None:
    groups, parts = np.repeat(np.arange(40), 2), np.repeat(np.arange(40) % 3, 2)
    order = exchange_groups(groups, parts, 1)
    assert (parts[order] == parts).all()
    assert (order != np.arange(80)).mean() > 0.8
    assert len(exchange_groups([], np.zeros(0), 0)) == 0


def test_who_can_move() -> None:
    groups = np.array(["a", "a", "b", "b", "c", "d", "e", "e", "e", "f", "f", "f", "f"])
    labels = np.array([1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1])
    can = movable_groups(groups, np.zeros(13), labels)
    # a and b differ; c and d are alike; e is alone but mixed; f is alone and of one label.
    assert can.tolist() == [True, True, False, False, True, False]
    assert movable_groups(groups, (groups == "a") * 1, labels).tolist() == [False, False, False, False, True, False]
    assert movable(labels, groups, np.zeros(13)) == (3, 6)
    assert movable(labels, groups, np.zeros(13), "within") == (1, 6)


@pytest.mark.parametrize("kind", ["unlike", "undefined"])
def test_p_values_hold_where_groups_differ_in_size(kind: str) -> None:
    """Labels dealt across the borders of groups give 40 to 50 % of null data a p-value up to .05."""
    n = 60
    wrong = sum(mean_distance_p(shuffle_labels, kind, seed, 39) <= 0.05 for seed in range(n))
    assert binomtest(wrong, n, 0.05, alternative="greater").pvalue > 0.01, wrong


def test_a_permutation_test_reports_how_many_groups_can_move() -> None:
    store = null_store("unlike", 0)
    options = {"folds": 2, "resamples": 2, "progress": False, "C": (1e-2,), "estimator": "mean_difference"}
    grid = fit_grid(store, ["object:a"], "resid_post", **options)
    significance = permutation_test(grid, store, permutations=9, progress=False)
    can, of = grid.provenance["control_groups"]["object:a"]
    assert (significance.movable.tolist(), significance.n_groups.tolist()) == ([can], [of])
    assert of == 60
    assert 30 < can < 60
    assert np.isfinite(grid.control).all()
    assert (significance.frame()["movable"] == can).all()


def test_too_few_groups_that_can_move_are_refused() -> None:
    """Every image has another number of questions: nothing can be exchanged."""
    store = null_store("equal", 0, groups=40)
    store.table["group"] = np.repeat([f"g{i}" for i in range(20)], np.arange(1, 21))[:160].tolist()
    rng = np.random.default_rng(0)
    label = dict(zip(store.table["group"].unique(), rng.permutation(np.arange(20) % 2), strict=False))
    store.table["object:a"] = [float(label[g]) for g in store.table["group"]]
    options = {"folds": 2, "resamples": 2, "progress": False, "C": (1e-2,), "estimator": "mean_difference"}
    grid = fit_grid(store, ["object:a"], "resid_post", **options)
    assert np.isnan(grid.control).all()  # its labels would be the true ones
    with pytest.raises(ProbeError, match=r"'object:a': 0 of \d+ groups can receive other labels, 10 are needed"):
        permutation_test(grid, store, permutations=9, progress=False)


def test_labels_of_a_vectors_control_move_by_group() -> None:
    groups = np.repeat(np.arange(30), 3)
    mask = np.repeat(np.arange(30) % 2 == 0, 3)
    permuted = shuffle_mask(mask, 0, groups=groups.tolist())
    assert permuted.sum() == mask.sum()
    assert (permuted != mask).any()
    by_group = permuted.reshape(30, 3)
    assert (by_group == by_group[:, :1]).all()  # rows of an image stay alike
    among = np.arange(90) < 60
    part = shuffle_mask(mask, 0, among, groups=groups.tolist())
    assert (part[~among] == mask[~among]).all()
    with pytest.raises(
        PatchError, match="labels cannot be shuffled: only 1 of 6 groups can take other labels, 10 are needed"
    ):
        shuffle_mask(np.arange(21) < 11, 0, groups=np.repeat(np.arange(6), np.arange(1, 7)).tolist())


def test_pairs_of_one_image_are_swapped_together() -> None:
    image = Image.new("RGB", (4, 4))
    pairs = []
    for k in range(36):
        sides = [
            Example(f"{k}{a}", image, "?", a, ("yes", "no"), "object", "existence", "neutral", f"g{k // 3}")
            for a in ("yes", "no")
        ]
        pairs.append(CounterfactualPair(*sides, kind="object", change="a: b -> c"))
    turned = [p.clean.answer == "no" for p in swap_sides(pairs, 0)]
    assert sum(turned) == 18
    assert {sum(turned[k : k + 3]) for k in range(0, 36, 3)} == {0, 3}
    few = [p.clean.answer == "no" for p in swap_sides(pairs[:9], 0)]
    assert sum(few) == 4
