"""Families whose code is not part of transformers, on stand-ins with the same module trees; runs from release 4.40 on."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import STAND_INS, build_stand_in
from toy_examples import example

from activation_store import trace
from concepts import ConceptDataset
from lvlm import Lvlm, wrap_lvlm
from lvlm.validation import validate

DECODER = {
    "minigpt4": ("llama_model.model.layers.1", "self_attn.o_proj"),
    "deepseek_vl_v2": ("language.model.layers.1", "self_attn.o_proj"),
    "qwen": ("transformer.h.1", "attn.c_proj"),
}
VISION = {
    "minigpt4": ("visual_encoder.blocks.1", "attn.proj"),
    "deepseek_vl_v2": ("vision.blocks.1", "attn.proj"),
    "qwen": ("transformer.visual.transformer.resblocks.1", "attn.out_proj"),
}
PROJECTOR = {"minigpt4": "llama_proj", "deepseek_vl_v2": "projector", "qwen": "transformer.visual"}
FAMILY = pytest.mark.parametrize("family", list(STAND_INS))


@cache
def model(family: str) -> Lvlm:
    return wrap_lvlm(*build_stand_in(family), name=family, validate=False)


@FAMILY
def test_every_identity_holds_to_float_precision(family: str) -> None:
    errors = validate(model(family), model(family).encode(example()))
    assert max(errors.values()) <= 1e-5
    for stack in ("decoder", "vision"):
        for part in ("sum of heads = attn_out", "pre + attn_out + mlp_out = post", "resid_pre = previous"):
            assert any(name.startswith(f"{stack}.L1") and part in name for name in errors), (stack, part)


@FAMILY
def test_traced_values_are_what_raw_hooks_see(family: str, tmp_path: Path) -> None:
    lvlm, data = model(family), ConceptDataset("d", (example(0), example(1)))
    sites = ["resid_post", "z", "vision.resid_post", "vision.z", "projector.out"]
    store = trace(lvlm, data, sites, ["last", "image:all"], tmp_path, answers=False)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, x: object) -> None:
        value = x[0] if isinstance(x, tuple) else x
        assert isinstance(value, torch.Tensor)
        # Qwen-VL's tower has tokens first and examples second.
        seen[name] = value.transpose(0, 1) if family == "qwen" and name.startswith("vision") else value

    hooks = []
    for stack, (layer, projection) in (("decoder", DECODER[family]), ("vision", VISION[family])):
        module = lvlm.hf.get_submodule(layer)
        hooks.append(module.register_forward_hook(lambda _m, _a, out, s=stack: keep(f"{s}.L1.resid_post", out)))
        inner = module.get_submodule(projection)
        hooks.append(inner.register_forward_pre_hook(lambda _m, args, s=stack: keep(f"{s}.L1.z", args)))
    end = lvlm.hf.get_submodule(PROJECTOR[family])
    hooks.append(end.register_forward_hook(lambda _m, _a, out: keep("projector.out", out)))
    batch = next(lvlm.batches(data.examples, 8))
    lvlm.logits(batch.inputs)
    for hook in hooks:
        hook.remove()
    for site in ("decoder.L1.resid_post", "decoder.L1.z"):
        np.testing.assert_array_equal(store.read(site, "last"), seen[site][:, -1].numpy(), err_msg=site)
    prefix = 1 if family == "minigpt4" else 0  # a class token
    for site in ("vision.L1.resid_post", "vision.L1.z", "projector.out"):
        first = prefix if site.startswith("vision") else 0
        for row, one in enumerate(store.ragged(site, "image:all")):
            np.testing.assert_array_equal(one, seen[site][row, first:].numpy(), err_msg=site)


@FAMILY
def test_an_example_in_a_batch_is_as_it_is_alone(family: str) -> None:
    lvlm = model(family)
    encodings = [lvlm.encode(example(0)), lvlm.encode(example(1)), lvlm.encode(example(2))]
    encodings = [e for e in encodings if e.shape == encodings[0].shape]
    assert len(encodings) > 1
    sites = ["decoder.L2.resid_post", "vision.L1.resid_post", "vision.L1.z", "projector.out"]
    together = lvlm.read(lvlm.collate(encodings), sites)
    for row, one in enumerate(encodings):
        alone = lvlm.read(lvlm.collate([one]), sites)
        for site in sites:
            torch.testing.assert_close(together[site][row], alone[site][0], rtol=0, atol=1e-5, msg=site)


def test_fused_queries_of_qwens_tower_are_told_apart_head_by_head() -> None:
    lvlm = model("qwen")
    inputs = lvlm.encode(example()).inputs
    attention = lvlm.hf.transformer.visual.transformer.resblocks[0].attn
    given: list[torch.Tensor] = []
    hook = attention.in_proj.register_forward_pre_hook(lambda _m, args: given.append(args[0].double()))
    sites = [f"vision.L0.{c}" for c in ("q", "k", "v", "z")]
    seen = lvlm.read(inputs, sites)
    hook.remove()
    # What the attention computes from them, head by head in float64, is what its output projection is given.
    q, k, v, z = (seen[site][0].double().unflatten(-1, (2, -1)) for site in sites)  # [T, H, head_dim]
    for head in range(2):
        scores = q[:, head] @ k[:, head].T / q.shape[-1] ** 0.5
        torch.testing.assert_close(scores.softmax(-1) @ v[:, head], z[:, head], rtol=0, atol=1e-5)
    weight = attention.in_proj.weight.double().unflatten(0, (2, 3, -1))[1, 2]
    bias = attention.in_proj.bias.double().unflatten(0, (2, 3, -1))[1, 2]
    torch.testing.assert_close(v[:, 1], given[0][:, 0] @ weight.T + bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize("component", ["q", "v", "z", "attn_out", "mlp_out", "resid_mid", "resid_post"])
def test_what_is_put_into_qwens_tower_is_what_is_read_there(component: str) -> None:
    lvlm = model("qwen")
    inputs = lvlm.encode(example()).inputs
    place = lvlm.locate(f"vision.L0.{component}")
    before = lvlm.read(inputs, [f"vision.L0.{component}"])[f"vision.L0.{component}"]
    target = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    hook = place.edit(lambda x: target)
    try:
        after = lvlm.read(inputs, [f"vision.L0.{component}"])[f"vision.L0.{component}"]
        changed = lvlm.logits(inputs)
    finally:
        hook.remove()
    torch.testing.assert_close(after, target, rtol=0, atol=0)
    assert not torch.allclose(changed, lvlm.logits(inputs), rtol=0, atol=1e-4)
