"""Splits never divide a group, keep classes balanced or raise; permutations preserve group structure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundscope.core.errors import ProbeError
from probes.protocol.controls import majority_accuracy, shuffle_labels
from probes.protocol.splits import assign_parts, grouped_folds, grouped_split, groups_needed, support_problem


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(10, 200),
    n_groups=st.integers(6, 60),
    share=st.floats(0.05, 0.95),
    folds=st.integers(2, 6),
)
@settings(max_examples=60)
def test_a_group_is_never_divided(seed: int, n: int, n_groups: int, share: float, folds: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.r_[np.arange(6), rng.integers(0, n_groups, size=n - 6)].astype(str)
    labels = np.where(rng.random((n, 3)) < 0.2, np.nan, rng.random((n, 3)) < share)
    held_out, fold = grouped_split(groups, labels, 0.3, seed), grouped_folds(groups, labels, folds, seed)
    assert fold.min() >= 0
    assert fold.max() < folds
    for name in np.unique(groups):
        assert len(set(held_out[groups == name])) == 1
        assert len(set(fold[groups == name])) == 1
    np.testing.assert_array_equal(held_out, grouped_split(groups, labels, 0.3, seed))


def test_classes_are_spread_evenly() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), 4).astype(str)
    image = np.repeat(rng.random((200, 2)) < [0.1, 0.5], 4, axis=0)  # same over the image
    labels = np.column_stack([image, rng.random(800) < 0.3]).astype(float)
    labels[rng.random(800) < 0.5, 2] = np.nan
    held_out, fold = grouped_split(groups, labels, 0.25, seed=1), grouped_folds(groups, labels, 5, seed=1)
    for k in range(3):
        for value in (0, 1):
            rows = labels[:, k] == value
            assert held_out[rows].mean() == pytest.approx(0.25, abs=0.06)
            for f in range(5):
                assert (fold[rows] == f).mean() == pytest.approx(0.2, abs=0.06)


def test_seeds_differ_and_repeat() -> None:
    groups, labels = np.arange(100).astype(str), (np.arange(100) % 3 == 0).astype(float)
    splits = [grouped_split(groups, labels, 0.3, seed) for seed in (0, 1, 0)]
    assert (splits[0] == splits[2]).all()
    assert (splits[0] != splits[1]).any()


def test_the_stated_minimum_of_groups_is_enough() -> None:
    for folds, fraction in ((5, 0.3), (2, 0.5), (3, 0.1), (10, 0.25)):
        needed = groups_needed(folds, fraction)
        groups = np.arange(8 * needed).astype(str)
        labels = (np.arange(8 * needed) < needed).astype(float)
        for seed in range(10):
            held_out = grouped_split(groups, labels, fraction, seed)
            assert (held_out & (labels == 1)).sum() >= 2
            fold = grouped_folds(groups[~held_out], labels[~held_out], folds, seed)
            assert len(set(fold[labels[~held_out] == 1])) >= folds - 1


def test_support_problems_name_concept_class_and_counts() -> None:
    groups = np.array(list("aabbccddee"))
    cases = {
        "is in 1 group (2 rows), 3 are needed (class 0: 4 groups)": np.r_[1, 1, np.zeros(8)],
        "is 0 on all 10 rows where it is defined": np.zeros(10),
        "is undefined on all used rows": np.full(10, np.nan),
    }
    for message, labels in cases.items():
        problem = support_problem("object:cat", labels.astype(float), groups, 3)
        assert problem is not None
        assert message in problem
        assert "object:cat" in problem
    assert support_problem("object:cat", np.array([1.0, 0] * 5), groups, 3) is None


def test_options_out_of_range_are_refused() -> None:
    groups, labels = np.array(["a", "b", "c"]), np.array([0.0, 1, 0])
    with pytest.raises(ProbeError, match=r"test_fraction=1\.5"):
        grouped_split(groups, labels, 1.5)
    with pytest.raises(ProbeError, match="5 folds of 3 groups"):
        grouped_folds(groups, labels, 5)
    with pytest.raises(ProbeError, match="2 groups and 3 rows"):
        assign_parts(groups[:2], labels, [1, 1], 0)
    with pytest.raises(ProbeError, match="positive numbers"):
        assign_parts(groups, labels, [1, 0], 0)


def test_a_shuffle_keeps_the_counts_of_each_part_and_the_likeness_within_groups() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(120), 5)
    image = np.repeat((rng.random(120) < 0.4).astype(float), 5)
    parts = np.repeat(rng.integers(-1, 4, size=120), 5)
    order = rng.permutation(600)  # rows of a group need not lie together
    groups, image, parts = groups[order], image[order], parts[order]
    shuffled = shuffle_labels(image, groups, parts, seed=1)
    for part in np.unique(parts):
        assert shuffled[parts == part].sum() == image[parts == part].sum()
    for group in np.unique(groups):
        assert len(set(shuffled[groups == group])) == 1
    assert abs(np.corrcoef(shuffled, image)[0, 1]) < 0.3
    assert (shuffle_labels(image, groups, parts, seed=1) == shuffled).all()
    assert (shuffle_labels(image, groups, parts, seed=2) != shuffled).any()


def test_a_shuffle_takes_labels_from_their_place_in_the_group() -> None:
    """The first question of each image is always true: shuffled, its place says nothing."""
    groups, labels = np.repeat(np.arange(200), 4), np.tile([1.0, 0, 0, 0], 200)
    shuffled = shuffle_labels(labels, groups, np.zeros(800), seed=0)
    assert (shuffled.reshape(200, 4).sum(axis=1) == 1).all()
    assert shuffled.reshape(200, 4).mean(axis=0) == pytest.approx(0.25, abs=0.1)


def test_majority() -> None:
    assert majority_accuracy(np.array([1.0, 0, 0, 0])) == 0.75
    assert majority_accuracy(np.array([1.0, 1, 1, 0])) == 0.75
