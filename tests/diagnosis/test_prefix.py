"""Sources of answers after a prefix: other questions of equal length, or for captions, which share one, other prefixes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import groundscope as gs
from activation_store import trace
from circuits.input_attribution import split
from diagnosis.claims import claims_of
from diagnosis.pipeline import _prompt_lengths, _sources
from lvlm import load_lvlm


def test_prompt_lengths_leave_out_the_prefix() -> None:
    lengths = np.array([10.0, 13.0, 14.0])
    plain: Any = SimpleNamespace(columns={"n_tokens": lengths})
    assert _prompt_lengths(plain).tolist() == [10, 13, 14]
    spans = np.array([np.zeros((0, 2), int), np.array([[10, 13]]), np.array([[10, 14]])], dtype=object)
    prefixed: Any = SimpleNamespace(columns={"n_tokens": lengths, "span:prefix": spans})
    assert _prompt_lengths(prefixed).tolist() == [10, 10, 10]


TEXTS = ("a blue car and a red", "a red dog and a green", "a green apple and a blue", "a red")


def test_a_wrong_word_of_a_caption_is_attributed_to_image_and_text(tmp_path: Path) -> None:
    """Captions have one question, so the words before take the place of the prompt; the last has none of its length."""
    model, data = load_lvlm("tiny"), gs.scenes.dataset(40, splits=["caption"])
    words = [
        gs.counterfactuals.word_pair(example, f"{text} key", "key", "dog").clean
        for example, text in zip(data, TEXTS, strict=False)
    ]
    data = gs.ConceptDataset("words", tuple(words))
    store = trace(model, data, ["resid_post"], ["last"], tmp_path / "store", progress=False)
    claims = {c.id: c for c in claims_of(store) if c is not None}
    sources = _sources(model, store, claims, words, seed=0)
    assert list(sources) == [e.id for e in words[:3]]
    for example in words[:3]:
        others = [e.prefix for e in words[:3] if e.id != example.id]
        expected = split(model, [example], prompt="prefix", neutral_prefixes=others)[0]
        assert sources[example.id] == pytest.approx(
            {
                "image": expected.image,
                "prefix": expected.prompt,
                "prior": expected.prior,
                "log_odds": expected.log_odds,
            },
            abs=1e-4,
        )
        assert sum(v for k, v in sources[example.id].items() if k != "log_odds") == pytest.approx(
            expected.log_odds, abs=1e-4
        )


def test_other_questions_come_before_other_prefixes(tmp_path: Path) -> None:
    model = load_lvlm("tiny")
    color_questions = [e for e in gs.scenes.dataset(40) if e.kind == "color"][:3]
    prefixed = (
        replace(e, prefix=f"a {word} and a") for e, word in zip(color_questions, ("car", "dog", "key"), strict=True)
    )
    data = gs.ConceptDataset("prefixed", tuple(prefixed))
    store = trace(model, data, ["resid_post"], ["last"], tmp_path / "store", progress=False)
    claims = {c.id: c for c in claims_of(store) if c is not None}
    assert [set(s) for s in _sources(model, store, claims, data.examples, seed=0).values()] == [
        {"image", "prompt", "prior", "log_odds"}
    ] * 3
