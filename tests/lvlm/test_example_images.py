"""Examples without an image, and with several: encoded as the prompt is, run as transformers runs it, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from activation_store import trace
from concepts import BytesImage, ConceptDataset, Example, NoImage
from concepts.annotated_object import AnnotatedObject, Box
from concepts.image_source import ImageSource
from groundscope.core.errors import DataError, ModelError
from lvlm import Lvlm
from lvlm.encoding.encode import runs_without_image
from lvlm.encoding.registry import image_encodings
from tests.toys.families import BUILDERS, model

REFUSE_NO_IMAGE = {"blip2", "instructblip", "kosmos2", "florence2"}
"""Families whose forward pass needs an image, from their signatures in transformers."""


class Noise:
    """A user's own class of images."""

    def __init__(self, seed: int, size: tuple[int, int] = (60, 60)) -> None:
        self.identity = f"noise {seed} {size}"
        self._values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)

    def load(self) -> Image.Image:
        return Image.fromarray(self._values)


def example(name: str, *images: ImageSource) -> Example:
    first, *further = images or (NoImage(),)
    box = AnnotatedObject("o", "cat", Box(0, 0, 30, 30)) if images else None
    return Example(
        name, first, "Is there a cat?", "yes", ("yes", "no"), "object", "existence", "neutral", name,
        objects=(box,) if box else (), subject="o" if box else None, further_images=tuple(further),
    )  # fmt: skip


@pytest.mark.parametrize("family", [f for f in BUILDERS if f != "kosmos2"])
def test_two_images_are_the_prompt_with_two_images(family: str) -> None:
    lvlm = model(family)
    both = [Noise(0), Noise(1)]
    encoding = lvlm.encode(example("e", *both))
    inputs, tokens = lvlm.encode_prompt(
        lvlm.prompt("Is there a cat?", 2), [n.load() for n in both], question="Is there a cat?",
        boxes={"o": (0, Box(0, 0, 30, 30))}, subject="o",
    )  # fmt: skip
    assert encoding.tokens == tokens
    assert encoding.inputs.keys() == inputs.keys()
    for name, value in inputs.items():
        torch.testing.assert_close(encoding.inputs[name], value, rtol=0, atol=0)
    assert {v.image for v in tokens.views["vision"]} == {0, 1} if lvlm.n_vision_layers else True


@pytest.mark.parametrize("family", list(BUILDERS))
def test_no_image_runs_as_text_or_is_refused_by_name(family: str) -> None:
    lvlm = model(family)
    if not runs_without_image(lvlm):
        with pytest.raises(
            DataError, match=r"example 'e' has no image, and .* does not run without one; leave such examples out"
        ):
            lvlm.encode(example("e"))
        return
    encoding = lvlm.encode(example("e"))
    ids = lvlm.processor.tokenizer(
        lvlm.prompt("Is there a cat?", 0), return_tensors="pt", add_special_tokens=bool(lvlm.spec.special_tokens)
    )["input_ids"]
    if not lvlm.prompt("Is there a cat?", 0).startswith(lvlm.processor.tokenizer.bos_token or "\0"):
        assert torch.equal(encoding.inputs["input_ids"], ids)
    assert lvlm.content_id not in encoding.inputs["input_ids"]
    with torch.no_grad():
        raw = lvlm.hf(**encoding.inputs, use_cache=False).logits[:, -1]
    torch.testing.assert_close(lvlm.logits(lvlm.collate([encoding])), raw, atol=1e-5, rtol=1e-5)


def test_the_refusing_families_are_those_that_need_pixels() -> None:
    refuse = {f for f in BUILDERS if not runs_without_image(model(f))}
    assert {f for f in BUILDERS if f.split("_")[0] in REFUSE_NO_IMAGE or f in REFUSE_NO_IMAGE} <= refuse


def test_kosmos_takes_one_image() -> None:
    with pytest.raises(ModelError, match="takes one image per prompt, not 2"):
        model("kosmos2").encode(example("e", Noise(0), Noise(1)))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "llava_next"])
def test_a_store_of_questions_without_one_and_with_several_images(family: str, tmp_path: Path) -> None:
    """Each row equals the row of the example traced alone; without an image, image tokens are empty and not zero."""
    lvlm = model(family)
    data = [
        example("none"),
        example("one", Noise(0)),
        example("two", Noise(0), Noise(1)),
        example("other", Noise(2), Noise(0)),
    ]
    sites, tokens = ["resid_post", "vision.resid_post", "projector.out"], ["last", "image:mean"]
    store = trace(lvlm, ConceptDataset("d", tuple(data)), sites, tokens, tmp_path / "all", answers=False)
    places = [("decoder.L1.resid_post", "last"), ("decoder.L1.resid_post", "image:mean"), ("projector.out", "image:mean"),
              ("vision.L0.resid_post", "image:mean")]  # fmt: skip
    rows = {place: store.read(*place) for place in places}
    assert np.isfinite(rows["decoder.L1.resid_post", "last"]).all()
    for place in places[1:]:
        assert np.isnan(rows[place][0]).all()
        assert np.isfinite(rows[place][1:]).all()
        assert not np.allclose(rows[place][1], rows[place][2])  # the second image counts
    for i, e in enumerate(data[1:], 1):
        alone = trace(lvlm, ConceptDataset("d", (e,)), sites, tokens, tmp_path / e.id, answers=False)
        for place in places:
            np.testing.assert_allclose(alone.read(*place)[0], rows[place][i], atol=1e-5)
    digests = store.frame()["image"].tolist()
    assert [len(d.split(",")) if d else 0 for d in digests] == [0, 1, 2, 2]
    assert digests[2].split(",")[0] == digests[1] == digests[3].split(",")[1]


def test_what_cannot_be_traced_without_an_image_is_refused_before_work(tmp_path: Path) -> None:
    data = ConceptDataset("d", (example("one", Noise(0)), example("none")))
    with pytest.raises(
        DataError, match=r"example 'none' has no image, and without one .* skips its layers of cross-attention"
    ):
        trace(model("mllama"), data, ["resid_post"], ["last"], tmp_path / "a", answers=False)
    broken = replace(data[0], further_images=(BytesImage(b"no image", "row 2"),))
    with pytest.raises(DataError, match="image 'row 2' cannot be read"):
        trace(model("llava"), ConceptDataset("d", (broken,)), ["resid_post"], ["last"], tmp_path / "b", answers=False)


def test_batches_share_no_image_by_mistake() -> None:
    """Rows with the same first image and other second images run the vision tower for each."""
    lvlm: Lvlm = model("llava")
    rows = [example("a", Noise(0), Noise(1)), example("b", Noise(0), Noise(2)), example("c", Noise(0), Noise(1))]
    (batch,) = lvlm.batches(rows, 4)
    assert batch.images[0] == batch.images[2] != batch.images[1]
    batched = lvlm.logits(batch.inputs, batch.images)
    alone = torch.cat([lvlm.logits(lvlm.collate([lvlm.encode(e)])) for e in rows])
    torch.testing.assert_close(batched, alone, atol=1e-5, rtol=1e-5)
    assert image_encodings[lvlm.spec.view].axis == 0
