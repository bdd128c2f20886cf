"""Models that accelerate offloads: parts in main memory or on disk give the values of the whole model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from activation_store import ActivationStore, trace
from concepts import ConceptDataset
from groundscope.core.errors import ModelError
from lvlm import Lvlm, load_lvlm, wrap_lvlm
from tests.toys.examples import example
from tests.toys.families import model

FAMILIES = ["llava", "qwen2_5_vl", "gemma3"]
SITES = ["z", "resid_post", "mlp_out", "vision.z", "projector.out"]


def traced(lvlm: Lvlm, out: Path) -> ActivationStore:
    data = ConceptDataset("d", (example(0), example(1)))
    return trace(lvlm, data, SITES, ["last", "image:mean"], out, generate=2, progress=False)


def assert_same(first: ActivationStore, second: ActivationStore) -> None:
    assert [a.key for a in first.arrays] == [a.key for a in second.arrays]
    for array in first.arrays:
        for n in array.layers:
            site = "projector.out" if array.stack == "projector" else f"{array.stack}.L{n}.{array.component}"
            np.testing.assert_array_equal(first.read(site, array.tokens), second.read(site, array.tokens), err_msg=site)
    for name in ("margin", "model_answer", "generated"):
        np.testing.assert_array_equal(first.columns[name], second.columns[name])
    for name in first.tensors:
        np.testing.assert_array_equal(first.tensor(name), second.tensor(name))


def dispatch_parts(module: Any, disk: str, name: str = "") -> dict[str, str]:
    """Put every second layer of a list on disk; all else stays in memory."""
    if name == disk:
        return {f"{name}.{n}": "disk" if n % 2 else "cpu" for n in range(len(module))}
    if name and not disk.startswith(f"{name}."):
        return {name: "cpu"}
    parts = [
        dispatch_parts(child, disk, f"{name}.{child_name}".lstrip(".")) for child_name, child in module.named_children()
    ]
    return {path: place for part in parts for path, place in part.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_layers_on_disk_is_read_as_if_it_were_in_memory(family: str, tmp_path: Path) -> None:
    lvlm = model(family)
    lvlm.hf.save_pretrained(tmp_path / "model")
    places = dispatch_parts(lvlm.hf, "model.language_model.layers")
    network: Any = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "off"
    )
    away = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    assert away
    assert all(".layers.1." in name for name in away)
    spread = wrap_lvlm(network, lvlm.processor, name=family)
    assert spread.weights_hash == lvlm.weights_hash
    assert_same(traced(spread, tmp_path / "spread"), traced(lvlm, tmp_path / "whole"))
    assert {name for name, parameter in network.named_parameters() if parameter.is_meta} == set(away)


def test_a_model_that_is_away_as_a_whole_is_read_too(tmp_path: Path) -> None:
    lvlm = model("llava")
    network = copy.deepcopy(lvlm.hf)
    accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in network.parameters())
    spread = wrap_lvlm(network, lvlm.processor, name="llava")
    assert spread.device == torch.device("cpu")
    assert_same(traced(spread, tmp_path / "spread"), traced(lvlm, tmp_path / "whole"))


def test_auto_puts_it_where_there_is_room(tmp_path: Path) -> None:
    lvlm = model("llava")
    lvlm.hf.save_pretrained(tmp_path)
    lvlm.processor.save_pretrained(tmp_path)
    inputs = lvlm.encode(example()).inputs
    assert torch.equal(load_lvlm(tmp_path, device="auto").logits(inputs), lvlm.logits(inputs))


def test_a_model_that_was_made_without_weights_is_still_refused() -> None:
    lvlm = model("llava")
    with torch.device("meta"):
        network = type(lvlm.hf)(lvlm.hf.config)
    with pytest.raises(ModelError, match="on the 'meta' device: it has no weights"):
        wrap_lvlm(network, lvlm.processor)
