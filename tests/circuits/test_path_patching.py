"""Path patching against whole forwards in which plain torch hooks freeze everything but the path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from circuits import patch, patch_heads, patch_paths
from concepts.counterfactual_pair import CounterfactualPair
from concepts.schema import Example
from groundscope.core.errors import ConfigError, PatchError, SiteError
from lvlm import Head, Lvlm
from tests.toys.families import WHERE, at, model
from tests.toys.patching_oracle import pair_of
from tests.toys.random_models import hooks_of, layers_of, pairs, shared_model

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def tensor(x: Any) -> torch.Tensor:
    return x[0] if isinstance(x, tuple) else x


class Naive:
    """Wang et al.'s four runs: two to keep everything, one frozen, one to the end."""

    def __init__(self, lvlm: Lvlm, layers: Any, clean: Example, corrupt: Example) -> None:
        self.lvlm, self.layers, self.corrupt = lvlm, layers, corrupt
        self.clean_kept, self.clean_values = self.keep(clean), self.keep(corrupt)

    @torch.no_grad()
    def run(self, example: Example, hooks: list[Any]) -> torch.Tensor:
        try:
            return self.lvlm.logits(self.lvlm.encode(example).inputs)[0]
        finally:
            for hook in hooks:
                hook.remove()

    def keep(self, example: Example) -> dict[tuple[int, str], torch.Tensor]:
        values: dict[tuple[int, str], torch.Tensor] = {}
        hooks = []
        for i, layer in enumerate(self.layers):
            hooks.append(
                layer.self_attn.o_proj.register_forward_pre_hook(
                    lambda _m, a, i=i: values.update({(i, "z"): a[0].clone()})
                )
            )
            for name, module in self.modules(layer).items():
                hooks.append(
                    module.register_forward_hook(
                        lambda _m, _a, out, i=i, name=name: values.update({(i, name): tensor(out).clone()})
                    )
                )
        self.run(example, hooks)
        return values

    def modules(self, layer: Any) -> dict[str, Any]:
        return {"attn": layer.self_attn, "mlp": layer.mlp, **{p: getattr(layer.self_attn, p) for p in PROJECTIONS}}

    def put_z(self, layer: int, head: int, value: torch.Tensor, positions: list[int]) -> Any:
        width = self.clean_values[layer, "z"].shape[-1] // self.lvlm.n_heads

        def replace_input(_m: Any, args: Any) -> Any:
            z, columns = args[0].clone(), slice(head * width, (head + 1) * width)
            z[:, positions, columns] = value[:, positions, columns]
            return (z,)

        return self.layers[layer].self_attn.o_proj.register_forward_pre_hook(replace_input)

    def freeze(self, layer: int, name: str) -> Any:
        value = self.clean_values[layer, name]
        return self.modules(self.layers[layer])[name].register_forward_hook(
            lambda _m, _a, out: (value, *out[1:]) if isinstance(out, tuple) else value
        )

    def path(self, sender: Head, receiver: Head | None, positions: list[int], inputs: str, live: bool) -> torch.Tensor:
        hooks = [self.put_z(sender.layer, sender.head, self.clean_kept[sender.layer, "z"], positions)]
        heard: list[torch.Tensor] = []
        for i in range(sender.layer, len(self.layers)):
            if i > sender.layer:
                hooks.append(self.freeze(i, "attn"))
                if receiver is not None:
                    hooks += [self.freeze(i, p) for p in PROJECTIONS if p[0] not in inputs]
            if not live:
                hooks.append(self.freeze(i, "mlp"))
        if receiver is None:
            return self.run(self.corrupt, hooks)
        hooks.append(
            self.layers[receiver.layer].self_attn.o_proj.register_forward_pre_hook(
                lambda _m, a: heard.append(a[0].clone())
            )
        )
        self.run(self.corrupt, hooks)
        every = list(range(heard[0].shape[1]))
        return self.run(self.corrupt, [self.put_z(receiver.layer, receiver.head, heard[0], every)])


def compared(
    lvlm: Lvlm, layers: Any, pair: CounterfactualPair, tokens: str, inputs: str, mlps: Any, least: float
) -> None:
    where = lvlm.encode(pair.clean).tokens
    suffix = list(range(max(where.image) + 1, where.length))
    positions = {"last": [where.last], "suffix:all": suffix, "prefix:all": list(where.prefix)}[tokens]
    senders = [Head(0, 1), Head(1, 3)]
    receivers = [Head(1, 0), Head(2, 2)]
    loop = Naive(lvlm, layers, pair.clean, pair.corrupt)
    ids = [lvlm.processor.tokenizer.convert_tokens_to_ids(e.answer) for e in (pair.clean, pair.corrupt)]
    for to in (receivers, "logits"):
        scores = patch_paths(lvlm, [pair], senders, to, tokens=tokens, inputs=inputs, mlps=mlps, min_effect=0)  # pyright: ignore[reportArgumentType]
        assert scores.path == "shared prefix"
        edges = (
            [(s, r) for s in senders for r in receivers if r.layer > s.layer]
            if to != "logits"
            else [(s, None) for s in senders]
        )
        assert scores.sites == tuple(f"{s}->{r or 'logits'}" for s, r in edges)
        expected = []
        for s, r in edges:
            logits = loop.path(s, r, positions, inputs, mlps == "live")
            expected.append(float(logits[ids[0]] - logits[ids[1]]))
        ours = scores.effects[0, :, 0] * (scores.clean[0] - scores.corrupt[0]) + scores.corrupt[0]
        np.testing.assert_allclose(ours, expected, atol=1e-5)
        assert np.abs(np.array(expected) - scores.corrupt[0]).max() > least


