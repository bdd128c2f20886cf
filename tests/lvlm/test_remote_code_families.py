"""Families whose code is not part of transformers, on small models with the same module trees; runs with releases >= 4.40."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activation_store import trace
from concepts import ConceptDataset
from groundscope.core.errors import ModelError
from lvlm import FamilySpec, Lvlm, load_lvlm, wrap_lvlm
from lvlm.encoding.processor import Parts
from lvlm.identity_checks import validate
from tests.toys.examples import example
from tests.toys.model_parts import ID, fixed, tokenizer
from tests.toys.remote_code_families import STAND_INS, build_stand_in

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
def test_traced_values_equal_raw_hooks(family: str, tmp_path: Path) -> None:
    lvlm, data = model(family), ConceptDataset("d", (example(0), example(1)))
    sites = ["resid_post", "z", "vision.resid_post", "vision.z", "projector.out"]
    store = trace(lvlm, data, sites, ["last", "image:all"], tmp_path, answers=False)
    record: dict[str, torch.Tensor] = {}

    def keep(name: str, x: object) -> None:
        value = x[0] if isinstance(x, tuple) else x
        assert isinstance(value, torch.Tensor)
        # Qwen-VL's tower has tokens first and examples second.
        record[name] = value.transpose(0, 1) if family == "qwen" and name.startswith("vision") else value

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
        np.testing.assert_array_equal(store.read(site, "last"), record[site][:, -1].numpy(), err_msg=site)
    prefix = 1 if family == "minigpt4" else 0  # a class token
    for site in ("vision.L1.resid_post", "vision.L1.z", "projector.out"):
        first = prefix if site.startswith("vision") else 0
        for row, values in enumerate(store.ragged(site, "image:all")):
            np.testing.assert_array_equal(values, record[site][row, first:].numpy(), err_msg=site)


@FAMILY
def test_an_example_in_a_batch_equals_the_example_alone(family: str) -> None:
    lvlm = model(family)
    encodings = [lvlm.encode(example(0)), lvlm.encode(example(1)), lvlm.encode(example(2))]
    encodings = [e for e in encodings if e.shape == encodings[0].shape]
    assert len(encodings) > 1
    sites = ["decoder.L2.resid_post", "vision.L1.resid_post", "vision.L1.z", "projector.out"]
    batched = lvlm.read(lvlm.collate(encodings), sites)
    for row, encoding in enumerate(encodings):
        alone = lvlm.read(lvlm.collate([encoding]), sites)
        for site in sites:
            torch.testing.assert_close(batched[site][row], alone[site][0], rtol=0, atol=1e-5, msg=site)


def test_fused_queries_of_qwens_tower_are_split_by_head() -> None:
    lvlm = model("qwen")
    inputs = lvlm.encode(example()).inputs
    attention = lvlm.hf.transformer.visual.transformer.resblocks[0].attn
    inputs_: list[torch.Tensor] = []
    hook = attention.in_proj.register_forward_pre_hook(lambda _m, args: inputs_.append(args[0].double()))
    sites = [f"vision.L0.{c}" for c in ("q", "k", "v", "z")]
    values = lvlm.read(inputs, sites)
    hook.remove()
    # What the attention computes from them, head by head in float64, is what its output projection is given.
    q, k, v, z = (values[site][0].double().unflatten(-1, (2, -1)) for site in sites)  # [T, H, head_dim]
    for head in range(2):
        scores = q[:, head] @ k[:, head].T / q.shape[-1] ** 0.5
        torch.testing.assert_close(scores.softmax(-1) @ v[:, head], z[:, head], rtol=0, atol=1e-5)
    weight = attention.in_proj.weight.double().unflatten(0, (2, 3, -1))[1, 2]
    bias = attention.in_proj.bias.double().unflatten(0, (2, 3, -1))[1, 2]
    torch.testing.assert_close(v[:, 1], inputs_[0][:, 0] @ weight.T + bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize("component", ["q", "v", "z", "attn_out", "mlp_out", "resid_mid", "resid_post"])
def test_values_written_into_qwens_tower_are_read_back(component: str) -> None:
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


OWN_CODE = """
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class MineConfig(PretrainedConfig):
    model_type = "mine"
    vision_config = SimpleNamespace(num_attention_heads=2, patch_size=14)

    def __init__(self, image_token_id=4, **more):
        self.num_attention_heads = 4
        self.image_token_id = image_token_id
        super().__init__(**{"tie_word_embeddings": False, **more})


class Attention(nn.Module):
    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width, heads, causal):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.mlp = Attention(width, heads, causal), nn.Linear(width, width)

    def forward(self, x):
        x = x + self.self_attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Mine(PreTrainedModel):
    config_class = MineConfig
    all_tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.patches = nn.Conv2d(3, 24, 14, 14)
        self.vision_layers = nn.ModuleList(Layer(24, 2, False) for _ in range(2))
        self.projector = nn.Linear(24, 32)
        self.embed = nn.Embedding(256, 32)
        self.layers = nn.ModuleList(Layer(32, 4, True) for _ in range(2))
        self.norm, self.lm_head = nn.LayerNorm(32), nn.Linear(32, 256, bias=False)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, pixel_values=None, use_cache=False):
        seen = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.vision_layers:
            seen = layer(seen)
        x = self.embed(input_ids)
        x = x.masked_scatter((input_ids == self.config.image_token_id)[..., None], self.projector(seen))
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.lm_head(self.norm(x)))
"""


def test_a_folder_with_code_of_its_own_loads_where_that_is_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "modeling_mine.py").write_text(OWN_CODE)
    named = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}
    scope: dict[str, Any] = {"__name__": "own"}
    exec(compile(OWN_CODE, "own", "exec"), scope)  # noqa: S102 - the text of the file in the folder
    torch.manual_seed(0)
    network = scope["Mine"](scope["MineConfig"](image_token_id=ID["<image>"]))
    network.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "auto_map": named}))
    Parts(tokenizer(), fixed(), "<image>").save_pretrained(folder)
    spec = FamilySpec("mine", template="{image}{question}", placeholder="<image>")
    with pytest.raises(
        ModelError, match=r"cannot be loaded: .*it runs with trust_remote_code=True: read its code first"
    ):
        load_lvlm(folder, spec=spec)
    loaded = load_lvlm(folder, spec=spec, trust_remote_code=True)
    assert loaded.spec.vision.layers == "vision_layers"
    assert type(loaded.hf).__name__ == "Mine"
    inputs = loaded.encode(example()).inputs
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(inputs), network.eval()(**inputs).logits[:, -1], rtol=0, atol=1e-6)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer(), name)

    lvlm = wrap_lvlm(build_stand_in("qwen")[0], Parts(Slow(), fixed(), "<image>"), name="mine", validate=False)
    with pytest.raises(ModelError, match="Slow of mine does not return the character offsets of tokens; use a fast"):
        lvlm.encode(example())
