"""Edits of attention at the last queries, against eager attention by hand in whole forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm import Lvlm, wrap_lvlm
from lvlm.decoding.attention_edits import check_attention_edits, edit_attention, read_attention
from lvlm.decoding.attention_rows import AttentionRows, attention_scores
from lvlm.decoding.decoder import AnswerRule, Branch, Step
from lvlm.decoding.loop import generate, generate_prompts
from mitigation.training_free.branches import without_image
from tests.toys.attention_oracle import Call, by_hand, plain
from tests.toys.decoding_oracle import double_model, naive_steps, text_only
from tests.toys.edge_oracle import double
from tests.toys.examples import example
from tests.toys.families import BUILDERS, model
from tests.toys.random_models import hooks_of
from tests.toys.remote_code_families import STAND_INS, build_stand_in

FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "paligemma2")
ENCODER_DECODERS = {"instructblip_t5", "florence2"}


def boost(rows: AttentionRows) -> AttentionRows:
    return rows.with_scores(torch.where(rows.image, rows.scores + 0.5 * rows.scores.abs(), 1.3 * rows.scores))


def boost_by_hand(call: Call) -> Tensor:
    w = call.scores
    boosted = torch.where(call.image, w + 0.5 * w.abs(), 1.3 * w).masked_fill(w.isinf(), -torch.inf)
    late = torch.arange(w.shape[1])[:, None] >= call.prompt - 1
    return torch.where(late, boosted, w).softmax(-1) @ call.values


class Contrast(AnswerRule):
    """Twice the logits minus those without the image."""

    def __init__(self, lvlm: Lvlm, batch: Any) -> None:
        self.lvlm, self.batch = lvlm, batch
        self.scores: list[Tensor] = []

    def branches(self, first: Step) -> list[Branch]:
        return [without_image(self.lvlm, self.batch)]

    def combine(self, step: Step) -> Tensor:
        self.scores.append(2 * step.logits - step.branches[0])
        return self.scores[-1]


def rows_of(batch: Any) -> list[dict[str, Tensor]]:
    doubles = [{n: x.double() if x.is_floating_point() else x for n, x in e.inputs.items()} for e in batch.encodings]
    return [dict(row) for row in doubles]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_is_eager_attention_by_hand(family: str, implementation: str) -> None:
    if (family, implementation) == ("paligemma2", "sdpa"):
        pytest.skip("scores with a softcap need eager attention in transformers")
    from lvlm.access.eager_attention import attention

    # PaliGemma's prompts are not causal, so a whole forward pass over an answer is another computation than generation.
    steps = 1 if family == "paligemma2" else 4
    lvlm = double_model(family)
    batch = next(lvlm.batches([example(0), example(1)], 2))
    rule = Contrast(lvlm, batch)
    with attention(lvlm, implementation), edit_attention(lvlm, boost, branches=[0]):
        answers = generate(lvlm, batch, rule, steps, ends=False)
    for row, inputs in enumerate(rows_of(batch)):
        prompt = inputs["input_ids"].shape[1]
        context = [
            lambda p=prompt: by_hand(lvlm, boost_by_hand, p),
            lambda: by_hand(lvlm, plain, 0),
        ]
        tokens, scores = naive_steps(
            lvlm, [inputs, text_only(lvlm, inputs)], lambda _, x: 2 * x[0] - x[1], steps, context
        )
        assert answers[row] == tokens
        for ours, oracle in zip(rule.scores, scores, strict=True):
            torch.testing.assert_close(ours[row].log_softmax(-1), oracle.log_softmax(-1), atol=3e-5, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_rows_that_are_not_edited_are_causal_as_before(family: str) -> None:
    lvlm = double_model(family)
    inputs = next(lvlm.batches([example(0)], 1)).inputs
    sites = [f"decoder.L{i}.resid_post" for i in range(lvlm.n_layers)]
    before = lvlm.read(inputs, sites)
    with edit_attention(lvlm, boost):
        after = lvlm.read(inputs, sites)
    for site in sites:
        assert torch.equal(before[site][:, :-1], after[site][:, :-1])
        assert not torch.equal(before[site][:, -1], after[site][:, -1])


@pytest.mark.parametrize("family", sorted(set(BUILDERS) - ENCODER_DECODERS))
def test_every_family_whose_decoder_reads_the_prompt_is_read(family: str) -> None:
    lvlm = model(family)
    inputs = next(lvlm.batches([example(0)], 1)).inputs
    before = lvlm.logits(inputs)
    weights: dict[int, Tensor] = {}
    with read_attention(lvlm, lambda rows: weights.__setitem__(rows.layer, rows.weights)):
        after = lvlm.logits(inputs)
    assert torch.equal(before, after)
    layers = [i for i in range(lvlm.n_layers) if lvlm.attends("decoder", i, cross=False)]
    assert sorted(weights) == layers
    expected = lvlm.read(inputs, [f"decoder.L{i}.pattern" for i in layers], quiet=True)
    for i in layers:
        pattern = expected[f"decoder.L{i}.pattern"][:, :, -1:]
        torch.testing.assert_close(weights[i], pattern, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", sorted(ENCODER_DECODERS))
def test_families_with_an_encoder_are_refused(family: str) -> None:
    with pytest.raises(ModelError, match=f"{family}.*has an encoder"):
        check_attention_edits(model(family))


def test_attention_that_does_not_use_the_interface_is_refused() -> None:
    lvlm = double("llava")

    class OwnAttention(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    lvlm.layers("decoder")[1].self_attn = OwnAttention()
    with pytest.raises(ModelError, match="its OwnAttention does not call transformers' AttentionInterface"):
        check_attention_edits(lvlm)


@pytest.mark.parametrize("family", sorted(STAND_INS))
def test_families_with_their_own_attention_are_refused(family: str) -> None:
    lvlm = wrap_lvlm(*build_stand_in(family), name=family, validate=False)
    with pytest.raises(ModelError, match=f"attention of {family} .* cannot be edited: its .*Attention does not call"):
        check_attention_edits(lvlm)


def test_other_implementations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = model("llava")
    monkeypatch.setattr(
        lvlm.layers("decoder")[0].self_attn.config, "_attn_implementation_internal", "flash_attention_2"
    )
    with pytest.raises(ModelError, match="'flash_attention_2'; load the model with attn_implementation sdpa or eager"):
        check_attention_edits(lvlm)


def test_everything_is_restored_after_the_context_and_after_an_error() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    lvlm = model("qwen2_5_vl")
    inputs = next(lvlm.batches([example(0)], 1)).inputs
    names = [set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)]
    before = lvlm.attention, hooks_of(lvlm), lvlm.logits(inputs)

    def fails(_rows: AttentionRows) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError), edit_attention(lvlm, fails):
        lvlm.logits(inputs)
    assert (lvlm.attention, hooks_of(lvlm)) == before[:2]
    assert torch.equal(lvlm.logits(inputs), before[2])
    assert [set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)] == names
    assert lvlm.interventions == ()
    assert lvlm.unregistered_hooks == ()


def test_the_vision_tower_is_not_edited() -> None:
    lvlm = model("llava")
    inputs = next(lvlm.batches([example(0)], 1)).inputs
    site = f"vision.L{lvlm.n_vision_layers - 1}.resid_post"
    before = lvlm.read(inputs, [site])[site]
    with edit_attention(lvlm, boost, queries="all"):
        assert lvlm.hf.config.vision_config._attn_implementation == "sdpa"
        assert torch.equal(lvlm.read(inputs, [site])[site], before)


def test_padded_rows_are_edited_as_alone() -> None:
    from dataclasses import replace

    lvlm = double_model("llava")
    texts = ["Is there a cat?", "What is in the image? Is there a cat?"]
    encodings = [lvlm.encode(replace(example(i), question=text)) for i, text in enumerate(texts)]
    assert encodings[0].shape != encodings[1].shape
    prompts = Branch.of("prompts", lvlm, encodings).prompts
    with edit_attention(lvlm, boost):
        batched = generate_prompts(lvlm, prompts, AnswerRule(), 4, names=["a", "b"], ends=False)
    for row, encoding in enumerate(encodings):
        inputs = {n: x.double() if x.is_floating_point() else x for n, x in encoding.inputs.items()}
        prompt = inputs["input_ids"].shape[1]
        context = [lambda p=prompt: by_hand(lvlm, boost_by_hand, p)]
        tokens, _ = naive_steps(lvlm, [inputs], lambda _, x: x[0], 4, context)
        assert batched[row] == tokens


def test_generation_of_transformers_is_edited_as_the_loop() -> None:
    lvlm = model("qwen2_5_vl")
    batch = next(lvlm.batches([example(0), example(1)], 2))
    from lvlm.generation import greedy

    with edit_attention(lvlm, boost):
        assert greedy(lvlm, batch.inputs, 4) == generate(lvlm, batch, AnswerRule(), 4)


@pytest.mark.parametrize("queries", ["after image", "all"])
def test_other_queries(queries: Any) -> None:
    lvlm = double_model("llava")
    inputs = next(lvlm.batches([example(0), example(1)], 2)).inputs
    image = inputs["input_ids"] == lvlm.content_id
    end = int(image[0].nonzero().amax()) + 1
    masks: list[Tensor] = []
    with read_attention(lvlm, lambda rows: masks.append(rows.queries), layers=[1], queries=queries):
        lvlm.logits(inputs)
    first = 0 if queries == "all" else end
    assert masks[0].shape[1] == inputs["input_ids"].shape[1] - first
    assert masks[0].all()
    with edit_attention(lvlm, boost, queries=queries):
        edited = lvlm.logits(inputs)
    first_row = {n: x[:1] for n, x in inputs.items()}
    with torch.no_grad(), by_hand(lvlm, boost_by_hand, first + 1):
        expected = lvlm.hf(**first_row, use_cache=False).logits[:, -1]
    torch.testing.assert_close(edited[:1], expected, atol=3e-5, rtol=0)


def test_edits_follow_each_other_and_readers_see_them() -> None:
    lvlm = double_model("llava")
    inputs = next(lvlm.batches([example(0)], 1)).inputs
    outputs: list[Tensor] = []

    def twice(rows: AttentionRows) -> AttentionRows:
        return boost(boost(rows))

    def halve(rows: AttentionRows) -> AttentionRows:
        return rows.with_weights(rows.weights / 2)

    with edit_attention(lvlm, twice):
        expected = lvlm.logits(inputs)
    with edit_attention(lvlm, boost), edit_attention(lvlm, boost):
        torch.testing.assert_close(lvlm.logits(inputs), expected)
    with (
        edit_attention(lvlm, boost, layers=[0]),
        edit_attention(lvlm, halve, layers=[0]),
        read_attention(lvlm, lambda rows: outputs.append(rows.weights.sum(-1)), layers=[0]),
    ):
        first = lvlm.logits(inputs)
    torch.testing.assert_close(outputs[0], torch.full_like(outputs[0], 0.5))

    def half_outputs(rows: AttentionRows) -> AttentionRows:
        return rows.with_outputs(boost(rows).outputs / 2)

    with edit_attention(lvlm, half_outputs, layers=[0]):
        torch.testing.assert_close(lvlm.logits(inputs), first)


def test_patterns_are_those_of_the_edit() -> None:
    lvlm = model("llava")
    inputs = next(lvlm.batches([example(0)], 1)).inputs
    with edit_attention(lvlm, lambda rows: rows.with_weights(rows.weights / 2), layers=[1]):
        pattern = lvlm.read(inputs, ["decoder.L1.pattern"], quiet=True)["decoder.L1.pattern"]
        assert lvlm.attention == "sdpa"
    torch.testing.assert_close(pattern[:, :, -1].sum(-1), torch.full_like(pattern[:, :, -1, 0], 0.5))
    torch.testing.assert_close(pattern[:, :, :-1].sum(-1), torch.ones_like(pattern[:, :, :-1, 0]))


def test_learned_sinks_take_weight() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=draw, dtype=torch.float64) for heads in (4, 2, 2))

    class Module(torch.nn.Module):
        num_key_value_groups, is_causal = 2, True
        sinks = torch.randn(4, generator=draw, dtype=torch.float64)

    module = Module().eval()
    future = ~torch.ones(5, 5, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.float64).masked_fill(future, torch.finfo(torch.float64).min)
    expected, weights = eager_attention_forward(module, q, k, v, mask, 0.5, s_aux=module.sinks)
    scores = attention_scores(module, q, k, mask, 3, {"scaling": 0.5})
    valid = torch.ones(2, 5, dtype=torch.bool)
    from lvlm.decoding.row_layout import RowLayout

    layout = RowLayout(torch.zeros(2, dtype=torch.long), valid, valid, 4)
    rows = AttentionRows(0, scores, v, layout, valid[:, 3:], module.sinks)
    torch.testing.assert_close(rows.weights, weights[:, :, 3:])
    torch.testing.assert_close(rows.outputs.transpose(1, 2), expected[:, 3:])


def test_a_forward_pass_without_token_ids_is_refused() -> None:
    lvlm = model("llava")
    embeddings = torch.zeros(1, 4, lvlm.width)
    with pytest.raises(ModelError, match="image tokens are unknown; pass input_ids"), edit_attention(lvlm, boost):
        lvlm.hf(inputs_embeds=embeddings)