@pytest.mark.parametrize("mlps", ["frozen", "live"])
@pytest.mark.parametrize(
    ("tokens", "inputs"), [("last", "qkv"), ("suffix:all", "qkv"), ("suffix:all", "q"), ("suffix:all", "kv")]
)
def test_equals_frozen_whole_forwards(tokens: str, inputs: str, mlps: Any) -> None:
    compared(shared_model(), layers_of(shared_model()), pairs("color")[0], tokens, inputs, mlps, 1e-3)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "idefics3", "mistral3"])
def test_of_other_families_too(family: str) -> None:
    compared(model(family), at(model(family).hf, WHERE[family][0]), pair_of(0), "suffix:all", "v", "frozen", 1e-7)


@pytest.mark.parametrize("mlps", ["frozen", "live"])
@pytest.mark.parametrize("tokens", ["last", "suffix:all", "prefix:all"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_paths_to_the_word_after_a_prefix(family: str, tokens: str, mlps: Any) -> None:
    """The answer is read after the prefix, whose tokens belong to the suffix; prefixes of two lengths give two results."""
    effects = []
    for prefix in ("the cat is", "a big"):
        pair, words = pair_of(0), {"prefix": prefix, "candidates": ("red", "green")}
        clean, corrupt = replace(pair.clean, answer="red", **words), replace(pair.corrupt, answer="green", **words)
        pair = CounterfactualPair(clean, corrupt, "word", "another image")
        lvlm = model(family)
        compared(lvlm, at(lvlm.hf, WHERE[family][0]), pair, tokens, "qkv", mlps, 1e-6)
        effects.append(patch_paths(lvlm, [pair], [Head(0, 1)], tokens=tokens, mlps=mlps, min_effect=0).effects)
    assert not np.allclose(*effects, atol=1e-6)


def test_the_last_token_is_that_of_the_prefix() -> None:
    lvlm, pair = model("llava"), pair_of(0)
    words = {"prefix": "the cat is", "candidates": ("red", "green")}
    clean, corrupt = replace(pair.clean, answer="red", **words), replace(pair.corrupt, answer="green", **words)
    pair = CounterfactualPair(clean, corrupt, "word", "another image")
    last, written = (
        patch_paths(lvlm, [pair], [Head(1, h) for h in range(4)], tokens=tokens, min_effect=0)
        for tokens in ("last", f"positions:{lvlm.encode(clean).tokens.prefix[-1]}")
    )
    np.testing.assert_allclose(last.effects, written.effects, atol=1e-6)
    # A sender of the last layer that is patched before the last token of the prefix reaches nothing.
    top = Head(lvlm.n_layers - 1, 0)
    before = f"positions:{lvlm.encode(clean).tokens.prefix[0]}"
    assert np.abs(patch_paths(lvlm, [pair], [top], tokens=before, min_effect=0).effects).max() < 1e-4


def test_a_head_of_the_last_layer_has_no_way_but_the_direct_one() -> None:
    lvlm, pair = shared_model(), pairs("color")[0]
    heads = [Head(lvlm.n_layers - 1, h) for h in range(lvlm.n_heads)]
    direct = patch_paths(lvlm, [pair], heads, mlps="live", min_effect=0)
    whole = patch_heads(lvlm, [pair], min_effect=0)
    np.testing.assert_allclose(direct.effects[0, :, 0], whole.effects[0, -1], atol=1e-4)


def test_families_that_run_whole_forwards_patch_paths_too() -> None:
    lvlm = model("instructblip_t5")
    paths = patch_paths(lvlm, [pair_of(0)], [Head(2, h) for h in range(4)], mlps="live", min_effect=0)
    assert paths.path == "whole forwards"
    assert np.isfinite(paths.effects).all()


def test_invalid_senders_and_receivers_are_refused() -> None:
    lvlm, data = shared_model(), pairs("color")[:1]
    with pytest.raises(PatchError, match=r"no receiver \(L3\.H1\) is above a sender \(L3\.H0\)"):
        patch_paths(lvlm, data, [Head(3, 0)], [Head(3, 1)])
    with pytest.raises(PatchError, match="senders is empty"):
        patch_paths(lvlm, data, [])
    with pytest.raises(SiteError, match="heads 0-7"):
        patch_paths(lvlm, data, [Head(0, 8)])
    for wrong in ({"inputs": "x"}, {"inputs": ""}, {"mlps": "thawed"}):
        with pytest.raises(ConfigError, match="pass letters of 'qkv'"):
            patch_paths(lvlm, data, [Head(0, 0)], **wrong)  # pyright: ignore[reportArgumentType]  # mistakes
    assert hooks_of(lvlm) == 0
    assert patch(lvlm, data, Head(0, 0), min_effect=0).through == ""
