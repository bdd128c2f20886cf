"""Rows of mentions: tokens by hand, log-probabilities by log_softmax, padded batches against single examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import ActivationStore, merge, trace, verify
from concepts import ConceptDataset, Mention, with_mentions
from groundscope.core.errors import DataError, ProbeError, SiteError
from lvlm import Lvlm
from probes import fit_grid
from probes.analysis import logit_lens
from probes.analysis.logit_lens import Unembedding
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


@torch.no_grad()
def layer_outputs(lvlm: Lvlm, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The residual stream after each layer, before the final norm."""
    outputs: list[torch.Tensor] = []

    def keep(_module: object, _args: object, out: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        outputs.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_hook(keep) for layer in lvlm.layers("decoder")]
    lvlm.hf(**inputs)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_logit_lens_reads_words_at_mentions(family: str, tmp_path: Path) -> None:
    """Against hidden states of plain transformers, each layer's normed and unembedded in float64."""
    lvlm, data, words = model(family), written(), ["dog", "cat", "red"]
    store = trace(lvlm, data, ["resid_post"], [*TOKENS[:3], "last"], tmp_path, batch_size=4)
    config, vocabulary = lvlm.hf.config.get_text_config(), lvlm.processor.tokenizer.get_vocab()
    norm, unembedding = (m.weight.detach().double() for m in (lvlm.hf.get_decoder().norm, lvlm.hf.lm_head))
    unembed = Unembedding.of(store, epsilon=config.rms_norm_eps)
    lenses = {
        which: logit_lens.logit_lens(
            store.mentions(), words, vocabulary, tokens=f"mention:{which}", unembedding=unembed
        )
        for which in ("before", "first", "last")
    }
    at = 0
    for question in data:
        encoding = lvlm.encode(question)
        residuals = layer_outputs(lvlm, encoding.inputs)
        start = encoding.tokens.length - len(TEXTS[question.id].split())
        for _, first, last in HAND[question.id]:
            for which, position in (("before", first - 1), ("first", first), ("last", last)):
                for layer, residual in enumerate(residuals):
                    h = residual.reshape(-1, residual.shape[-1])[start + position].double()
                    normed = h / torch.sqrt((h * h).mean() + config.rms_norm_eps) * norm
                    log_p = torch.log_softmax(normed @ unembedding.T, -1)
                    want = [float(log_p[vocabulary[word]]) for word in words]
                    np.testing.assert_allclose(lenses[which][layer][at], want, atol=2e-5)
            at += 1
    assert at == len(lenses["first"][0])
    # At the last layer before a mention the lens is the model's own log-probability of its first token.
    frame, top = store.mentions().frame(), lvlm.n_layers - 1
    of_noun = [lenses["before"][top][i, words.index(noun)] for i, noun in enumerate(frame["mention:noun"])]
    named = [i for i, text in enumerate(frame["mention:noun"]) if text == "cat" or frame["id"][i].startswith("b")]
    np.testing.assert_allclose(np.array(of_noun)[named], frame["mention:first_log_p"][named], atol=1e-4)
    with pytest.raises(ProbeError, match="'zyzzyva' not in the vocabulary"):
        logit_lens.logit_lens(store.mentions(), ["zyzzyva"], vocabulary, tokens="mention:first")


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_logit_lens_after_a_prefix_ends_in_the_answer_of_the_model(family: str, tmp_path: Path) -> None:
    lvlm = model(family)
    data = ConceptDataset("p", tuple(replace(e, prefix=text) for e, text in zip(PLAIN, TEXTS.values(), strict=True)))
    store = trace(lvlm, data, ["resid_post"], ["last"], tmp_path)
    config, vocabulary = lvlm.hf.config.get_text_config(), lvlm.processor.tokenizer.get_vocab()
    unembed = Unembedding.of(store, epsilon=config.rms_norm_eps)
    lens = logit_lens.logit_lens(store, ["red", "dog"], vocabulary, tokens="last", unembedding=unembed)
    for row, question in enumerate(data):
        with torch.no_grad():
            logits = lvlm.hf(**lvlm.encode(question).inputs).logits[0, -1].double()
        log_p = torch.log_softmax(logits, -1)
        want = [float(log_p[vocabulary[word]]) for word in ("red", "dog")]
        np.testing.assert_allclose(lens[lvlm.n_layers - 1][row], want, atol=2e-5)


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
