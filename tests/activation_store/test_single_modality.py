"""Traces of one modality alone, against forward passes of hand-made prompts with plain hooks."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from activation_store import ActivationStore, MemorySource, trace
from activation_store.summary import print_store
from concepts import ConceptDataset
from groundscope.core.errors import ConfigError, GroundscopeError, ModelError, SiteError, StoreError
from lvlm import Lvlm, load_lvlm, wrap_lvlm
from tests.toys.families import build
from tests.toys.tracing import of_one_length


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return load_lvlm("tiny")


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    first, *others = of_one_length(3)
    longer = replace(first, id="longer", suffix="Answer with one word.", prefix="yes", candidates=(), mentions=())
    return ConceptDataset("some", (first, *others, longer))


def residual(model: Lvlm, ids: list[int], pixels: torch.Tensor | None) -> np.ndarray:
    """The last layer's residual [T, D] by a hook on the Hugging Face module."""
    inputs: list[torch.Tensor] = []
    hf: Any = model.hf
    handle = hf.model.language_model.layers[5].register_forward_hook(
        lambda _m, _i, out: inputs.append(out[0] if isinstance(out, tuple) else out)
    )
    extra = {} if pixels is None else {"pixel_values": pixels}
    with torch.no_grad():
        hf(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **extra)
    handle.remove()
    return inputs[0].reshape(len(ids), -1).float().numpy()


def test_rows_equal_forward_passes_of_prompts_without_the_other_modality(
    model: Lvlm, data: ConceptDataset, tmp_path: Path
) -> None:
    options: Any = {"sites": ["resid_post"], "progress": False}
    text = trace(model, data, tokens=["question:mean", "last"], out=tmp_path / "text", input="text", **options)
    image = trace(model, data, tokens=["image:mean", "last"], out=tmp_path / "image", input="image", **options)
    assert (text.input, image.input) == ("text", "image")
    tokenizer: Any = model.processor.tokenizer
    for row, example in enumerate(data):
        whole = model.encode(example)
        ids = whole.inputs["input_ids"][0].tolist()
        positions = set(whole.tokens.image)
        markers = set(whole.tokens.separators)
        words = [token for i, token in enumerate(ids) if i not in positions | markers]
        # The tokenizer of this model splits at white space, so the prompt without its image is that without its image tokens.
        expected = residual(model, words, None)
        np.testing.assert_allclose(text.read("decoder.L5.resid_post", "last")[row], expected[-1], atol=1e-5)
        empty = tokenizer(model.prompt("", 1).replace(model.placeholder, model.placeholder * len(positions)))[
            "input_ids"
        ]
        at = [i for i, token in enumerate(empty) if token == model.content_id]
        assert len(at) == len(positions)
        assert len(empty) < len(ids)
        alone = residual(model, empty, whole.inputs["pixel_values"])
        np.testing.assert_allclose(image.read("decoder.L5.resid_post", "last")[row], alone[-1], atol=1e-5)
        mean = image.read("decoder.L5.resid_post", "image:mean")[row]
        np.testing.assert_allclose(mean, alone[at].mean(axis=0), atol=1e-5)
    # All rows of one image are equal without the text, and all images without it leave the same text.
    last = image.read("decoder.L5.resid_post", "last")
    np.testing.assert_allclose(last[0], last[3], atol=1e-6)
    frame = image.frame()
    assert frame["question"].tolist() == [e.question for e in data]
    assert set(frame["model_answer"]) == {""}
    assert (text.frame()["model_answer"][:3] != "").all()
    assert text.columns["image"].tolist() == [""] * 4
    assert "" not in image.columns["image"].tolist()
    assert text.provenance["dataset"]["digest"] == image.provenance["dataset"]["digest"] == data.digest


