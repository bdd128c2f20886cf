"""The unembedding next to a store: in the type of the weights, float32 when read, and only if it is requested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import trace, verify
from activation_store.format.model_tensors import write_tensors
from groundscope.core.errors import ProbeError, StoreError
from lvlm import Lvlm, wrap_lvlm
from lvlm.tiny.architecture import build_model, build_processor
from probes.analysis.logit_lens import Unembedding
from tests.toys.tracing import of_one_length


def model(dtype: torch.dtype) -> Lvlm:
    return wrap_lvlm(build_model().to(dtype), build_processor(), name="random")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits_are_stored_in_16_bits_and_read_without_a_change(dtype: torch.dtype, tmp_path: Path) -> None:
    lvlm, data = model(dtype), of_one_length(2)
    store = trace(lvlm, data, ["decoder.L1.z"], ["last"], tmp_path / "a", answers=False)
    weights = lvlm.hf.lm_head.weight.detach()
    matrix = store.tensor("unembedding.weight")
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, weights.float().numpy())
    size = (tmp_path / "a" / "tensors.h5").stat().st_size
    assert 2 * weights.numel() < size < 3 * weights.numel() + 8192
    assert verify(tmp_path / "a").ok
    # A store of an earlier version has the same values as float32: it is continued, and other values are refused.
    for path, values in (("b", matrix), ("c", matrix + 1)):
        (tmp_path / path).mkdir()
        norm = store.tensor("final_norm.weight")
        write_tensors(tmp_path / path, {"unembedding.weight": values, "final_norm.weight": norm})
    trace(lvlm, data, ["decoder.L1.z"], ["last"], tmp_path / "b", answers=False)
    with pytest.raises(StoreError, match=r"field 'extra\.unembedding\.weight' differs"):
        trace(lvlm, data, ["decoder.L1.z"], ["last"], tmp_path / "c", answers=False)


def test_a_store_without_it_says_how_to_store_it(tmp_path: Path) -> None:
    store = trace(model(torch.float32), of_one_length(2), ["decoder.L1.z"], ["last"], tmp_path / "a", unembedding=False)
    assert store.tensors == ()
    with pytest.raises(ProbeError, match=r"with unembedding=True, in a run trace.unembedding=true"):
        Unembedding.of(store)
