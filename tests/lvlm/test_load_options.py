"""Options of loading: number type, placement, attention, quantization, sizes of images; and one-off questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from groundscope.core.errors import DataError, GroundscopeError, ModelError
from lvlm import Lvlm, load_lvlm
from lvlm.encoding.encode import Batch
from lvlm.generation import greedy
from lvlm.load_options import checkpoint_dtype
from lvlm.loading import outline_lvlm
from tests.toys.examples import example
from tests.toys.families import build


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two families; the weights of LLaVA are stored in bfloat16."""
    root, paths = tmp_path_factory.mktemp("models"), {}
    for family in ("llava", "qwen2_vl"):
        network, processor = build(family)
        paths[family] = root / family
        network.save_pretrained(paths[family])
        processor.save_pretrained(paths[family])
        config = json.loads((paths[family] / "config.json").read_text())
        if family == "llava":
            from safetensors.torch import load_file, save_file

            file = paths[family] / "model.safetensors"
            save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
            for part in (config, config["text_config"], config["vision_config"]):
                part["dtype"] = "bfloat16"
        (paths[family] / "config.json").write_text(json.dumps(config))
    return paths


def test_the_default_dtype_is_that_of_the_checkpoint(folders: dict[str, Path]) -> None:
    stored = load_lvlm(folders["llava"], validate=False)
    assert stored.dtype == torch.bfloat16
    assert {p.dtype for p in stored.hf.parameters()} == {torch.bfloat16}
    assert outline_lvlm(folders["llava"]).dtype == torch.bfloat16
    assert load_lvlm(folders["qwen2_vl"], validate=False).dtype == torch.float32
    assert load_lvlm(folders["llava"], dtype=torch.float32, validate=False).dtype == torch.float32


@pytest.mark.parametrize("key", ["torch_dtype", "", "text_config"])
def test_the_dtype_is_read_from_either_key_or_from_the_weights(
    folders: dict[str, Path], tmp_path: Path, key: str
) -> None:
    config = json.loads((folders["llava"] / "config.json").read_text())
    inner = config["text_config"]
    for part in (config, inner, config["vision_config"]):
        part.pop("dtype", None)
    if key:
        (inner if key == "text_config" else config)["dtype" if key == "text_config" else key] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folders["llava"] / "model.safetensors")
    assert checkpoint_dtype(tmp_path) == "bfloat16"
    (tmp_path / "model.safetensors").unlink()
    assert checkpoint_dtype(tmp_path) == ("bfloat16" if key else "auto")


def test_the_embedded_models_compute_in_float32_whatever_they_are_stored_in() -> None:
    assert load_lvlm("tiny", validate=False).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, r"unknown dtype 'bf16'; choose from auto, float32.*did you mean"),
        ({"device_map": "cuda:9"}, "device 'cuda:9' is not available"),
        ({"device_map": {"": "tpu"}}, "device 'tpu' is not available"),
        ({"max_memory": {"cpu": "1GiB"}}, "add device_map='auto'"),
        ({"attn_implementation": "spda"}, "unknown attn_implementation 'spda'; choose from eager, .*did you mean sdpa"),
        ({"quantization_config": "4bits"}, "unknown quantization_config '4bits'; choose from 8bit, 4bit"),
        ({"quantization_config": {"quant_method": "nope"}}, "quantization_config=.*nope"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*quant_method"),
        ({"quantization_config": 4}, "quantization_config is a int"),
        ({"min_pixels": 100}, "does not scale images by their number of pixels"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        load_lvlm("tiny", **options)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvlm.load_options.find_spec", lambda _: None)
    with pytest.raises(ModelError, match="needs the package bitsandbytes"):
        load_lvlm("tiny", quantization_config="4bit")
    with pytest.raises(ModelError, match="needs the package accelerate"):
        load_lvlm("tiny", device_map="auto")


def test_a_device_and_a_map_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lvlm.load_checks.devices", lambda: ("cpu", "cuda", "cuda:0"))
    with pytest.raises(ModelError, match="both place the model"):
        load_lvlm("tiny", device="cuda", device_map="auto")


def test_a_map_and_an_attention_implementation_reach_transformers(folders: dict[str, Path]) -> None:
    plain = load_lvlm(folders["llava"], validate=False)
    inputs = plain.collate([plain.encode(example())])
    mapped = load_lvlm(
        folders["llava"],
        device_map={"": "cpu"},
        max_memory={"cpu": "1GiB"},
        attn_implementation="eager",
        cache_dir="unused",
        validate=False,
    )
    assert (plain.attention, mapped.attention) == ("sdpa", "eager")
    torch.testing.assert_close(mapped.logits(inputs), plain.logits(inputs), rtol=0, atol=0.05)


def test_pixel_limits_decide_the_number_of_image_tokens(folders: dict[str, Path]) -> None:
    """28 x 28 pixels become one token of Qwen2-VL."""
    image = Image.new("RGB", (560, 280))
    for load in (load_lvlm, outline_lvlm):
        for tokens in (4, 16):
            limits = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * tokens}
            model = load(folders["qwen2_vl"], **limits)
            _, where = model.encode_prompt(model.prompt("Is it?"), [image])
            count = len(where.views["decoder"][0].positions)
            assert tokens / 3 < count <= tokens, (tokens, count)
    with pytest.raises(ModelError, match="min_pixels=9000 and max_pixels=10"):
        load_lvlm(folders["qwen2_vl"], min_pixels=9000, max_pixels=10)


@pytest.fixture(scope="module")
def tiny() -> Lvlm:
    return load_lvlm("tiny")


def test_an_answer_is_that_of_the_same_question_in_a_dataset(tiny: Lvlm, tmp_path: Path) -> None:
    """From every form of the image."""
    question = example()
    (batch,) = tiny.batches([question], 1)
    assert isinstance(batch, Batch)
    expected = tiny.processor.tokenizer.decode(greedy(tiny, batch.inputs, 40)[0], skip_special_tokens=True).strip()
    image = question.image.load()
    image.save(tmp_path / "a.png")
    transparent = np.dstack([np.asarray(image), np.full(image.size[::-1], 255, np.uint8)])
    for form in (
        image,
        np.asarray(image),
        transparent,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        question.image,
        [image],
    ):
        assert tiny.ask(form, question.question) == expected
    assert tiny.generate([image], tiny.prompt(question.question)) == expected
    assert tiny.generate_batch(batch) == [expected]
    gray = image.convert("L")
    assert tiny.ask(gray, question.question) == tiny.ask(np.asarray(gray), question.question)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3)), "values of type float64"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \[0, 4, 3\]"),
        ("nowhere.png", "does not exist"),
        (None, "of type NoneType"),
    ],
)
def test_other_images_are_one_sentence(tiny: Lvlm, image: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tiny.ask(image, "Is there an apple?")


def test_prompts_without_a_placeholder_and_empty_answers_are_refused(tiny: Lvlm) -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    with pytest.raises(DataError, match=r"0 image placeholders .* but 1 image"):
        tiny.generate(image, "Is there an apple?")
    with pytest.raises(GroundscopeError, match="max_new_tokens=0"):
        tiny.ask(image, "Is there an apple?", max_new_tokens=0)