def test_stores_say_what_their_rows_have_seen_and_never_mix(model: Lvlm, data: ConceptDataset, tmp_path: Path) -> None:
    options: Any = {"sites": ["decoder.L5.resid_post"], "tokens": ["last"], "progress": False}
    stores = {}
    for number, name in enumerate(("both", "text", "image")):
        part = ConceptDataset(name, (replace(data[number], id=name),))
        modality: Any = {} if name == "both" else {"input": name}
        stores[name] = trace(model, part, out=tmp_path / name, **modality, **options)
        assert stores[name].input == name
        assert trace(model, part, out=tmp_path / name, **modality, **options).digest == stores[name].digest
        console = Console(record=True, width=200, quiet=False, file=io.StringIO())
        print_store(stores[name], console)
        words = {"both": "image and text", "text": "the text alone", "image": "the image alone"}[name]
        assert f"rows have seen {words}" in console.export_text()
    assert "input" not in stores["both"].provenance  # as in stores of earlier releases
    for a, b in (("both", "text"), ("text", "image"), ("image", "both")):
        with pytest.raises(StoreError, match=r"cannot be merged .* field 'provenance\.(input|answers)' differs"):
            stores[a].merge(stores[b])
        part = ConceptDataset(a, (replace(data[("both", "text", "image").index(a)], id=a),))
        with pytest.raises(StoreError, match=r"field .*(input|answers|array).* differs"):
            trace(model, part, out=tmp_path / a, input=b, **options)  # type: ignore[arg-type]
    other = ConceptDataset("more", (replace(data[1], id="more"),))
    more = trace(model, other, out=tmp_path / "more", input="text", **options)
    merged = stores["text"].merge(more)
    assert (merged.input, len(merged), ActivationStore(tmp_path / "text").input) == ("text", 2, "text")
    table = {"id": ["a"], "group": ["g"]}
    assert MemorySource({"resid_post": np.zeros((1, 1, 2))}, table).input == "both"


def test_requests_of_the_other_modality_are_refused(model: Lvlm, data: ConceptDataset, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"sites": ["resid_post"], "tokens": ["last"]}
    cases: list[tuple[dict[str, Any], type[GroundscopeError], str]] = [
        ({"input": "txt"}, ConfigError, "unknown input 'txt'; choose from both, text, image; did you mean text"),
        ({"input": "text", "tokens": ["image:mean"]}, SiteError, "no tokens of 'image:mean'"),
        ({"input": "text", "tokens": ["last", "object:mean"]}, SiteError, "no tokens of 'object:mean'"),
        ({"input": "image", "tokens": ["question:mean"]}, SiteError, "no tokens of 'question:mean'"),
        ({"input": "image", "tokens": ["answer:0"]}, SiteError, "no tokens of 'answer:0'"),
        ({"input": "image", "generate": 3}, ConfigError, "without a question there is no answer"),
        ({"input": "text", "sites": ["vision.resid_post"]}, SiteError, "'vision.resid_post' reads images"),
        ({"input": "text", "sites": ["projector.out"]}, SiteError, "'projector.out' reads images"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            trace(model, data, out=tmp_path / "none", **{**plain, **options})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", ["blip2_opt", "mllama", "kosmos2"])
def test_families_that_do_not_run_without_an_image_are_refused_by_name(family: str, tmp_path: Path) -> None:
    model = wrap_lvlm(*build(family))
    data = of_one_length(1)
    with pytest.raises(ModelError, match=rf"{model.spec.model_type}.* does not run all its layers without an image"):
        trace(model, data, ["resid_post"], ["last"], tmp_path / "text", input="text")


@pytest.mark.parametrize("family", ["qwen2_vl", "instructblip_llama"])
def test_the_image_alone_does_not_depend_on_the_question(family: str, tmp_path: Path) -> None:
    model = wrap_lvlm(*build(family))
    first = of_one_length(1)[0]
    other = replace(first, id="other", question="Is there a key in the picture, or a bell?")
    data = ConceptDataset("two", (first, other))
    options: Any = {"sites": ["projector.out", "resid_post"], "tokens": ["image:mean"], "progress": False}
    store = trace(model, data, out=tmp_path / "image", input="image", **options)
    for site in ("projector.out", f"decoder.L{model.n_layers - 1}.resid_post"):
        a, b = store.read(site, "image:mean")
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.abs(a).max() > 1e-3
