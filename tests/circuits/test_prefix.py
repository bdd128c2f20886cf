"""Patching, knockout, attribution and shares of the next word after a prefix, against whole forward passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuits import attention_knockout, attribution, input_attribution, patch, patch_heads
from concepts import CounterfactualPair
from concepts.counterfactuals import EditedImage
from groundscope.core.errors import PatchError
from lvlm import Lvlm, answer_key
from tests.toys.families import model
from tests.toys.patching_oracle import naive, pair_of, projections

FAMILIES = ["llava", "qwen2_vl", "instructblip_t5"]


def prefixed(number: int, prefix: str) -> CounterfactualPair:
    """Two images after the same written words; red is right on the first, green on the second."""
    pair = pair_of(number)
    words = {"prefix": prefix, "candidates": ("red", "green")}
    clean, corrupt = replace(pair.clean, answer="red", **words), replace(pair.corrupt, answer="green", **words)
    return CounterfactualPair(clean, corrupt, "word", "another image")


def margins(lvlm: Lvlm, logits: torch.Tensor) -> torch.Tensor:
    red, green = lvlm.processor.tokenizer.convert_tokens_to_ids(["red", "green"])
    return logits[..., red] - logits[..., green]


@pytest.mark.parametrize("tokens", ["last", "suffix:all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_after_prefixes_equal_one_forward_a_head(family: str, tokens: str) -> None:
    lvlm = model(family)
    data = [prefixed(0, "the cat is"), prefixed(2, "a big")]
    scores = patch_heads(lvlm, data, tokens=tokens, min_effect=0)
    for k, pair in enumerate(data):
        positions = lvlm.encode(pair.clean).tokens
        first = positions.last if tokens == "last" else max(positions.image, default=-1) + 1
        expected = margins(lvlm, naive(lvlm, projections(lvlm, family), pair, first)).numpy()
        ours = scores.effects[k] * (scores.clean[k] - scores.corrupt[k]) + scores.corrupt[k]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
        assert np.abs(expected - scores.corrupt[k]).max() > 1e-4


def test_positions_of_the_prefix_are_patched_alone() -> None:
    lvlm = model("llava")
    pair = prefixed(0, "the cat is")
    tokens = lvlm.encode(pair.clean).tokens
    read = {}
    site = "decoder.L1.resid_post"
    clean = lvlm.read(lvlm.encode(pair.clean).inputs, [site])[site]
    scores = patch(lvlm, [pair], [site], tokens="prefix:each", min_effect=0)
    for position in tokens.prefix:

        def change(x: torch.Tensor, at: int = position) -> torch.Tensor:
            x = x.clone()
            x[:, at] = clean[:, at]
            return x

        hook = lvlm.layers("decoder")[1].register_forward_hook(lambda _m, _a, out: change(out))
        read[position] = float(margins(lvlm, lvlm.logits(lvlm.encode(pair.corrupt).inputs)[0]))
        hook.remove()
    ours = scores.effects[0] * (scores.clean[0] - scores.corrupt[0]) + scores.corrupt[0]
    np.testing.assert_allclose(np.ravel(ours), list(read.values()), atol=1e-5)
    with pytest.raises(PatchError, match="no such tokens"):
        patch(lvlm, [pair_of(0)], [site], tokens="prefix:all", min_effect=0)


def test_a_multi_token_answer_follows_the_prefix() -> None:
    lvlm = model("llava")
    pair = prefixed(0, "the cat is")
    pair = replace(pair, clean=replace(pair.clean, answer="a big cat"))
    scores = patch_heads(lvlm, [pair], metric="log_probability", min_effect=0)
    whole = replace(pair.clean, prefix="the cat is a big cat", answer="red")
    encoding = lvlm.encode(whole)
    with torch.no_grad():
        logits = lvlm.hf(**encoding.inputs).logits[0].log_softmax(-1)
    ids, last = encoding.inputs["input_ids"][0], encoding.tokens.last
    expected = sum(float(logits[p - 1, ids[p]]) for p in range(last - 2, last + 1))
    assert scores.clean[0] == pytest.approx(expected, abs=1e-5)


def test_shares_keep_the_prefix_in_every_run() -> None:
    lvlm = model("llava")
    clean = prefixed(0, "the cat is").clean
    other = "Is there a dog in the image?"
    question = replace(clean, question="Is there a cat in the image?")
    result = input_attribution.split(
        lvlm, [question], method="shapley", neutral_images=["blank"], neutral_questions=[other]
    ).examples[0]

    def value(image: bool, prompt: bool) -> float:
        picture = question.image if image else EditedImage(question.image, "blank")
        run = replace(question, image=picture, question=question.question if prompt else other)
        return float(margins(lvlm, lvlm.logits(lvlm.collate([lvlm.encode(run)]))[0]))

    v = {(i, p): value(i, p) for i in (False, True) for p in (False, True)}
    assert result.prior == pytest.approx(v[False, False], abs=1e-4)
    image = (v[True, False] - v[False, False] + v[True, True] - v[False, True]) / 2
    assert result.shares[0] == pytest.approx(image, abs=1e-4)


def test_attribution_and_knockout_read_the_word_after_the_prefix() -> None:
    lvlm = model("llava")
    pair = prefixed(0, "the cat is")
    attributed = attribution.heads(lvlm, [pair], min_effect=0)
    patched = patch_heads(lvlm, [pair], min_effect=0)
    assert attributed.clean[0] == pytest.approx(patched.clean[0], abs=1e-5)
    key = answer_key(lvlm, pair.clean)
    example = (
        pair.clean
        if float(key.margin(lvlm.logits(lvlm.encode(pair.clean).inputs)[0], "red")) > 0
        else replace(pair.clean, answer="green")
    )
    knockout = attention_knockout.sweep(lvlm, [example], target="last", source="prefix:all", windows=[[0, 1]])
    tokens = lvlm.encode(example).tokens
    block = torch.zeros(1, tokens.length, tokens.length, dtype=torch.bool)
    block[:, tokens.last, list(tokens.prefix[:-1])] = True
    with attention_knockout.blocked(lvlm, [0, 1], block):
        after = lvlm.logits(lvlm.encode(example).inputs)[0].softmax(-1)[
            key.tokens[key.candidates.index(example.answer)]
        ]
    assert knockout.probability[0] * (1 + knockout.change[0, 0]) == pytest.approx(float(after.sum()), abs=1e-6)
