"""Folders of models with one file of another content: the error names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from groundscope.core.errors import ModelError
from lvlm import load_lvlm
from lvlm.embedded_models import folder_of
from lvlm.loading import outline_lvlm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of("tiny"), tmp_path / "model"))


@pytest.mark.parametrize("content", ["null", "[]", '"x"', "", "[" * 3000])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json"]
)
def test_a_file_of_settings_that_is_no_object_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    loads = [outline_lvlm] if name != "generation_config.json" else []
    for load in [*loads, load_lvlm] if name == "config.json" else loads or [load_lvlm]:
        try:
            load(str(folder))
        except ModelError as error:
            assert name in str(error)  # noqa: PT017
        else:
            assert (name, content) == ("generation_config.json", "")  # transformers takes it for no file


def test_a_weight_of_another_shape_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"another shape.*layers\.1\.mlp\.down_proj\.weight"):
        load_lvlm(str(folder))
