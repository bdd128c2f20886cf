"""The provenance of a store."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from activation_store import ActivationStore, trace
from concepts import scenes
from groundscope.core.errors import StoreError
from lvlm import load_lvlm


def test_a_store_names_its_processor_and_refuses_another(tmp_path: Path) -> None:
    data = scenes.dataset(10, 0).filter(lambda e: bool(e.candidates))[:6]
    first = trace(load_lvlm("tiny"), data, ["resid_post"], ["last"], tmp_path / "a", progress=False)
    processor = first.provenance["processor"]
    assert processor["class"] == "LlavaProcessor"
    second = trace(load_lvlm("tiny"), data, ["resid_post"], ["last"], tmp_path / "b", progress=False)
    assert second.provenance["processor"] == processor
    other = load_lvlm("tiny")
    other.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(StoreError, match=r"field 'provenance.processor.digest' differs"):
        trace(other, data, ["resid_post"], ["last"], tmp_path / "a", progress=False)
    assert len(ActivationStore(tmp_path / "a")) == len(data)


def test_provenance_records_everything_that_values_depend_on(tmp_path: Path) -> None:
    model = load_lvlm("tiny")
    data = scenes.dataset(10, 0).filter(lambda e: bool(e.candidates))[:6]
    provenance = trace(model, data, ["resid_post"], ["last", "image:mean"], tmp_path / "a", progress=False).provenance
    assert provenance["model"]["name"] == "tiny"
    assert (provenance["model"]["config"], provenance["model"]["weights"]) == (model.config_hash, model.weights_hash)
    assert provenance["model"]["family"]["model_type"] == "llava"
    assert provenance["model"]["family"]["decoder"]["layers"] == model.spec.decoder.layers
    assert provenance["model"]["dtype"] == "float32"
    assert (provenance["dataset"]["digest"], provenance["dataset"]["examples"]) == (data.digest, 6)
    assert provenance["dataset"]["provenance"]["seed"] == data.provenance["seed"]
    assert set(provenance["tokens"]) == {"last", "image:mean"}
    assert "last prompt token" in provenance["tokens"]["last"]["definition"]
    packages = provenance["environment"]["packages"]
    assert {name: packages[name] for name in ("torch", "h5py", "transformers")} == {
        name: version(name) for name in ("torch", "h5py", "transformers")
    }
