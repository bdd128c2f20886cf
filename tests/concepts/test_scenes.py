"""Scenes and questions against what can be read off pixels, boxes and the question's own words."""

from __future__ import annotations

import colorsys
import hashlib
import json
import re

import numpy as np
import pytest

from concepts import scenes
from concepts.concept import Concept
from concepts.scenes.distributions import BIASED, COMPANION, POPULAR, TYPICAL, UNIFORM
from concepts.scenes.icons import COLORS, NOUNS, icon
from concepts.scenes.scene import MARGIN, SIDE, TEST, TRAIN, Scene, generator, sample_scene
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    return scenes.dataset(100, seed=3)


def scene_of(example: Example) -> Scene:
    assert isinstance(example.image, Scene)
    return example.image


def test_the_same_seed_draws_the_same_pixels_on_any_machine() -> None:
    pixels = b"".join(sample_scene(generator(TEST, 5, i), f"g{i}", BIASED).pixels().tobytes() for i in range(20))
    assert hashlib.sha256(pixels).hexdigest() == "96de5f85a0341da94719aa85e35b6e4746bf7dce0c91f24697e1c14330daeefc"


def test_no_test_image_is_a_training_image() -> None:
    def images(space: int) -> set[bytes]:
        return {sample_scene(generator(space, 0, i), "x", UNIFORM).pixels().tobytes() for i in range(500)}

    assert len(images(TRAIN)) == 500
    assert not images(TRAIN) & images(TEST)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("noun", NOUNS)
def test_an_icon_has_the_hue_it_is_named_after(noun: str, color: str) -> None:
    rgb, alpha = icon(noun, color, 30)
    solid = rgb[alpha[..., 0] > 0.9] / 255
    hues = [colorsys.rgb_to_hsv(*p) for p in solid]
    colored = [h for h, s, v in hues if s > 0.35 and v > 0.25]
    hue = {"red": 0, "orange": 31, "yellow": 50, "green": 127, "blue": 220, "purple": 283}[color]
    off = [min(abs(h * 360 - hue), 360 - abs(h * 360 - hue)) for h in colored]
    assert len(colored) > 0.25 * len(solid)
    assert np.mean(off) < 8


def test_objects_are_inside_the_image_and_apart(data: ConceptDataset) -> None:
    for example in data:
        boxes = [o.require_box() for o in example.objects]
        assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= SIDE and b.y1 <= SIDE for b in boxes)
        assert all(a.intersection(b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])
        assert len({o.noun for o in example.objects}) == len(example.objects)


def test_pixels_outside_the_boxes_are_background(data: ConceptDataset) -> None:
    for example in data.examples[::97]:
        scene = scene_of(example)
        empty = Scene(scene.id, scene.background, ())
        changed = (scene.pixels() != empty.pixels()).any(-1)
        for o in scene.objects:
            b = o.require_box()
            inside = changed[int(b.y0) : int(b.y1), int(b.x0) : int(b.x1)]
            assert inside.mean() > 0.2
            inside[:] = False
        assert not changed.any()


def answer_from_words(example: Example) -> str:
    """Work the answer out from the question's words and the boxes: an oracle that shares no code."""
    things = {o.noun: o for o in example.objects}
    words = example.question.rstrip("?.").split()
    if match := re.match(r"Is there an? (\w+) in the image\?", example.question):
        return "yes" if match[1] in things else "no"
    if match := re.match(r"What color is the (\w+)\?", example.question):
        return things[match[1]].attributes["color"]
    if match := re.match(r"Is the (\w+) (left of|right of|above|below) the (\w+)\?", example.question):
        a, b = (things[match[n]].require_box() for n in (1, 3))
        dx, dy = (b.x0 + b.x1 - a.x0 - a.x1) / 2, (b.y0 + b.y1 - a.y0 - a.y1) / 2
        gap = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[match[2]]
        assert abs(gap) >= MARGIN
        return "yes" if gap > 0 else "no"
    if words[:2] == ["Is", "the"]:
        values = things[words[2]].attributes.values()
        return "yes" if words[3] in values else "no"
    ordered = sorted(example.objects, key=lambda o: o.require_box().center)
    return " ".join(o.noun for o in ordered)


