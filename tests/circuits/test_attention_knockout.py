"""Attention knockout against a decoder written out with a mask made by hand, over families, and on known circuits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from circuits import attention_knockout
from concepts.schema import Example
from groundscope.core.errors import ConfigError, ModelError, PatchError, SiteError
from groundscope.testing import planted_circuits
from lvlm import wrap_lvlm
from lvlm.answer_keys import answer_key
from lvlm.model import Lvlm
from tests.toys.families import build
from tests.toys.random_models import examples, hooks_of, layers_of, random_model, shared_model

BY_MASK = (
    "llava",
    "qwen2_vl",
    "qwen3_vl",
    "glm4v",
    "internvl",
    "paligemma2",
    "gemma3",
    "blip2_opt",
    "kosmos2",
    "llama4",
)
BY_CROSS_ATTENTION = ("mllama", "florence2")


@cache
def answered(model: Lvlm) -> tuple[Example, ...]:
    """Questions whose true answer is, by decree, what the model says."""
    out = []
    for example in examples():
        logits = model.logits(model.encode(example).inputs)[0].float()
        key = answer_key(model, example)
        out.append(replace(example, answer=key.candidates[int(key.scores(logits).argmax())]))
    return tuple(out)


@torch.no_grad()
def by_hand(model: Lvlm, example: Example, cut: np.ndarray, layers: tuple[int, ...]) -> np.ndarray:
    """Return the last logits of a Llama written out in float64, with ``cut`` [T, T] masked in some layers."""
    states: list[torch.Tensor] = []
    hook = layers_of(model)[0].register_forward_pre_hook(
        lambda _m, args, kw: states.append(args[0] if args else kw["hidden_states"]), with_kwargs=True
    )
    model.logits(model.encode(example).inputs)
    hook.remove()
    x = states[0][0].double()
    text = model.hf.model.language_model
    dim, heads, length = model.head_dim, model.n_heads, len(x)
    angle = torch.arange(length).double()[:, None] / 10000 ** (torch.arange(0, dim, 2).double() / dim)

    def norm(v: torch.Tensor, module: Any) -> torch.Tensor:
        return v / ((v**2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight.double()

    def rotate(v: torch.Tensor) -> torch.Tensor:
        a, b = v[..., : dim // 2], v[..., dim // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    for i, layer in enumerate(text.layers):
        hidden = norm(x, layer.input_layernorm)
        q, k, v = (
            (hidden @ getattr(layer.self_attn, f"{name}_proj").weight.double().T)
            .reshape(length, heads, dim)
            .transpose(0, 1)
            for name in "qkv"
        )
        scores = rotate(q) @ rotate(k).transpose(1, 2) / dim**0.5
        hidden_from = np.triu(np.ones((length, length), bool), 1) | (cut if i in layers else False)
        scores[:, torch.tensor(hidden_from)] = float("-inf")
        z = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
        x = x + z @ layer.self_attn.o_proj.weight.double().T
        hidden = norm(x, layer.post_attention_layernorm)
        gate, up = (hidden @ getattr(layer.mlp, f"{n}_proj").weight.double().T for n in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ layer.mlp.down_proj.weight.double().T
    return (norm(x[-1], text.norm) @ model.hf.lm_head.weight.double().T).numpy()


def places(model: Lvlm, example: Example) -> dict[str, list[int]]:
    """Find the roles in the tokens themselves."""
    ids = model.encode(example).inputs["input_ids"][0].tolist()
    word = model.processor.tokenizer.convert_ids_to_tokens(ids)
    image = [i for i, w in enumerate(word) if w == "<image>"]
    end = word.index("ASSISTANT")
    return {"image:all": image, "question:all": list(range(image[-1] + 1, end)), "last": [len(ids) - 1]}


@pytest.mark.parametrize(
    ("target", "source", "attention"),
    [
        ("last", "image:all", "sdpa"),
        ("question:all", "image:all", "sdpa"),
        ("last", "question:all", "eager"),
        ("question:all", "question:all", "sdpa"),
    ],
)
def test_knockout_equals_a_decoder_with_an_explicit_mask(target: str, source: str, attention: str) -> None:
    model = shared_model() if attention == "sdpa" else random_model()
    model.hf.set_attn_implementation(attention)
    data = answered(shared_model())[:2]
    knockout = attention_knockout.sweep(model, data, target=target, source=source, window=3, batch_size=1)
    assert knockout.windows == ((0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (4, 5))
    assert knockout.ids == tuple(e.id for e in data)
    for n, example in enumerate(data):
        at = places(model, example)
        length = model.encode(example).tokens.length
        cut = np.zeros((length, length), bool)
        cut[np.ix_(at[target], at[source])] = True
        np.fill_diagonal(cut, False)
        word = model.processor.tokenizer.convert_tokens_to_ids(example.answer)

        def chance(cut: np.ndarray, layers: tuple[int, ...], example: Example = example, word: int = word) -> float:
            logits = by_hand(model, example, cut, layers)
            return float(np.exp(logits[word] - logits.max()) / np.exp(logits - logits.max()).sum())

        whole = chance(cut, ())
        assert knockout.probability[n] == pytest.approx(whole, rel=1e-4)
        for k in (0, 2):
            expected = chance(cut, knockout.windows[k]) / whole - 1
            assert knockout.change[n, k] == pytest.approx(expected, abs=2e-4)
    assert np.abs(knockout.change).max() > 1e-2
    assert hooks_of(model) == 0


def test_the_object_is_part_of_the_image() -> None:
    model = shared_model()
    data = answered(model)
    knockout = attention_knockout.sweep(model, data, target="last", source="object:all", window=6)
    inside = [e for e in data if e.named_object() is not None]
    assert knockout.ids == tuple(e.id for e in inside)
    assert knockout.without == len(data) - len(inside) > 0
    tokens = model.encode(inside[0]).tokens
    cut = np.zeros((tokens.length,) * 2, bool)
    cut[tokens.last, list(tokens.object(inside[0].subject or ""))] = True
    word = model.processor.tokenizer.convert_tokens_to_ids(inside[0].answer)
    logits = by_hand(model, inside[0], cut, tuple(range(6)))
    after = np.exp(logits[word]) / np.exp(logits).sum()
    assert knockout.change[0, 3] == pytest.approx(after / knockout.probability[0] - 1, abs=2e-4)


def test_planted_circuits_lose_the_answer_at_their_layers() -> None:
    direct, two = planted_circuits.plant(3, prior=False), planted_circuits.plant(3, "two_step", prior=False)
    assert direct.grounding is not None
    data = direct.examples(8)
    knockout = attention_knockout.sweep(direct.model, data, target="last", source="image:all", window=1)
    layers = np.arange(4)
    lost = knockout.change.mean(0)
    assert lost[direct.grounding.layer] < -0.3
    np.testing.assert_allclose(lost[layers != direct.grounding.layer], 0, atol=0.01)
    assert knockout.right[:, layers != direct.grounding.layer].all()
    assert two.mover is not None
    assert two.reader is not None
    first = attention_knockout.sweep(two.model, data, target="question:all", source="image:all", window=1).change.mean(
        0
    )
    then = attention_knockout.sweep(two.model, data, target="last", source="question:all", window=1).change.mean(0)
    past = attention_knockout.sweep(two.model, data, target="last", source="image:all", window=1).change.mean(0)
    assert int(first.argmin()) == two.mover.layer
    assert int(then.argmin()) == two.reader.layer
    assert max(first.min(), then.min()) < -0.3
    assert past.min() > -0.01


def test_wrong_answers_are_left_out_and_counted() -> None:
    p = planted_circuits.plant(1)
    data = list(p.examples(8))
    turned = replace(data[0], answer=next(c for c in data[0].candidates if c != data[0].answer))
    knockout = attention_knockout.sweep(p.model, [turned, *data[1:]], windows=[range(4), [2]])
    assert (knockout.wrong, knockout.without, len(knockout.ids)) == (1, 0, 7)
    assert knockout.windows == ((0, 1, 2, 3), (2,))
    frame = knockout.frame()
    assert list(frame["first"]) == [0, 2]
    np.testing.assert_allclose(frame["change"], knockout.change.mean(0), rtol=1e-6)
    assert (frame["change_low"] <= frame["change"]).all()
    assert len(knockout.select(np.arange(3)).change) == 3


@pytest.mark.parametrize("name", BY_MASK)
def test_families_whose_attention_takes_a_mask(name: str) -> None:
    model = wrap_lvlm(*build(name), name=name)
    data = [
        replace(e, candidates=("yes", "no"), answer=answer)
        for e in examples(4)
        for answer in ("yes", "no")
    ]  # fmt: skip
    knockout = attention_knockout.sweep(
        model, data, target="question:all", source="image:all", windows=[range(model.n_layers)]
    )
    assert knockout.wrong + len(knockout.ids) == len(data)
    assert np.abs(knockout.change).max() > 1e-4
    # What was cut is not attended to, and no other token attends to less than all of 1.
    encoding = model.encode(data[0])
    tokens = encoding.tokens
    block = torch.zeros(1, tokens.length, tokens.length, dtype=torch.bool)
    block[:, np.ix_(tokens.question, tokens.image)[0], np.ix_(tokens.question, tokens.image)[1]] = True
    site = f"decoder.L{model.n_layers - 1}.pattern"
    with attention_knockout.blocked(model, [model.n_layers - 1], block):
        pattern = model.read(encoding.inputs, [site], quiet=True)[site][0]
    assert pattern[:, block[0]].abs().max() == 0
    assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5)
    assert torch.triu(pattern, 1).max() == 0 or model.spec.model_type == "paligemma" or name == "gemma3"


@pytest.mark.parametrize("name", BY_CROSS_ATTENTION)
def test_families_without_image_tokens_in_the_decoder_are_refused(name: str) -> None:
    model = wrap_lvlm(*build(name), name=name)
    data = [replace(e, candidates=("yes", "no"), answer="yes") for e in examples(2)]
    with pytest.raises(PatchError, match="read by cross-attention"):
        attention_knockout.sweep(model, data)


def test_attention_that_ignores_its_mask_is_named() -> None:
    model = random_model()
    attention = layers_of(model)[2].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "attention_mask": None})
    with pytest.raises(ModelError, match="does not take an additive mask"):
        attention_knockout.sweep(model, answered(shared_model())[:4], windows=[[2]])
    layer = layers_of(model)[4]
    attention = layer.self_attn
    attention.register_forward_pre_hook(
        lambda _m, args, kw: (args, {k: v for k, v in kw.items() if k != "attention_mask"}), with_kwargs=True
    )
    with pytest.raises(ModelError, match="no attention_mask argument"):
        attention_knockout.sweep(model, answered(shared_model())[:4], windows=[[4]])


def test_windows() -> None:
    assert attention_knockout.layer_windows(4, 1) == ((0,), (1,), (2,), (3,))
    assert attention_knockout.layer_windows(4, 2) == ((0,), (0, 1), (1, 2), (2, 3))
    assert attention_knockout.layer_windows(20, attention_knockout.WINDOW)[10] == tuple(range(6, 15))


def test_invalid_options_and_windows_are_refused() -> None:
    model, data = shared_model(), answered(shared_model())
    for options in ({"target": "first"}, {"source": "image"}):
        with pytest.raises(SiteError, match="unknown token selection"):
            attention_knockout.sweep(model, data, **options)
    with pytest.raises(ConfigError, match="window=0"):
        attention_knockout.sweep(model, data, window=0)
    for windows in ([[6]], [], [[]]):
        with pytest.raises(SiteError, match="layers 0-5"):
            attention_knockout.sweep(model, data, windows=windows)
    with pytest.raises(PatchError, match="examples is empty"):
        attention_knockout.sweep(model, [])
    absent = [e for e in data if e.named_object() is None]
    with pytest.raises(PatchError, match="lack 'last' or 'object:all'"):
        attention_knockout.sweep(model, absent, target="last", source="object:all")
