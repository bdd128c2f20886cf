"""Sources of answers after a prefix: other nouns in the question, or for captions, which share one question, other prefixes."""

from __future__ import annotations

from dataclasses import replace

import pytest

import groundscope as gs
from circuits.input_attribution import matched_prefixes, matched_questions, split
from diagnosis.pipeline import _sources
from lvlm import load_lvlm

TEXTS = ("a blue car and a red", "a red dog and a green", "a green apple and a blue", "a red")


def test_a_wrong_word_of_a_caption_is_attributed_to_image_and_text() -> None:
    """Captions have one question, so other words before it take the place of other nouns."""
    model, data = load_lvlm("tiny"), gs.scenes.dataset(40, splits=["caption"])
    words = [
        gs.counterfactuals.word_pair(example, f"{text} key", "key", "dog").clean
        for example, text in zip(data, TEXTS, strict=False)
    ]
    data = gs.ConceptDataset("words", tuple(words))
    sources = _sources(model, words, list(data), seed=0)
    texts = matched_prefixes(model, words, among=list(data))
    assert list(sources) == [e.id for e in words]
    for example in words:
        shares = split(model, [example], matched="prefix", matched_texts=texts)[0]
        expected = {
            name: getattr(shares, name) for name in ("lean", "form", "knowledge", "image", "log_odds", "no_image")
        }
        expected |= {"noun_spread": shares.noun_spread, "blank_spread": shares.blank_spread["image"]}
        assert sources[example.id] == pytest.approx(expected, abs=1e-4)
        total = sum(sources[example.id][name] for name in ("lean", "form", "knowledge", "image"))
        assert total == pytest.approx(sources[example.id]["log_odds"], abs=1e-5)
    assert _sources(model, words[:1], words[:1], seed=0) == {}  # no other prefix


def test_other_nouns_come_before_other_prefixes() -> None:
    model = load_lvlm("tiny")
    color_questions = [e for e in gs.scenes.dataset(40) if e.kind == "color"][:3]
    prefixed = [
        replace(e, prefix=f"a {word} and a") for e, word in zip(color_questions, ("car", "dog", "key"), strict=True)
    ]
    sources = _sources(model, prefixed, prefixed, seed=0)
    texts = matched_questions(model, prefixed)
    for e in prefixed:
        expected = split(model, [e], matched_texts=texts)[0]
        assert sources[e.id]["knowledge"] == pytest.approx(expected.knowledge, abs=1e-4)
