"""TransformerLens: a bridge has the same tensors under its names, and its tools work on a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import trace
from activation_store.transformer_lens import activation_cache
from concepts import ConceptDataset
from groundscope.core.errors import ModelError, SiteError
from lvlm.transformer_lens import as_transformer_lens
from tests.toys.examples import example
from tests.toys.families import LENS, model

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
}


@pytest.mark.parametrize("family", LENS)
def test_a_bridge_sees_the_same_tensors(family: str) -> None:
    lvlm = model(family)
    before = {name: p.clone() for name, p in lvlm.hf.named_parameters()}
    bridge = as_transformer_lens(lvlm)
    inputs = dict(lvlm.encode(example()).inputs)
    sites = [f"decoder.L{n}.{c}" for n in range(lvlm.n_layers) for c in HOOKS]
    with lvlm.eager():
        values, logits = lvlm.read(inputs, sites), lvlm.logits(inputs)
    with torch.no_grad():
        theirs, cache = bridge.run_with_cache(inputs.pop("input_ids"), **inputs)
    torch.testing.assert_close(theirs[:, -1], logits, rtol=0, atol=1e-5)
    for n in range(lvlm.n_layers):
        for component, hook in HOOKS.items():
            expected = cache[f"blocks.{n}.{hook}"]
            torch.testing.assert_close(
                values[f"decoder.L{n}.{component}"],
                expected.flatten(2) if expected.dim() == 4 else expected,
                rtol=0,
                atol=1e-5,
            )
    assert {name: id(p) for name, p in lvlm.hf.named_parameters()}.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in lvlm.hf.named_parameters())


def test_a_family_without_adapter_is_named() -> None:
    with pytest.raises(
        ModelError, match=r"no adapter for MllamaForConditionalGeneration.*LlavaForConditionalGeneration"
    ):
        as_transformer_lens(model("mllama"))


def test_its_tools_work_on_a_store(tmp_path: Path) -> None:
    lvlm = model("llava")
    data = ConceptDataset("d", (example(0), example(1), example(2)))
    sites = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"]
    store = trace(lvlm, data, sites, ["last"], tmp_path, answers=False)
    bridge = as_transformer_lens(lvlm)
    cache = activation_cache(store, bridge)
    # Residual decomposition: the parts add up to the last residual, the norm's scale is the model's own.
    parts, labels = cache.decompose_resid(apply_ln=False, return_labels=True)
    assert labels == ["embed", *(f"{n}_{part}" for n in range(lvlm.n_layers) for part in ("attn_out", "mlp_out"))]
    last = torch.from_numpy(store.read(f"decoder.L{lvlm.n_layers - 1}.resid_post", "last"))
    torch.testing.assert_close(parts.sum(0)[:, 0], last, rtol=0, atol=1e-5)
    # Heads: their results add up to what attention gives.
    heads = cache.stack_head_results(layer=lvlm.n_layers)
    attention = sum(store.read(f"decoder.L{n}.attn_out", "last").astype(np.float64) for n in range(lvlm.n_layers))
    np.testing.assert_allclose(heads.sum(0)[:, 0].detach().numpy(), attention, atol=1e-5)
    # Logit attribution: what the parts add to a token's logit adds up to that logit.
    word = 40
    normed = cache.apply_ln_to_stack(parts, layer=-1)
    weight = lvlm.hf.model.language_model.norm.weight.detach() * lvlm.hf.lm_head.weight.detach()[word]
    for row, question in enumerate(data):
        logit = lvlm.logits(lvlm.encode(question).inputs)[0, word]
        torch.testing.assert_close((normed[:, row, 0] @ weight).sum(), logit, rtol=0, atol=1e-4)
    # SVD of an OV circuit needs the weights alone.
    attn = bridge.blocks[1].attn
    values = torch.linalg.svdvals((attn.W_V[0] @ attn.W_O[0]).detach())
    assert values.shape == (lvlm.width,)
    assert float(values[lvlm.head_dim :].max()) < 1e-5 * float(values[0])
    with pytest.raises(SiteError, match=r"no decoder site at 'image:mean'.*z at last"):
        activation_cache(store, bridge, "image:mean")
