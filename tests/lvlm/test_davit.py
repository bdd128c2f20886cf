"""Florence-2's tower: feature maps between layers, attention over windows and channels, and token sequences at its sites."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from activation_store import trace
from concepts import ConceptDataset
from concepts.annotated_object import Box
from groundscope.core.errors import ModelError, SiteError
from lvlm import Lvlm, TokenSelection, families, wrap_lvlm
from lvlm.identity_checks import validate
from lvlm.token_map import ImageView
from tests.toys.examples import QUESTION, example, picture
from tests.toys.families import build

COMPONENTS = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
STAGE = pytest.mark.parametrize("stage", [0, 1])
SIDE = {0: 14, 1: 7}
"""Patches along a side; with windows of 4 both have windows that reach beyond the picture."""


@cache
def model(stage: int = -1) -> Lvlm:
    spec = families["florence2"]
    vision = replace(spec.vision, layers=f"model.vision_tower.blocks.{stage}.*")
    return wrap_lvlm(*build("florence2"), spec=replace(spec, vision=vision), name="florence2", validate=False)


def by_token(x: torch.Tensor) -> np.ndarray:
    """Go through a picture [D, rows, columns] row by row."""
    return np.array([x[:, r, c].tolist() for r in range(x.shape[1]) for c in range(x.shape[2])])


@STAGE
def test_every_identity_holds_in_every_stage(stage: int) -> None:
    lvlm = model(stage)
    errors = validate(lvlm, lvlm.encode(example()))
    for n in (0, 1):
        for part in ("sum of heads = attn_out", "pre + attn_out = mid", "pre + attn_out + mlp_out = post"):
            assert errors[f"vision.L{n}: {part}"] <= 1e-5


def test_undeclared_convolutions_fail_validation() -> None:
    spec = families["florence2"]
    for field, message in (("attention_conv", "pre [+] attn_out = mid"), ("mlp_conv", "[+] mlp_out = post")):
        wrong = replace(spec, vision=replace(spec.vision, **{field: ""}))
        with pytest.raises(ModelError, match=f"vision.L0: .*{message} fails"):
            wrap_lvlm(*build("florence2"), spec=wrong)


@STAGE
def test_sites_equal_raw_hooks_and_naive_attention(stage: int) -> None:
    lvlm, side = model(stage), SIDE[stage]
    block = lvlm.hf.model.vision_tower.blocks[stage][0]
    layers = (block.spatial_block, block.channel_block)
    record: dict[str, torch.Tensor] = {}
    hooks = []
    for n, layer in enumerate(layers):
        attention = layer.window_attn if n == 0 else layer.channel_attn
        hooks += [
            layer.register_forward_pre_hook(lambda _m, a, n=n: record.update({f"pre{n}": a[0][0].clone()})),
            layer.register_forward_hook(lambda _m, _a, out, n=n: record.update({f"post{n}": out[0].clone()})),
            layer.conv2.register_forward_pre_hook(lambda _m, a, n=n: record.update({f"mid{n}": a[0][0].clone()})),
            attention.register_forward_pre_hook(lambda _m, a, n=n: record.update({f"given{n}": a[0][0].double()})),
        ]
    sites = lvlm.read(lvlm.encode(example()).inputs, [f"vision.L{n}.{c}" for n in (0, 1) for c in COMPONENTS])
    for hook in hooks:
        hook.remove()
    for n in (0, 1):
        for raw, component in (("pre", "resid_pre"), ("mid", "resid_mid"), ("post", "resid_post")):
            got = sites[f"vision.L{n}.{component}"][0].numpy()
            np.testing.assert_array_equal(got, by_token(record[f"{raw}{n}"]).astype(np.float32), err_msg=component)
    # Window by window and head by head, in float64, from the weights and what the attention was given.
    heads, spatial, channel = lvlm.n_vision_heads, layers[0].window_attn, layers[1].channel_attn
    qkv, bias = spatial.qkv.weight.double(), spatial.qkv.bias.double()
    width = qkv.shape[1]
    part = width // heads
    padded = torch.zeros(-(-side // 4) * 4, -(-side // 4) * 4, width, dtype=torch.float64)
    padded[:side, :side] = record["given0"]
    want = {c: np.zeros((side * side, width)) for c in "qkvz"}
    for top in range(0, side, 4):
        for column in range(0, side, 4):
            x = padded[top : top + 4, column : column + 4].reshape(16, width) @ qkv.T + bias
            q, k, v = x[:, :width], x[:, width : 2 * width], x[:, 2 * width :]
            z = torch.cat(
                [
                    (q[:, h] @ k[:, h].T / part**0.5).softmax(-1) @ v[:, h]
                    for h in (slice(i * part, (i + 1) * part) for i in range(heads))
                ],
                dim=1,
            )
            for i in range(16):
                r, c = top + i // 4, column + i % 4
                if r < side and c < side:
                    for name, value in (("q", q), ("k", k), ("v", v), ("z", z)):
                        want[name][r * side + c] = value[i].tolist()
    for name, value in want.items():
        np.testing.assert_allclose(sites[f"vision.L0.{name}"][0].numpy(), value, atol=1e-5, err_msg=name)
    # Channels attend to channels of their group, over all tokens.
    x = record["given1"] @ channel.qkv.weight.double().T + channel.qkv.bias.double()
    q, k, v = x[:, :width], x[:, width : 2 * width], x[:, 2 * width :]
    for name, value in (("q", q), ("k", k), ("v", v)):
        np.testing.assert_allclose(sites[f"vision.L1.{name}"][0].numpy(), value.tolist(), atol=1e-5, err_msg=name)
    for i in range(heads):
        h = slice(i * part, (i + 1) * part)
        z = ((q[:, h].T @ k[:, h] / side).softmax(-1) @ v[:, h].T).T
        np.testing.assert_allclose(sites["vision.L1.z"][0][:, h].numpy(), z.tolist(), atol=1e-5)


@STAGE
@pytest.mark.parametrize("layer", [0, 1])
def test_values_written_at_a_site_are_read_back(stage: int, layer: int) -> None:
    lvlm = model(stage)
    inputs = lvlm.encode(example()).inputs
    for component in COMPONENTS:
        site = f"vision.L{layer}.{component}"
        before = lvlm.read(inputs, [site])[site]
        plain = lvlm.logits(inputs)
        target = 30 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
        same = lvlm.locate(site).edit(lambda x: x.clone())
        torch.testing.assert_close(lvlm.logits(inputs), plain, rtol=0, atol=1e-6)
        same.remove()
        hook = lvlm.locate(site).edit(lambda x, new=target: new)
        try:
            torch.testing.assert_close(lvlm.read(inputs, [site])[site], target, rtol=0, atol=0)
            assert not torch.allclose(lvlm.logits(inputs), plain, rtol=0, atol=1e-5), component
        finally:
            hook.remove()


@STAGE
def test_a_token_changes_where_its_pixels_do(stage: int) -> None:
    """With what mixes tokens inside a stage cut, the pixels of a token's box reach it and, as kernels overlap, the next."""
    lvlm = model(stage)
    mixing = [
        p
        for block in (b for stage_ in lvlm.hf.model.vision_tower.blocks for b in stage_)
        for part, attention in ((block.spatial_block, "window_attn"), (block.channel_block, "channel_attn"))
        for p in (part.conv1.weight, part.conv2.weight, getattr(part, attention).proj.weight)
    ]
    weights = [p.clone() for p in mixing]
    pixels = np.random.default_rng(0).integers(96, 160, (56, 56, 3), dtype=np.uint8)
    site, side = "vision.L1.resid_post", SIDE[stage]

    def embeddings_of(array: np.ndarray) -> tuple[torch.Tensor, ImageView]:
        inputs, tokens = lvlm.encode_prompt(lvlm.prompt(QUESTION), [Image.fromarray(array)], question=QUESTION)
        return lvlm.read(inputs, [site])[site][0], tokens.views["vision"][0]

    try:
        with torch.no_grad():
            for p in mixing:
                p.zero_()
        before, lattice = embeddings_of(pixels)
        assert lattice.grid is not None
        assert (lattice.grid.rows, lattice.grid.columns) == (side, side)
        for cell in (0, side + 2, 3 * side - 1, side * side - 1):
            box = lattice.grid.box(cell)
            changed = pixels.copy()
            changed[round(box.y0) : round(box.y1), round(box.x0) : round(box.x1)] = 255
            moved = np.flatnonzero((embeddings_of(changed)[0] - before).abs().amax(-1).numpy() > 0)
            near = {(r, c) for r in (cell // side, cell // side + 1) for c in (cell % side, cell % side + 1)}
            near = {r * side + c for r, c in near if r < side and c < side}
            assert set(moved.tolist()) == near
    finally:
        with torch.no_grad():
            for p, value in zip(mixing, weights, strict=True):
                p.copy_(value)


def test_boxes_are_laid_over_its_tokens() -> None:
    lvlm = model()
    boxes = {"o": (0, Box(0, 0, 84, 56))}  # the upper left quarter
    tokens = lvlm.encode_prompt(lvlm.prompt(QUESTION), [picture((168, 112))], question=QUESTION, boxes=boxes)[1]
    rows = {p // 7 for p in tokens.positions(TokenSelection.parse("object:o:mean"), "vision")}
    assert rows == {0, 1, 2, 3}
    assert tokens.sequence["vision"] == 49


def test_an_example_traced_in_a_batch_equals_the_example_traced_alone(tmp_path: Path) -> None:
    lvlm = model()
    data = ConceptDataset("d", (example(0), example(3, (60, 60)), example(1), example(2, (60, 60))))
    sites = ["vision.resid_post", "vision.z", "vision.mlp_out", "projector.out"]
    alone = trace(lvlm, data, sites, ["image:all"], tmp_path / "alone", batch_size=1, answers=False)
    among = trace(lvlm, data, sites, ["image:all"], tmp_path / "among", batch_size=4, answers=False)
    assert max(len(b.index) for b in lvlm.batches(data.examples, 4)) > 1
    for site in ("vision.L0.z", "vision.L1.z", "vision.L1.resid_post", "vision.L0.mlp_out", "projector.out"):
        for values, other in zip(alone.ragged(site, "image:all"), among.ragged(site, "image:all"), strict=True):
            assert values.shape == (49, 32)
            np.testing.assert_allclose(values, other, rtol=0, atol=1e-5)
    assert among.n_heads("vision") == 4


def test_missing_sites_are_named() -> None:
    lvlm = model()
    with pytest.raises(SiteError, match=r"'vision.L0.pattern' is in florence2, but its attention returns no weights"):
        lvlm.read(lvlm.encode(example()).inputs, ["vision.L0.pattern"], quiet=True)
    with pytest.raises(SiteError, match="has vision layers 0-1"):
        lvlm.locate("vision.L2.z")
    spec = families["florence2"]
    tower = "model.vision_tower.blocks"
    mixed = replace(spec, vision=replace(spec.vision, layers=f"{tower}.0.*+{tower}.1.*"))
    with pytest.raises(ModelError, match=r"have \{2, 4\} heads; override FamilySpec.vision.layers"):
        wrap_lvlm(*build("florence2"), spec=mixed)
