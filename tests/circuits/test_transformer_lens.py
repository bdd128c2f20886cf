"""Head patching against TransformerLens on a copy of the model, and against nnsight."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from circuits import patch_heads
from lvlm import Lvlm
from lvlm.transformer_lens import as_transformer_lens
from tests.toys.families import model
from tests.toys.patching_oracle import pair_of

HEADS = ((0, 1), (1, 3), (2, 0))


def ours(lvlm: Lvlm) -> np.ndarray:
    """Log-odds after patching some heads at the last token."""
    scores = patch_heads(lvlm, [pair_of(0)], min_effect=0)
    assert scores.provenance["path"] == "shared prefix"
    gap = scores.clean[0] - scores.corrupt[0]
    return scores.corrupt[0] + gap * np.array([scores.effects[0, i, h] for i, h in HEADS])


def odds(lvlm: Lvlm, logits: torch.Tensor) -> float:
    pair = pair_of(0)
    right, wrong = (lvlm.processor.tokenizer.convert_tokens_to_ids(e.answer) for e in (pair.clean, pair.corrupt))
    return float(logits[0, -1, right] - logits[0, -1, wrong])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "mistral3"])
def test_equals_transformer_lens(family: str) -> None:
    lvlm, pair = model(family), pair_of(0)
    bridge = as_transformer_lens(lvlm)
    clean, corrupt = (dict(lvlm.encode(e).inputs) for e in (pair.clean, pair.corrupt))
    expected = []
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean.pop("input_ids"), **clean)
        ids = corrupt.pop("input_ids")
        for layer, head in HEADS:
            name = f"blocks.{layer}.attn.hook_z"

            def patch_head(z: torch.Tensor, hook: Any, head: int = head, name: str = name) -> torch.Tensor:
                del hook
                by_head, source = (x if x.dim() == 4 else x.unflatten(-1, (lvlm.n_heads, -1)) for x in (z, cache[name]))
                by_head = by_head.clone()
                by_head[:, -1, head] = source[:, -1, head]
                return by_head.reshape(z.shape)

            expected.append(odds(lvlm, bridge.run_with_hooks(ids, fwd_hooks=[(name, patch_head)], **corrupt)))
    np.testing.assert_allclose(ours(lvlm), expected, atol=1e-5)


def test_equals_nnsight_by_hand() -> None:
    from nnsight import NNsight

    lvlm, pair = model("llava"), pair_of(0)
    wrapped: Any = NNsight(copy.deepcopy(lvlm.hf))
    clean, corrupt = (lvlm.encode(e).inputs for e in (pair.clean, pair.corrupt))
    expected = []
    with torch.no_grad():
        for layer, head in HEADS:
            columns = slice(head * lvlm.head_dim, (head + 1) * lvlm.head_dim)
            with wrapped.trace(**clean):
                z = wrapped.model.language_model.layers[layer].self_attn.o_proj.input.clone().save()
            with wrapped.trace(**corrupt):
                wrapped.model.language_model.layers[layer].self_attn.o_proj.input[:, -1, columns] = z[:, -1, columns]
                logits = wrapped.output.logits.save()
            expected.append(odds(lvlm, logits))
    np.testing.assert_allclose(ours(lvlm), expected, atol=1e-5)
