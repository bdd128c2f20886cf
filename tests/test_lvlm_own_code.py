"""Families whose code is not part of transformers, on stand-ins with the same module trees; runs from release 4.40 on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import STAND_INS, build_stand_in
from toy_examples import example

from activation_store import trace
from concepts import ConceptDataset
from lvlm import wrap_lvlm
from lvlm.validation import validate


@pytest.mark.parametrize("family", list(STAND_INS))
def test_families_with_code_of_their_own_are_described(family: str, tmp_path: Path) -> None:
    lvlm = wrap_lvlm(*build_stand_in(family), name=family, validate=False)
    errors = validate(lvlm, lvlm.encode(example()))
    assert max(errors.values()) <= 1e-5
    layers = {
        "minigpt4": "llama_model.model.layers",
        "deepseek_vl_v2": "language.model.layers",
        "qwen": "transformer.h",
    }
    projection = {"qwen": "attn.c_proj"}.get(family, "self_attn.o_proj")
    data = ConceptDataset("d", (example(0), example(1)))
    store = trace(lvlm, data, ["z", "v"] if family != "deepseek_vl_v2" else ["z"], ["last"], tmp_path, answers=False)
    seen: list[torch.Tensor] = []
    hook = lvlm.hf.get_submodule(f"{layers[family]}.1.{projection}").register_forward_pre_hook(
        lambda _m, a: seen.append(a[0])
    )
    batch = next(lvlm.batches(data.examples, 8))
    lvlm.logits(batch.inputs)
    hook.remove()
    np.testing.assert_array_equal(store.read("decoder.L1.z", "last"), seen[0][:, -1].numpy())
