"""Where a store says it came from."""

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
    made = trace(load_lvlm("tiny"), data, ["resid_post"], ["last"], tmp_path / "a", progress=False)
    said = made.provenance["processor"]
    assert said["class"] == "LlavaProcessor"
    again = trace(load_lvlm("tiny"), data, ["resid_post"], ["last"], tmp_path / "b", progress=False)
    assert again.provenance["processor"] == said
    other = load_lvlm("tiny")
    other.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(StoreError, match=r"field 'provenance.processor.digest' differs"):
        trace(other, data, ["resid_post"], ["last"], tmp_path / "a", progress=False)
    assert len(ActivationStore(tmp_path / "a")) == len(data)


def test_a_store_says_all_that_it_depends_on(tmp_path: Path) -> None:
    model = load_lvlm("tiny")
    data = scenes.dataset(10, 0).filter(lambda e: bool(e.candidates))[:6]
    said = trace(model, data, ["resid_post"], ["last", "image:mean"], tmp_path / "a", progress=False).provenance
    assert said["model"]["name"] == "tiny"
    assert (said["model"]["config"], said["model"]["weights"]) == (model.config_hash, model.weights_hash)
    assert said["model"]["family"]["model_type"] == "llava"
    assert said["model"]["family"]["decoder"]["layers"] == model.spec.decoder.layers
    assert said["model"]["dtype"] == "float32"
    assert (said["dataset"]["digest"], said["dataset"]["examples"]) == (data.digest, 6)
    assert said["dataset"]["provenance"]["seed"] == data.provenance["seed"]
    assert set(said["tokens"]) == {"last", "image:mean"}
    assert "last prompt token" in said["tokens"]["last"]["definition"]
    packages = said["environment"]["packages"]
    assert {name: packages[name] for name in ("torch", "h5py", "transformers")} == {
        name: version(name) for name in ("torch", "h5py", "transformers")
    }
