"""Memory of a model of real width: validation, reads, caches and batches in bytes, and quantized layers."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from activation_store.tracing.plan import make_plan, outline_plan
from concepts import scenes
from concepts.schema import Example
from groundscope.core.bounded_cache import BoundedCache
from groundscope.core.errors import ModelError, SiteError
from lvlm import Lvlm, load_lvlm, wrap_lvlm
from lvlm.access.weights import columns, quantized
from lvlm.identity_checks import validate
from lvlm.loading import has_weights, outline_lvlm
from tests.toys.examples import example
from tests.toys.families import BUILDERS, build
from tests.toys.wide_model import WIDTH, Live, peak_of, wide

LAYERS = (2, 4)


@pytest.fixture(scope="module")
def question() -> Example:
    base = next(e for e in scenes.dataset(10, 0) if e.kind == "existence")
    return replace(base, question=f"Look at the picture and answer yes or no : {base.question}")


@pytest.fixture(scope="module")
def models() -> dict[int, Lvlm]:
    return {layers: wide(layers) for layers in LAYERS}


# -- memory of a forward --------------------------------------------------------------------------------------------


def test_the_proof_at_load_takes_a_few_rows_of_the_stream_whatever_the_layers(
    models: dict[int, Lvlm], question: Example
) -> None:
    encodings = {layers: model.encode(question) for layers, model in models.items()}
    tokens = encodings[2].tokens.length
    assert 590 <= tokens <= 600
    stream = tokens * WIDTH * 4
    peaks = {layers: peak_of(lambda n=layers: validate(models[n], encodings[n])) for layers in LAYERS}
    # A layer's tensors are dropped when it is checked: all that grows is the record of errors.
    assert (peaks[4] - peaks[2]) / 2 <= 0.01 * stream
    # Per token: about 25 rows of width D in float32 (16 of a layer, and eager attention), far from D rows.
    assert peaks[2] <= 30 * stream


def test_reading_one_token_takes_no_more_for_more_layers(models: dict[int, Lvlm], question: Example) -> None:
    peaks, values = {}, {}
    for layers, model in models.items():
        inputs = model.encode(question).inputs
        sites = [f"decoder.L{i}.{c}" for i in range(layers) for c in ("z", "attn_out", "resid_post")]
        with Live() as live:
            values[layers] = model.read(inputs, sites, take=lambda _, x: x[:, -1])
        peaks[layers] = live.peak
        if layers == 2:
            whole = model.read(inputs, sites)
            assert all(torch.equal(values[layers][name], x[:, -1]) for name, x in whole.items())
    # Three rows of width D for each layer, not three for each layer and token.
    assert (peaks[4] - peaks[2]) / 2 <= 4 * WIDTH * 4
    assert sum(x.untyped_storage().nbytes() for x in values[4].values()) == 12 * WIDTH * 4


def test_take_may_keep_nothing() -> None:
    model = wrap_lvlm(*build("llava"), name="llava", validate=False)
    shapes: list[tuple[int, ...]] = []
    encoding = model.encode(example())
    results = model.read(encoding.inputs, ["decoder.L1.z"], take=lambda _, x: shapes.append(tuple(x.shape)))
    assert results == {}
    assert shapes == [(1, encoding.tokens.length, 32)]


@pytest.mark.parametrize("family", ["llava", "blip2_opt", "instructblip_llama", "kosmos2", "chameleon", "mllama"])
def test_logits_are_computed_where_they_are_read(family: str) -> None:
    network, processor = build(family)
    model = wrap_lvlm(network, processor, name=family, validate=False)
    inputs = model.encode(example()).inputs
    with torch.no_grad():
        whole = network(**inputs, use_cache=False).logits
    rows: list[int] = []
    unembedding = network.get_submodule(model.spec.unembedding)
    handle = unembedding.register_forward_hook(lambda _m, args, _out: rows.append(args[0].shape[1]))
    try:
        last, last_three = model.logits(inputs), model.forward(inputs, keep=3)
    finally:
        handle.remove()
    assert rows == [1, 3]
    torch.testing.assert_close(last, whole[:, -1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last_three.detach(), whole[:, -3:], rtol=1e-5, atol=1e-5)


# -- caches and batches ---------------------------------------------------------------------------------------------


def test_a_cache_holds_bytes_and_not_a_number_of_values() -> None:
    sizes: list[int] = []

    def make(size: int) -> Any:
        return lambda: sizes.append(size) or np.zeros(size, np.uint8)

    cache: BoundedCache[np.ndarray] = BoundedCache(100, lambda x: x.nbytes)
    cache.get("a", make(40))
    cache.get("b", make(40))
    assert cache.get("a", make(1)).nbytes == 40  # used last: the next to go is b
    cache.get("c", make(40))
    assert (len(cache), cache.held) == (2, 80)
    cache.get("b", make(30))
    assert sizes == [40, 40, 40, 30]
    assert cache.get("huge", make(101)).nbytes == 101
    assert cache.held <= 100
    cache.clear()
    assert (len(cache), cache.held) == (0, 0)


def test_a_model_keeps_processed_images_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    each = 3 * 112 * 112 * 4
    monkeypatch.setattr("lvlm.model.IMAGE_CACHE_BYTES", 3 * each)
    model = load_lvlm("tiny", validate=False)
    first = list({e.group: e for e in scenes.dataset(10, 0)}.values())
    for item in first:
        model.encode(item)
    assert model._image_cache.held == 3 * each
    assert model.encode(first[-1]).inputs["pixel_values"] is model.encode(first[-1]).inputs["pixel_values"]


def test_batches_stop_to_collect_at_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_lvlm("tiny", validate=False)
    some = list(scenes.dataset(10, 0))[:40]
    whole = [i for batch in model.batches(some, 4) for i in batch.index]
    monkeypatch.setattr("lvlm.encoding.batches.CHUNK_BYTES", 1)
    calls = 0
    encode = model.encode

    def counted(item: Example) -> Any:
        nonlocal calls
        calls += 1
        return encode(item)

    monkeypatch.setattr(model, "encode", counted)
    indices: list[int] = []
    for number, batch in enumerate(model.batches(some, 4)):
        if number == 0:
            assert calls == 4  # a whole batch, and no more
        indices += batch.index
    assert sorted(indices) == sorted(whole) == list(range(40))


# -- quantized layers ------------------------------------------------------------------------------------------------


class FourBit(nn.Linear):
    """Two codes of four bits in a byte, a scale for each row: the layout of bitsandbytes, less its tables."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__(of.in_features, of.out_features, bias=of.bias is not None)
        scale = of.weight.detach().abs().amax(1, keepdim=True) / 7
        codes = (of.weight.detach() / scale).round().clamp(-7, 7).to(torch.int16) + 7
        packed = (codes.flatten()[::2] * 16 + codes.flatten()[1::2]).to(torch.uint8)[:, None]
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scale, self.bias = scale, of.bias

    def matrix(self) -> Tensor:
        packed = self.weight[:, 0].to(torch.int16)
        codes = torch.stack([packed // 16, packed % 16], 1).flatten().unflatten(0, (self.out_features, -1))
        return (codes - 7).float() * self.scale

    def forward(self, input: Tensor) -> Tensor:  # named as in torch
        return nn.functional.linear(input, self.matrix().to(input), None if self.bias is None else self.bias.to(input))


class EightBit(FourBit):
    """Rounds its inputs too, row by row, to 8 bits."""

    def forward(self, input: Tensor) -> Tensor:
        scale = input.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return super().forward((input / scale).round() * scale)


class Sealed(FourBit):
    """Runs on the tokens of a prompt only."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            message = "no kernel for this shape"
            raise RuntimeError(message)
        return super().forward(input)


def with_projections(kind: type[FourBit]) -> Lvlm:
    from tests.toys.single_view_families import llava

    torch.manual_seed(0)
    network, processor = llava()
    for layer in network.model.language_model.layers:
        layer.self_attn.o_proj = kind(layer.self_attn.o_proj)
    return wrap_lvlm(network.eval(), processor, name="quantized", validate=False)


@pytest.mark.parametrize("kind", [FourBit, EightBit])
def test_a_quantized_projection_is_proved_by_what_it_applies(kind: type[FourBit]) -> None:
    model = with_projections(kind)
    projection = model.output_projection("decoder", 0)
    assert isinstance(projection, FourBit)
    assert quantized(projection)
    x = torch.randn(1, projection.in_features)
    torch.testing.assert_close(columns(projection, slice(2, 9), x), projection.matrix()[:, 2:9])
    errors = validate(model, model.encode(example()))
    assert errors["decoder.L0: sum of heads = attn_out"] < (1e-5 if kind is FourBit else 5e-2)


def test_a_wrong_projection_is_found_in_a_quantized_model_too() -> None:
    model = with_projections(FourBit)
    projection = model.output_projection("decoder", 1)
    assert isinstance(projection, FourBit)
    handle = projection.register_forward_hook(
        lambda _m, _args, out: out.flip(-1)
    )  # what it gives is not what it applies
    try:
        with pytest.raises(ModelError, match=r"L1: sum of heads = attn_out"):
            validate(model, model.encode(example()))
    finally:
        handle.remove()


def test_a_layer_that_does_not_give_its_matrix_is_skipped_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = with_projections(Sealed)
    with caplog.at_level(logging.WARNING, "lvlm.identity_checks"):
        errors = validate(model, model.encode(example()))
    assert np.isnan(errors["decoder.L0: sum of heads = attn_out"])
    assert errors["decoder.L0: pre + attn_out + mlp_out = post"] < 1e-5
    message = caplog.records[0].getMessage()
    assert "was not checked: Sealed does not return the matrix that it applies (no kernel" in message
    assert "override" not in message


# -- without weights -------------------------------------------------------------------------------------------------

SITES = ["resid_post", "z", "q", "k", "v", "mlp_out"]


@pytest.mark.parametrize("family", sorted(set(BUILDERS) - {"florence2"}))
def test_widths_are_known_without_a_forward(family: str) -> None:
    model = wrap_lvlm(*build(family), name=family, validate=False)
    encoding = model.encode(example())
    for sites in (SITES, ["projector.out"], ["vision.z", "vision.resid_post"], ["pattern"]):
        tokens = ["last", "image:mean"] if sites[0] != "pattern" else ["last"]
        try:
            plan = make_plan(model, encoding, sites, tokens, "float32")
        except (SiteError, ModelError):  # what cannot be traced needs no plan
            continue
        assert outline_plan(model, encoding, sites, tokens, "float32").schema == plan.schema


def test_an_outline_encodes_and_has_no_weights(tmp_path: Any) -> None:
    model, outline = load_lvlm("tiny"), outline_lvlm("tiny")
    item = next(iter(scenes.dataset(10, 0)))
    assert all(parameter.is_meta for parameter in outline.hf.parameters())
    assert outline.encode(item).tokens == model.encode(item).tokens
    assert (outline.n_layers, outline.width, outline.head_dim) == (model.n_layers, model.width, model.head_dim)
    assert outline.config_hash == model.config_hash
    assert has_weights("tiny")
    assert not has_weights(tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        outline_lvlm(tmp_path)
