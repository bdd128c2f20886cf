"""Pairs differ in what they say and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from concepts import counterfactuals, scenes
from concepts.counterfactuals.image_edits import signal_scale
from concepts.scenes.scene import Scene
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    return scenes.dataset(60, seed=11)


@pytest.mark.parametrize("kind", counterfactuals.KINDS)
def test_a_pair_keeps_the_question_and_changes_the_answer(data: ConceptDataset, kind: str) -> None:
    pairs = counterfactuals.pairs(data, kind)
    assert len(pairs) > 20
    for pair in pairs:
        assert pair.clean.question == pair.corrupt.question
        assert pair.clean.answer != pair.corrupt.answer
        assert {pair.clean.answer, pair.corrupt.answer} <= set(pair.clean.candidates)
        assert pair.clean.group == pair.corrupt.group == pair.group
        assert pair.kind == kind
        assert np.asarray(pair.clean.image.load()).shape == np.asarray(pair.corrupt.image.load()).shape
        assert pair.clean.image.identity != pair.corrupt.image.identity
    assert len({p.corrupt.id for p in pairs}) == len(pairs)


def test_color_changes_pixels_of_one_object_only(data: ConceptDataset) -> None:
    for pair in counterfactuals.pairs(data, "color"):
        assert isinstance(pair.clean.image, Scene)
        assert isinstance(pair.corrupt.image, Scene)
        changed = pair.clean.image.pixels() != pair.corrupt.image.pixels()
        thing = pair.clean.named_object()
        assert thing is not None
        b = thing.require_box()
        assert changed[int(b.y0) : int(b.y1), int(b.x0) : int(b.x1)].any()
        changed[int(b.y0) : int(b.y1), int(b.x0) : int(b.x1)] = False
        assert not changed.any()


def test_object_pairs_remove_or_replace_one_object(data: ConceptDataset) -> None:
    for pair in counterfactuals.pairs(data, "object"):
        before, after = ({o.noun for o in e.objects} for e in (pair.clean, pair.corrupt))
        removed, added = before - after, after - before
        assert (len(removed), len(added)) == ((1, 0) if pair.clean.answer == "yes" else (1, 1))


def test_relation_pairs_mirror_every_place(data: ConceptDataset) -> None:
    for pair in counterfactuals.pairs(data, "relation", limit=20):
        axis = 0 if "left-right" in pair.change else 1
        for a, b in zip(pair.clean.objects, pair.corrupt.objects, strict=True):
            here, there = a.require_box().center, b.require_box().center
            assert here[axis] + there[axis] == 112
            assert here[1 - axis] == there[1 - axis]


def test_the_noise_schedule_is_that_of_the_paper() -> None:
    scales = [signal_scale(t) for t in (200, 500, 700, 900, 999)]
    np.testing.assert_allclose(scales, [0.9939, 0.8630, 0.5927, 0.3649, 0.2850], atol=1e-4)


def test_destroyed_images_hold_what_they_say(data: ConceptDataset) -> None:
    blank = counterfactuals.pairs(data, "blank")[0]
    flat, original = np.asarray(blank.corrupt.image.load()), np.asarray(blank.clean.image.load())
    assert flat.std(axis=(0, 1)).max() == 0
    np.testing.assert_allclose(flat[0, 0], original.mean(axis=(0, 1)), atol=0.5)
    noise = counterfactuals.pairs(data, "noise")[0].corrupt.image
    np.testing.assert_array_equal(np.asarray(noise.load()), np.asarray(noise.load()))
    mask = counterfactuals.pairs(data, "mask")[0]
    thing = mask.clean.named_object()
    assert thing is not None
    changed = np.asarray(mask.corrupt.image.load()) != np.asarray(mask.clean.image.load())
    b = thing.require_box()
    changed[int(b.y0) : int(b.y1), int(b.x0) : int(b.x1)] = False
    assert not changed.any()


def test_bad_input_is_named(data: ConceptDataset) -> None:
    with pytest.raises(ConfigError, match=r"unknown kind of pair 'colour'; choose from .*; did you mean color"):
        counterfactuals.pairs(data, "colour")
    with pytest.raises(DataError, match="no example that allows a pair of kind 'relation'"):
        counterfactuals.pairs(data.where(kind="caption"), "relation")


@pytest.mark.parametrize("kind", counterfactuals.KINDS)
def test_both_sides_of_a_pair_carry_the_same_prefix(data: ConceptDataset, kind: str) -> None:
    prefixed = ConceptDataset("p", tuple(replace(e, prefix="I think it is") for e in data))
    pairs = counterfactuals.pairs(prefixed, kind)
    assert len(pairs) == len(counterfactuals.pairs(data, kind))
    assert {pair.clean.prefix for pair in pairs} == {pair.corrupt.prefix for pair in pairs} == {"I think it is"}
    assert "after 'I think it is'" in repr(pairs[0])
    with pytest.raises(DataError, match="the same prefix"):
        replace(pairs[0], corrupt=replace(pairs[0].corrupt, prefix="It is"))


def test_an_empty_prefix_leaves_records_and_digests_as_they_were(data: ConceptDataset) -> None:
    prefixed = ConceptDataset("p", (replace(data[0], prefix="It is"),))
    assert "prefix" not in data[0].record()
    assert prefixed[0].record() == {**data[0].record(), "prefix": "It is"}
    assert prefixed.digest != data[:1].digest
