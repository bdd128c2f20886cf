"""Rows of mentions: tokens by hand, log-probabilities by log_softmax, padded batches against single examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import ActivationStore, merge, trace, verify
from concepts import ConceptDataset, Mention, with_mentions
from groundscope.core.errors import DataError, SiteError
from probes import fit_grid
from tests.toys.examples import example
from tests.toys.families import model

TOKENS = ["mention:before", "mention:first", "mention:last", "last"]
TEXTS = {
    "a": "the cat is red and a big dog",
    "b": "a dog",
    "c": "no",  # nothing is mentioned
    "d": "yes , a cat",
}
PLAIN = ConceptDataset("d", tuple(replace(example(n % 2), id=name, kind="open") for n, name in enumerate(TEXTS)))
"""Examples; their annotations are icons, none of which the texts name."""
PHRASES = {"big dog": "big dog"}


def written() -> ConceptDataset:
    data = with_mentions(PLAIN, TEXTS, {"big dog": "dog"}, vocabulary=["cat", "dog"])
    return ConceptDataset("w", tuple(
        replace(e, mentions=tuple(replace(m, present=m.noun == "dog") for m in e.mentions)) for e in data
    ))  # fmt: skip


HAND = {  # example: noun, words before, first and last word of the mention
    "a": [("cat", 1, 1), ("dog", 6, 7)],
    "b": [("dog", 1, 1)],
    "c": [],
    "d": [("cat", 3, 3)],
}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "instructblip_t5"])
def test_rows_are_the_tokens_of_each_mention(family: str, tmp_path: Path) -> None:
    lvlm, data = model(family), written()
    store = trace(lvlm, data, ["resid_post"], TOKENS, tmp_path, batch_size=4)
    assert verify(tmp_path).ok
    rows = store.mentions()
    frame, at = rows.frame(), 0
    site = "decoder.L1.resid_post"
    assert len(rows) == sum(map(len, HAND.values()))
    for question in data:
        encoding = lvlm.encode(question)
        x = lvlm.read(encoding.inputs, [site])[site][0].numpy()
        with torch.no_grad():
            logits = lvlm.hf(**encoding.inputs).logits[0].float()
        name = "decoder_input_ids" if lvlm.encoder_decoder else "input_ids"
        ids, start = encoding.inputs[name][0], encoding.tokens.length - len(TEXTS[question.id].split())
        for number, (noun, first, last) in enumerate(HAND[question.id]):
            row = frame.iloc[at]
            assert (row["id"], row["mention:noun"], row["mention:number"]) == (f"{question.id}/{number}", noun, number)
            assert row["group"] == question.group
            assert row["object:hallucinated"] == (noun != "dog")
            for which, position in (("before", first - 1), ("first", first), ("last", last)):
                got = rows.read(site, f"mention:{which}")[at]
                np.testing.assert_allclose(got, x[start + position], atol=2e-5)
            by_hand = [
                float(torch.log_softmax(logits[start + p - 1], -1)[ids[start + p]]) for p in range(first, last + 1)
            ]
            assert row["mention:log_p"] == pytest.approx(sum(by_hand), abs=1e-4)
            assert row["mention:first_log_p"] == pytest.approx(by_hand[0], abs=1e-4)
            text = TEXTS[question.id]
            words = " ".join(text.split()[:first])
            assert row["mention:place"] == pytest.approx((len(words) + 1) / len(text))
            at += 1
    selected = rows.read(site, "mention:first", head=None, examples=np.array([3, 0]))
    np.testing.assert_array_equal(selected, rows.read(site, "mention:first")[[3, 0]])


def test_rows_do_not_depend_on_the_batch_or_on_other_selections(tmp_path: Path) -> None:
    lvlm, data = model("llava"), written()
    batched = trace(lvlm, data, ["z"], ["mention:first", "answer:0"], tmp_path / "a", batch_size=4)
    alone = trace(lvlm, data, ["z"], ["mention:first"], tmp_path / "b", batch_size=1, answers=False, shard_size=1)
    for column in ("mention:noun", "object:hallucinated", "mention:number"):
        assert batched.mentions().frame()[column].tolist() == alone.mentions().frame()[column].tolist()
    for column in ("mention:log_p", "mention:first_log_p"):
        values = [s.mentions().frame()[column].to_numpy() for s in (batched, alone)]
        np.testing.assert_allclose(values[0], values[1], atol=1e-4)
    read = [s.mentions().read("decoder.L1.z", "mention:first", head=1) for s in (batched, alone)]
    np.testing.assert_allclose(read[0], read[1], atol=2e-5)
    repeated = trace(lvlm, data, ["z"], ["mention:first"], tmp_path / "b", batch_size=1, answers=False, shard_size=1)
    assert repeated.digest == alone.digest
    others = ConceptDataset("w", tuple(replace(e, id=f"{e.id}2") for e in data))
    second = trace(lvlm, others, ["z"], ["mention:first"], tmp_path / "c", batch_size=1, answers=False)
    merged = merge(ActivationStore(tmp_path / "b").merge(second), tmp_path / "d")
    assert len(merged.mentions()) == 2 * len(alone.mentions())


def test_probes_are_fitted_on_mentions(tmp_path: Path) -> None:
    lvlm = model("llava")
    texts = {f"e{n}": f"the cat is {'red' if n % 3 else 'big'} and a {'dog' if n % 2 else 'cat'}" for n in range(60)}
    data = ConceptDataset("d", tuple(
        replace(example(n % 2), id=name, group=f"g{n}", prefix=text, candidates=(), mentions=(
            Mention("cat", 4, 7, True), Mention("x", len(text) - 3, len(text), text.endswith("cat")),
        )) for n, (name, text) in enumerate(texts.items())
    ))  # fmt: skip
    rows = trace(lvlm, data, ["resid_post"], ["mention:first"], tmp_path).mentions()
    grid = fit_grid(rows, None, "resid_post", tokens="mention:first", folds=2, C=(0.1,), control=0)
    assert grid.concepts == ("object:hallucinated",)
    assert grid.frame()["balanced_accuracy"].max() == pytest.approx(1.0)  # the word itself tells


def test_bad_mentions_are_refused(tmp_path: Path) -> None:
    lvlm = model("llava")
    with pytest.raises(DataError, match="'mention:first': no example of dataset 'd' has mentions; make them"):
        trace(lvlm, PLAIN, ["z"], ["mention:first"], tmp_path)
    beyond = replace(PLAIN[0], prefix="a cat", mentions=(Mention("cat", 2, 9),))
    with pytest.raises(DataError, match="the prefix has 5 characters, not at characters 2-8"):
        lvlm.encode(beyond)
    store = trace(lvlm, PLAIN, ["z"], ["last"], tmp_path)
    with pytest.raises(SiteError, match="has no tokens of mentions; trace 'mention:before'"):
        store.mentions()
    with pytest.raises(SiteError, match=r"use mentions\(\)\.read"):
        trace(lvlm, written(), ["z"], ["mention:last"], tmp_path, force=True).read("decoder.L0.z", "mention:last")