def test_every_answer_follows_from_the_scene(data: ConceptDataset) -> None:
    for example in data:
        expected = answer_from_words(example)
        if example.kind == "caption":
            assert [w for w in re.findall(r"\w+", example.answer) if w in NOUNS] == expected.split()
        else:
            assert example.answer == expected
            assert example.labels.get(f"{example.level}:named", expected == "yes") == (expected == "yes")


def test_yes_and_no_are_balanced_in_every_split_and_kind(data: ConceptDataset) -> None:
    frame = data.frame()
    questions = frame[frame["answer"].isin(["yes", "no"])]
    shares = questions.groupby(["split", "kind"])["answer"].apply(lambda a: (a == "yes").mean())
    assert len(shares) == 9
    np.testing.assert_allclose(shares, 0.5)


def test_absent_nouns_are_what_their_split_says(data: ConceptDataset) -> None:
    counts = dict.fromkeys(("random", "popular", "adversarial"), 0)
    for example in data:
        if example.split not in counts or example.answer == "yes":
            continue
        counts[example.split] += 1
        noun = example.question.split()[3]
        nouns = {o.noun for o in example.objects}
        partner, popular = COMPANION[noun] in nouns, noun in POPULAR
        assert (partner, popular) == {"random": (False, False), "popular": (False, True), "adversarial": (True, False)}[
            example.split
        ]
    assert set(counts.values()) == {25}


def test_conflict_shows_the_typical_scene_in_another_color(data: ConceptDataset) -> None:
    typical = {e.group: e for e in data.where(split="typical", kind="what_color")}
    conflict = {e.group: e for e in data.where(split="conflict", kind="what_color")}
    assert typical.keys() == conflict.keys()
    for group, example in conflict.items():
        thing = example.named_object()
        assert thing is not None
        color, _ = TYPICAL[thing.noun]
        assert example.prior_answer == color != example.answer
        assert typical[group].answer == color
        difference = scene_of(example).pixels() != scene_of(typical[group]).pixels()
        b = thing.require_box()
        difference[int(b.y0) : int(b.y1), int(b.x0) : int(b.x1)] = False
        assert not difference.any()


def test_the_biased_world_keeps_its_table() -> None:
    samples = [sample_scene(generator(TEST, 8, i), "w", BIASED) for i in range(4000)]
    apples = [o.attributes["color"] for s in samples for o in s.objects if o.noun == "apple"]
    with_umbrella = [s.get("bus") is not None for s in samples if s.get("umbrella") is not None]
    without_umbrella = [s.get("bus") is not None for s in samples if s.get("umbrella") is None]
    dogs = [o.attributes["color"] for s in samples for o in s.objects if o.noun == "dog"]
    assert abs(np.mean([c == "red" for c in apples]) - 0.93) < 0.04
    assert np.mean(with_umbrella) > 3 * np.mean(without_umbrella)
    assert max(dogs.count(c) for c in COLORS) < 0.25 * len(dogs)


def test_records_are_plain_and_the_digest_follows_them(data: ConceptDataset) -> None:
    repeated = scenes.dataset(100, seed=3)
    assert json.loads(json.dumps(data[0].record())) == data[0].record()
    assert data.digest == repeated.digest != scenes.dataset(100, seed=4).digest
    assert len(data[:10]) == 10
    assert data[:10].digest != data.digest


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown split 'easy'; choose from neutral"):
        scenes.dataset(100, splits=("easy",))
    with pytest.raises(ConfigError, match="n_images=3"):
        scenes.dataset(3)
    with pytest.raises(DataError, match="unknown icon 'zebra'"):
        icon("zebra", "red", 20)
    for text in ("object:", "", ":green"):
        with pytest.raises(DataError, match=f"'{text}' is not a concept"):
            Concept.parse(text)
    assert Concept.parse("scene:indoor") == Concept("", "scene:indoor")  # a free name
    scene = sample_scene(generator(TEST, 0, 1), "s", nouns=["car", "dog"])
    with pytest.raises(DataError, match="has no 'cat'; choose from car, dog"):
        scene.without("cat")
    with pytest.raises(DataError, match="already has a 'dog'"):
        scene.replaced("car", "dog")
    twice = scenes.dataset(10).examples[0]
    with pytest.raises(DataError, match="two examples have the id"):
        ConceptDataset("d", (twice, twice))
