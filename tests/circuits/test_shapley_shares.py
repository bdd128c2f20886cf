"""Where answers come from: Shapley values against every order written out, and the model's own forwards."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from circuits import ShapleySources
from circuits.input_attribution import shapley
from circuits.input_attribution.shapley_split import split_shapley as split
from concepts.annotated_object import Box
from concepts.counterfactuals import EditedImage
from concepts.region_masking import RegionMaskedImage, region_of_pixels
from concepts.scenes import questions
from concepts.scenes.scene import TEST, generator, sample_scene
from concepts.schema import Example
from groundscope.core.errors import ConfigError, PatchError, StoreError
from lvlm.model import Lvlm
from tests.toys.random_models import shared_model


def by_orders(value: dict[frozenset[int], float], n: int) -> np.ndarray:
    """Shapley values by the definition: what each adds on arrival, mean over all orders."""
    out = np.zeros(n)
    orders = list(permutations(range(n)))
    for order in orders:
        there: frozenset[int] = frozenset()
        for player in order:
            out[player] += value[there | {player}] - value[there]
            there |= {player}
    return out / len(orders)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_exact_values_are_the_mean_over_all_orders(n: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=2**n)
    members = [frozenset(np.flatnonzero(c).tolist()) for c in shapley.coalitions(n)]
    truth = by_orders(dict(zip(members, values, strict=True)), n)
    np.testing.assert_allclose(shapley.exact(values), truth, atol=1e-12)


def test_efficiency_symmetry_and_null_player() -> None:
    everyone = shapley.coalitions(4).astype(float)
    # A glove game: players 0 and 1 have left gloves, 2 a right one; 3 has nothing.
    gloves = np.minimum(everyone[:, 0] + everyone[:, 1], everyone[:, 2])
    shares = shapley.exact(gloves)
    np.testing.assert_allclose(shares, [1 / 6, 1 / 6, 4 / 6, 0], atol=1e-12)
    additive = everyone @ np.array([2.0, -1.0, 0.5, 0.0]) + 7
    np.testing.assert_allclose(shapley.exact(additive), [2, -1, 0.5, 0], atol=1e-12)


def test_sampled_orders_agree_within_their_error() -> None:
    weights = np.random.default_rng(3).normal(size=(12, 12))

    def value(c: np.ndarray) -> np.ndarray:
        return np.einsum("ki,ij,kj->k", c.astype(float), weights, c.astype(float))

    symmetric = (weights + weights.T) / 2
    truth = np.diag(weights) + (symmetric - np.diag(np.diag(symmetric))).sum(1)  # closed form of a quadratic game
    shares, error = shapley.sampled(value, 12, 400, seed=1)
    assert (np.abs(shares - truth) < 4 * error).all()
    assert (error > 0).all()
    np.testing.assert_allclose(shares.sum(), value(np.ones((1, 12)))[0], atol=1e-9)
    with pytest.raises(ConfigError, match="at least 2"):
        shapley.sampled(value, 12, 1)
    with pytest.raises(ConfigError, match=r"2\^n"):
        shapley.exact(np.zeros(3))


@torch.no_grad()
def odds(model: Lvlm, example: Example, answer: str) -> float:
    """Log-odds of an answer in one plain forward; the toy tokenizer has one token for each candidate."""
    logits = model.hf(**model.encode(example).inputs).logits[0, -1].double()
    ids = {c: model.processor.tokenizer.convert_tokens_to_ids(c) for c in example.candidates}
    others = torch.stack([logits[i] for c, i in ids.items() if c != answer])
    return float(logits[ids[answer]] - others.logsumexp(0))


def color_questions() -> tuple[Example, ...]:
    """Two questions of one length and kind about unlike scenes."""
    examples = []
    for i, noun in enumerate(("car", "dog", "apple")):
        scene = sample_scene(generator(TEST, 5, i), f"s{i}", nouns=["apple", "car", "dog"])
        thing = scene.get(noun)
        assert thing is not None
        examples.append(questions.as_example(scene, questions.what_color(scene, thing), "neutral"))
    return tuple(examples)


def test_shares_equal_four_forwards_by_hand() -> None:
    model, three = shared_model(), color_questions()
    sources = split(model, three, neutral_images=("blank", "noise"), neutral_questions=[three[1].question])
    for shares, e in zip((sources[0], sources[2]), (three[0], three[2]), strict=True):
        other = three[1].question
        per_image = []
        for edit in ("blank", "noise"):
            none = EditedImage(e.image, edit)
            v = {
                (i, p): odds(
                    model,
                    replace(e, image=e.image if i else none, question=e.question if p else other),
                    shares.answer,
                )
                for i in (0, 1)
                for p in (0, 1)
            }
            image = ((v[1, 0] - v[0, 0]) + (v[1, 1] - v[0, 1])) / 2
            prompt = ((v[0, 1] - v[0, 0]) + (v[1, 1] - v[1, 0])) / 2
            per_image.append((v[0, 0], image, prompt, v[1, 1] - v[1, 0] - v[0, 1] + v[0, 0]))
        prior, image, prompt, interaction = np.mean(per_image, axis=0)
        np.testing.assert_allclose(
            [shares.prior, shares.image, shares.prompt, shares.interaction],
            [prior, image, prompt, interaction],
            atol=2e-4,
        )
        np.testing.assert_allclose(shares.spread, np.std([p[1:3] for p in per_image], axis=0, ddof=1), atol=2e-4)
        assert abs(shares.prior + shares.shares.sum() - shares.log_odds) < 1e-9
        assert (
            shares.forwards == 6
        )  # everything, the image alone, the question with two neutral images, and those alone
        assert shares.said == max(e.candidates, key=lambda c: odds(model, e, c))


def test_the_prefix_is_a_player_while_the_question_stays() -> None:
    model, prefixes = shared_model(), ("a red car and a", "a blue dog and a", "the green apple")
    three = [replace(e, prefix=text) for e, text in zip(color_questions(), prefixes, strict=True)]
    sources = split(model, three[:2], prompt="prefix")  # the other example's prefix has as many tokens
    e, other, shares = three[0], prefixes[1], sources[0]
    none = EditedImage(e.image, "blank")
    v = {
        (i, p): odds(model, replace(e, image=e.image if i else none, prefix=e.prefix if p else other), shares.answer)
        for i in (0, 1)
        for p in (0, 1)
    }
    image = ((v[1, 0] - v[0, 0]) + (v[1, 1] - v[0, 1])) / 2
    prefix = ((v[0, 1] - v[0, 0]) + (v[1, 1] - v[1, 0])) / 2
    assert shares.players == ("image", "prefix")
    np.testing.assert_allclose([shares.prior, *shares.shares], [v[0, 0], image, prefix], atol=2e-4)
    assert abs(prefix) > 1e-3
    assert sources.frame()["part"].tolist() == ["image", "prefix"] * 2
    named = split(model, three[:1], prompt="prefix", neutral_prefixes={e.id: [other]})[0]
    np.testing.assert_array_equal(named.shares, shares.shares)
    for examples, options, words in (
        (three, {}, "no other example has a prefix of 3 tokens"),
        (three[:1], {"neutral_prefixes": [prefixes[2]]}, "tokens instead of .* and a prefix of its length"),
        (color_questions(), {}, "has no prefix; use prompt='whole'"),
    ):
        with pytest.raises(PatchError, match=words):
            split(model, examples, prompt="prefix", **options)


def test_each_example_can_have_neutral_questions_of_its_own() -> None:
    model, three = shared_model(), color_questions()
    other = {e.id: [f.question] for e, f in zip(three, three[::-1], strict=True)}
    with pytest.raises(PatchError, match="has no entry for example"):
        split(model, three, neutral_questions={three[0].id: other[three[0].id]})
    first = split(model, three[:1], neutral_questions={three[0].id: other[three[0].id]})[0]
    np.testing.assert_array_equal(first.shares, split(model, three[:1], neutral_questions=other[three[0].id])[0].shares)


def test_each_object_and_word_is_a_player() -> None:
    model, three = shared_model(), color_questions()
    e = three[0]
    others = [x.question for x in three if x.question != e.question]
    shares = split(model, [e], image="objects", prompt="words", of="true", neutral_questions=others)[0]
    assert shares.players[: shares.of_image] == (*(f"image: {o.noun}" for o in e.objects), "image: rest")
    assert shares.players[shares.of_image :] == tuple(f"prompt: {w}" for w in e.question.split())
    assert shares.answer == e.answer
    assert abs(shares.prior + shares.shares.sum() - shares.log_odds) < 1e-9
    if len(shares.players) <= shapley.MOST:
        assert len(shares.values) == 2 ** len(shares.players)
        np.testing.assert_array_equal(shares.error, 0)
    # A word that is the same in every neutral question brings nothing.
    same = [i for i, w in enumerate(e.question.split()) if all(w == x.question.split()[i] for x in three)]
    assert same
    np.testing.assert_allclose(shares.shares[shares.of_image :][same], 0, atol=1e-6)
    # One region's value alone is the model's answer to the composed picture.
    alone = shares.coalitions.sum(1) == 1
    row = int(np.flatnonzero(alone & shares.coalitions[:, 0])[0])
    boxes, visible = tuple(o.box for o in e.objects), (True, *[False] * len(e.objects))
    picture = RegionMaskedImage(e.image, EditedImage(e.image, "blank"), boxes, visible)
    naive = np.mean([odds(model, replace(e, image=picture, question=q), e.answer) for q in others])
    np.testing.assert_allclose(shares.values[row], naive, atol=2e-4)


def test_sampled_values_of_many_players_sum_to_the_total() -> None:
    model = shared_model()
    scene = sample_scene(generator(TEST, 9, 0), "many", nouns=["apple", "car", "dog"])
    other = sample_scene(generator(TEST, 9, 1), "other", nouns=["apple", "car", "dog"])
    both = [questions.as_example(s, questions.existence(s, n), "neutral") for s, n in ((scene, "car"), (other, "dog"))]
    sources = split(model, both, image="objects", prompt="words", orders=6)
    shares = sources[0]
    assert len(shares.players) > shapley.MOST
    assert len(shares.values) < 2 ** len(shares.players)
    assert abs(shares.prior + shares.shares.sum() - shares.log_odds) < 1e-9
    assert (shares.error[np.abs(shares.shares) > 1e-6] >= 0).all()
    assert shares.error.max() > 0
    whole = split(model, both)[0]
    np.testing.assert_allclose(shares.interaction, whole.interaction, atol=1e-4)


def test_regions_cover_every_pixel_once() -> None:
    boxes = (Box(0, 0, 6, 6), Box(4, 4, 8, 8))
    owner = region_of_pixels(boxes, (10, 8))
    assert owner.shape == (8, 10)
    assert (owner[:4, :4] == 0).all()
    assert (owner[4:, 4:8] == 1).all()  # the smaller box has what both hold
    assert (owner[:, 8:] == 2).all()


class Flat:
    """A picture of one color."""

    def __init__(self, value: int, size: tuple[int, int] = (10, 8)) -> None:
        self.value, self.size = value, size

    @property
    def identity(self) -> str:
        return f"flat {self.value} {self.size}"

    def load(self) -> Image.Image:
        return Image.new("RGB", self.size, (self.value,) * 3)


def test_revealed_images_show_the_selected_boxes() -> None:
    boxes = (Box(0, 0, 6, 6), Box(4, 4, 8, 8))
    pixels = np.asarray(RegionMaskedImage(Flat(200), Flat(10), boxes, (True, False, False)).load())[..., 0]
    np.testing.assert_array_equal(pixels == 200, region_of_pixels(boxes, (10, 8)) == 0)
    assert RegionMaskedImage(Flat(200), Flat(10), boxes, (True, True, True)).identity == Flat(200).identity
    assert RegionMaskedImage(Flat(200), Flat(10), boxes, (False,) * 3).identity == Flat(10).identity
    with pytest.raises(Exception, match="needs a neutral image of the same size"):
        RegionMaskedImage(Flat(200), Flat(10, (4, 4)), boxes, (True, False, False)).load()


def test_summary_frame_and_file(tmp_path: Path) -> None:
    sources = split(shared_model(), color_questions())
    frame = sources.frame()
    assert len(frame) == 6
    assert set(frame["part"]) == {"image", "prompt"}
    table = sources.summary(("level", "said_true"))
    mean = table.pivot_table(index=["level", "said_true"], columns="part", values="mean")
    np.testing.assert_allclose(mean["prior"] + mean["image"] + mean["prompt"], mean["log_odds"], atol=1e-9)
    loaded = ShapleySources.load(sources.save(tmp_path / "sources.safetensors"))
    assert loaded.frame().equals(frame)
    np.testing.assert_array_equal(loaded[1].values, sources[1].values)
    assert str(loaded[0]).startswith(f"'{sources[0].answer}' to '{sources[0].example['question']}'")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="damaged"):
        ShapleySources.load(tmp_path / "broken.safetensors")
    with pytest.raises(ConfigError, match="unknown column 'color' in by"):
        sources.summary(("color",))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"of": "false"}, ConfigError, "said or true"),
        ({"image": "pixels"}, ConfigError, "whole or objects"),
        ({"prompt": "letters"}, ConfigError, "whole or words"),
        ({"neutral_images": ("mask",)}, ConfigError, "'mask'"),
        ({"neutral_images": ()}, ConfigError, "choose from"),
        ({"orders": 1}, ConfigError, "orders=1"),
        ({"neutral_questions": ["Is it?"]}, PatchError, "a question of its length"),
    ],
)
def test_a_mistake_is_named(options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        split(shared_model(), color_questions(), **options)  # type: ignore[arg-type]


def test_a_question_without_company_needs_neutral_ones() -> None:
    with pytest.raises(PatchError, match="no other example has a question"):
        split(shared_model(), color_questions()[:1])
    with pytest.raises(PatchError, match="examples is empty"):
        split(shared_model(), [])
