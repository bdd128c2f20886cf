"""Activations at the tokens of a prefix, against plain hooks on by-hand inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import trace
from concepts import ConceptDataset
from groundscope.core.errors import DataError, StoreError
from lvlm import answer_key
from tests.toys.examples import example
from tests.toys.families import model

SITE = "decoder.L1.resid_post"
DATA = ConceptDataset(
    "d",
    (
        replace(example(0), id="a", prefix="the cat is", answer="red", candidates=("red", "green")),
        replace(example(1), id="b"),
        replace(example(1), id="c", prefix="a big"),
    ),
)


def test_the_tokens_of_a_prefix_are_stored(tmp_path: Path) -> None:
    lvlm = model("llava")
    store = trace(lvlm, DATA, ["resid_post"], ["last", "prefix:mean", "prefix:all", "answer:0"], tmp_path, batch_size=4)
    for row, question in enumerate(DATA):
        plain = lvlm.encode(replace(question, prefix="")).inputs
        words = f"{question.prefix} {question.answer}".strip()
        ids = torch.tensor([lvlm.processor.tokenizer(words, add_special_tokens=False)["input_ids"]])
        inputs = {**plain, "input_ids": torch.cat([plain["input_ids"], ids], 1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        outputs: list[torch.Tensor] = []
        hook = lvlm.hf.model.language_model.layers[1].register_forward_hook(
            lambda _m, _a, out, to=outputs: to.append(out)
        )
        with torch.no_grad():
            logits = lvlm.hf(**inputs).logits[0]
        hook.remove()
        x = outputs[0][0].numpy()
        end = x.shape[0] - 1  # the answer is one token
        start = plain["input_ids"].shape[1]
        np.testing.assert_allclose(store.read(SITE, "last")[row], x[end - 1], atol=1e-5)
        np.testing.assert_allclose(store.read(SITE, "answer:0")[row], x[end], atol=1e-5)
        np.testing.assert_allclose(store.ragged(SITE, "prefix:all")[row], x[start:end], atol=1e-5)
        mean = x[start:end].mean(0) if question.prefix else np.full(x.shape[1], np.nan)
        np.testing.assert_allclose(store.read(SITE, "prefix:mean")[row], mean, atol=1e-5)
        spans = [[start, end]] if question.prefix else []
        assert np.asarray(store.columns["span:prefix"][row]).tolist() == spans
        margin = answer_key(lvlm, question).margin(logits[end - 1], question.answer)
        assert store.columns["margin"][row] == pytest.approx(float(margin), abs=1e-5)
    assert store.columns["prefix"].tolist() == ["the cat is", "", "a big"]


def test_a_store_is_continued_with_the_same_prefixes_only(tmp_path: Path) -> None:
    lvlm = model("llava")
    plain = ConceptDataset("d", tuple(replace(e, prefix="") for e in DATA[1:]))
    store = trace(lvlm, plain, [SITE], ["last"], tmp_path)
    assert "prefix" not in store.columns
    assert "span:prefix" not in store.columns
    with pytest.raises(StoreError, match=r"dataset\.digest"):
        trace(lvlm, DATA[1:], [SITE], ["last"], tmp_path)


def test_a_prefix_that_cannot_be_read_stops_before_the_first_forward(tmp_path: Path) -> None:
    lvlm = model("llava")
    data = ConceptDataset("d", (DATA[1], replace(DATA[2], prefix="the zyzzyva")))
    with pytest.raises(DataError, match="example 'c': the prefix 'the zyzzyva' cannot be read"):
        trace(lvlm, data, [SITE], ["last"], tmp_path, answers=False)
    assert not list(tmp_path.iterdir())
