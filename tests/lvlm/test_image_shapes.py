"""Images of different shapes in one prompt, and images of extreme shape: encoded as transformers does, or refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from groundscope.core.errors import DataError
from lvlm import Lvlm
from tests.toys.families import FAMILY, model

QUESTION = "Is there a cat?"


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def embedded(lvlm: Lvlm, pictures: list[Image.Image]) -> tuple[torch.Tensor, Any, Any]:
    """What the first decoder layer is given, the token map and the inputs of a prompt."""
    inputs, tokens = lvlm.encode_prompt(lvlm.prompt(QUESTION, len(pictures)), pictures, question=QUESTION)
    return lvlm.read(inputs, ["decoder.L0.resid_pre"])["decoder.L0.resid_pre"][0], tokens, inputs


@pytest.mark.parametrize(
    "family", ["llava_next", "llava_onevision", "mistral3", "qwen2_vl", "idefics3", "internvl", "llama4"]
)
def test_tokens_of_each_image_equal_those_of_the_image_alone(family: str) -> None:
    """Whatever fills the smaller picture up changes nothing: image by image, the tokens are those of a prompt with one."""
    lvlm = model(family)
    pictures = [noise((60, 60), 1), noise((200, 60), 2)]
    both, tokens, _ = embedded(lvlm, pictures)
    views = tokens.views["decoder"]
    for number, picture in enumerate(pictures):
        alone, single, _ = embedded(lvlm, [picture])
        mine = [p for view in views if view.image == number for p in view.positions]
        assert len(mine) == len(single.image) > 0
        torch.testing.assert_close(both[mine], alone[list(single.image)], atol=1e-5, rtol=1e-5)


def test_padded_as_the_image_processors_pad() -> None:
    pictures = [noise((60, 60), 1), noise((200, 60), 2)]
    for family in ("llava_next", "llava_onevision"):
        lvlm = model(family)
        want = lvlm.processor.image_processor(images=pictures, return_tensors="pt")
        _, _, inputs = embedded(lvlm, pictures)
        torch.testing.assert_close(inputs["pixel_values"], want["pixel_values"])
        np.testing.assert_array_equal(inputs["image_sizes"], np.asarray(want["image_sizes"]))
    lvlm = model("mistral3")
    side = {"height": 28, "width": 28}
    want = lvlm.processor.image_processor(images=pictures, return_tensors="pt", patch_size=side)
    _, _, inputs = embedded(lvlm, pictures)
    torch.testing.assert_close(inputs["pixel_values"], want["pixel_values"])


def test_a_family_without_padding_names_both_sizes() -> None:
    lvlm = model("llava")
    look = lvlm.image_encoding.encode

    def uneven(of: Lvlm, image: Image.Image) -> Any:
        encoding = look(of, image)
        return dataclasses.replace(
            encoding, inputs={"pixel_values": encoding.inputs["pixel_values"][..., : image.size[0] // 2]}
        )

    lvlm.image_encoding = dataclasses.replace(lvlm.image_encoding, encode=uneven)
    try:
        with pytest.raises(DataError, match="images of 60 x 60 and 100 x 60 pixels cannot share a prompt of llava"):
            lvlm.encode_prompt(lvlm.prompt(QUESTION, 2), [noise((60, 60)), noise((100, 60))], question=QUESTION)
    finally:
        lvlm.image_encoding = dataclasses.replace(lvlm.image_encoding, encode=look)


@FAMILY
@pytest.mark.parametrize("size", [(2000, 8), (1, 900), (400, 10), (1, 1)])
def test_images_of_extreme_shape(family: str, size: tuple[int, int]) -> None:
    lvlm = model(family)
    try:
        inputs, tokens = lvlm.encode_prompt(lvlm.prompt(QUESTION), [noise(size)], question=QUESTION)
    except DataError as error:
        refused = str(error)
    else:
        refused = ""
        assert torch.isfinite(lvlm.logits(inputs)).any()
        assert tokens.image or family in {"mllama", "instructblip_t5", "florence2"}
    assert not refused or (f"{size[0]} x {size[1]} pixels" in refused and family[:4] in ("qwen", "glm4", "mist"))
