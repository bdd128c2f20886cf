"""Scores of heads against naive computations, and what they miss on circuits that are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scipy import ndimage, stats

from circuits import HeadTable, ablate, attention_to_image, head_table, patch_heads
from circuits.head_screening.localization import components, elbow, selected, spatial_entropy
from concepts.schema import Example
from groundscope.core.errors import ConfigError, ModelError, PatchError, StoreError
from groundscope.testing import planted_circuits
from lvlm import Head
from lvlm.model import Lvlm
from tests.toys.random_models import examples, hooks_of, layers_of, pairs, shared_model

LEAST = 0.02
ALL = ("image_mass", "box_mass", "localisation", "vhd", "direct", "patching", "ablation")


@torch.no_grad()
def outputs(model: Lvlm, inputs: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return z of every layer ``[L, H, d]``, the final residual ``[D]`` and the logits ``[V]``, at the last token."""
    head_outputs: list[torch.Tensor] = []
    final: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: head_outputs.append(args[0][0, -1].clone()))
        for layer in layers_of(model)
    ]
    norm = model.hf.model.language_model.norm
    hooks.append(norm.register_forward_pre_hook(lambda _m, args: final.append(args[0][0, -1].clone())))
    logits = model.hf(**inputs).logits[0, -1]
    for hook in hooks:
        hook.remove()
    z = torch.stack(head_outputs).reshape(model.n_layers, model.n_heads, model.head_dim)
    return z.double().numpy(), final[0].double().numpy(), logits.double().numpy()


def answer_ids(model: Lvlm, example: Example) -> dict[str, int]:
    return {c: model.processor.tokenizer.convert_tokens_to_ids(c) for c in example.candidates}


def test_direct_attribution_against_float64() -> None:
    model, data = shared_model(), examples()
    scores = head_table(model, data, methods=["direct"], batch_size=3).values["direct"]
    w_u = model.hf.lm_head.weight.detach().double().numpy()
    norm = model.hf.model.language_model.norm
    for n, example in enumerate(data):
        z, final, logits = outputs(model, model.encode(example).inputs)
        ids = answer_ids(model, example)
        other = max((c for c in ids if c != example.answer), key=lambda c: logits[ids[c]])
        direction = (w_u[ids[example.answer]] - w_u[ids[other]]) * norm.weight.detach().double().numpy()
        scale = 1 / np.sqrt((final**2).mean() + norm.variance_epsilon)
        for i, layer in enumerate(layers_of(model)):
            w_o = layer.self_attn.o_proj.weight.detach().double().numpy()
            for h in range(model.n_heads):
                columns = slice(h * model.head_dim, (h + 1) * model.head_dim)
                expected = (w_o[:, columns] @ z[i, h]) @ direction * scale
                assert scores[n, i, h] == pytest.approx(expected, abs=1e-5)
    assert np.abs(scores).max() > 0.01
    assert hooks_of(model) == 0


def test_vision_aware_divergence_against_a_run_without_the_image() -> None:
    model, data = shared_model(), examples()[:5]
    scores = head_table(model, data, methods=["vhd"], batch_size=2).values["vhd"]
    image = model.processor.tokenizer.convert_tokens_to_ids("<image>")
    for n, example in enumerate(data):
        inputs = model.encode(example).inputs
        ids = inputs["input_ids"][0]
        text = ids[ids != image][None]
        assert text.shape[1] == len(ids) - 49
        with_image, _, _ = outputs(model, inputs)
        without, _, _ = outputs(model, {"input_ids": text, "attention_mask": torch.ones_like(text)})
        np.testing.assert_allclose(scores[n], np.sqrt(((with_image - without) ** 2).sum(-1)), atol=1e-5)


def test_columns_equal_the_functions_that_compute_one_score() -> None:
    model, data = shared_model(), pairs("color")
    table = head_table(model, data, methods=ALL, min_effect=LEAST)
    clean = [p.clean for p in data]
    heads = [Head(i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
    attention = attention_to_image(model, clean, heads)
    np.testing.assert_array_equal(table.values["image_mass"].reshape(len(data), -1), attention.image_mass)
    np.testing.assert_array_equal(table.values["box_mass"].reshape(len(data), -1), attention.box_mass)
    both = [e for p in data for e in (p.clean, p.corrupt)]
    lost = ablate(model, clean, "each", method="mean", tokens="last", reference=both)
    np.testing.assert_allclose(table.values["ablation"].reshape(len(data), -1), lost.effects, atol=1e-5)
    scores = patch_heads(model, data, min_effect=LEAST)
    patched = np.isfinite(table.values["patching"]).all((1, 2))
    assert [i for i, k in zip(table.ids, patched, strict=True) if k] == list(scores.ids)
    np.testing.assert_allclose(table.values["patching"][patched], scores.effects, atol=1e-5)
    assert table.methods == ALL


def test_pairs_that_patching_leaves_out_have_no_score_there() -> None:
    model, data = shared_model(), list(pairs("color"))
    same = replace(data[0], corrupt=replace(data[0].corrupt, image=data[0].clean.image))
    table = head_table(model, [same, *data], methods=["patching", "image_mass"], min_effect=LEAST)
    assert np.isnan(table.values["patching"][0]).all()
    assert np.isfinite(table.values["image_mass"]).all()
    assert len(table.rows("patching").values) == len(patch_heads(model, [same, *data], min_effect=LEAST).ids)


def test_spots_against_scipy() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((60, 7, 9)) ** 3
    maps[0] = 0.5
    maps[1] = np.eye(7, 9)
    around = np.ones((3, 3))
    spots = components(maps > 0.5)
    for heatmap, mine in zip(maps, spots, strict=True):
        label, count = ndimage.label(heatmap > 0.5, around)
        assert len(np.unique(mine[mine > 0])) == count
        assert len({(a, b) for a, b in zip(label.ravel(), mine.ravel(), strict=True)}) == count + (
            not (heatmap > 0.5).all()
        )
    expected = []
    for heatmap in maps:
        above = np.maximum(heatmap - heatmap.mean(), 0)
        label, count = ndimage.label(above > 1e-12, around)
        share = np.array([above[label == i + 1].sum() for i in range(count)])
        expected.append(stats.entropy(share) if count else 0.0)
    np.testing.assert_allclose(spatial_entropy(maps), expected, atol=1e-9)
    assert spatial_entropy(maps)[:2].tolist() == [0, 0]


def test_elbow_and_selection() -> None:
    assert elbow(np.array([0.9, 0.05, 0.8, 0.04, 0.03, 0.85])) == 0.05
    for bulging in ([0.5, 0.5, 0.5], [1.0, 0.9, 0.8, 0.0]):
        assert elbow(np.array(bulging)) < min(bulging)
    maps = np.zeros((2, 5, 9))
    maps[:, 0, [0, 8]] = 0.45  # two spots
    maps[:, 1, 4] = 0.9  # one spot
    maps[:, 2, [0, 1, 2]] = 0.28  # one spot, less attention
    maps[:, 3, 4] = 0.01  # hardly looks
    np.testing.assert_array_equal(selected(maps, (3, 3), 1), [[0, 1, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(selected(maps, (3, 3), 2), [[0, 1, 1, 0, 0]] * 2)
    np.testing.assert_array_equal(selected(maps, (3, 3), 10), [[1, 1, 1, 0, 0]] * 2)


def test_scores_of_heads_of_a_planted_circuit() -> None:
    for seed in range(4):
        p = planted_circuits.plant(seed)
        assert p.grounding is not None
        assert p.prior is not None
        table = head_table(p.model, p.pairs(12), methods=ALL)
        looking = {p.grounding, *p.decoys}
        assert table.top("patching", 1) == (p.grounding,)
        assert table.top("ablation", 1) == (p.grounding,)
        assert set(table.top("image_mass", 4)) == looking
        assert set(table.top("box_mass", 3)) == {p.grounding, p.decoys[0], p.decoys[2]}
        # Only what reaches the answer counts, and of that also what does not come from the image.
        assert table.top("direct", 1) == (p.grounding,)
        direct = table.values["direct"]
        assert direct[:, p.grounding.layer, p.grounding.head] == pytest.approx(6, rel=0.03)
        pull = np.abs(direct[:, p.prior.layer, p.prior.head])
        assert pull.max() == pytest.approx(3, rel=0.03)
        decoys = [np.abs(direct[:, h.layer, h.head]).max() for h in p.decoys]
        assert max(decoys) < 1e-4
        divergence = table.mean("vhd")
        assert min(divergence[h.layer, h.head] for h in p.decoys[::2]) > 0.9
        assert table.mean("localisation")[p.grounding.layer, p.grounding.head] == 1
        agreement = table.agreement(k=(1,)).set_index("method")
        assert agreement.loc[["direct", "ablation"], "overlap@1"].eq(1).all()
        assert set(agreement["level"]) == {"all", "attribute"}


def test_agreement_against_scipy() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(1, 4, 6)) + 0.5 * rng.normal(size=(40, 4, 6))
    near = truth + 2 * rng.normal(size=truth.shape)
    near[:5] = np.nan
    noise = rng.normal(size=truth.shape)
    table = HeadTable(
        {"near": near, "noise": noise, "patching": truth},
        tuple(f"e{i}" for i in range(40)),
        tuple(f"g{i // 2}" for i in range(40)),
        tuple(("object", "relation")[i % 2] for i in range(40)),
        "m", "c", "w",
    )  # fmt: skip
    frame = table.agreement(k=(4,)).set_index(["level", "method"])
    assert len(frame) == 6
    for level in ("all", "object", "relation"):
        keep = np.array([level in ("all", x) for x in table.levels])
        for method, values in (("near", near), ("noise", noise)):
            own = keep & np.isfinite(values).all((1, 2))
            a, b = values[own].mean(0).ravel(), truth[keep].mean(0).ravel()
            row = frame.loc[level, method]
            assert row["rank_correlation"] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-6)
            assert row["overlap@4"] == len(set(np.argsort(-a)[:4]) & set(np.argsort(-b)[:4])) / 4
            assert row["chance@4"] == pytest.approx(4 / 24)
            assert row["rank_correlation_low"] < row["rank_correlation_high"]
    assert frame.loc["all", "near"]["rank_correlation_low"] > 0.4
    assert frame.loc["all", "noise"]["rank_correlation_high"] < 0.6
    assert table.select(np.arange(5)).agreement()["method"].tolist() == ["noise"] * 3


def test_files_and_frames(tmp_path: Path) -> None:
    table = head_table(shared_model(), examples()[:4], methods=["image_mass", "box_mass"])
    loaded = HeadTable.load(table.save(tmp_path / "deep" / "table.safetensors"))
    for method in table.methods:
        np.testing.assert_array_equal(table.values[method], loaded.values[method])
    assert (loaded.ids, loaded.groups, loaded.levels, loaded.methods) == (
        table.ids, table.groups, table.levels, table.methods,
    )  # fmt: skip
    frame = table.frame()
    assert len(frame) == 48
    assert frame["name"][9] == "L1.H1"
    np.testing.assert_allclose(frame["image_mass"], table.values["image_mass"].mean(0).ravel(), rtol=1e-5)
    defined = np.isfinite(table.values["box_mass"]).all((1, 2))
    assert 0 < defined.sum() < 4
    np.testing.assert_allclose(frame["box_mass"], table.values["box_mass"][defined].mean(0).ravel(), rtol=1e-5)
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "other")
    with pytest.raises(StoreError, match="is not a head_table file"):
        HeadTable.load(tmp_path / "other")
    with pytest.raises(PatchError, match="unknown method 'vhd'"):
        table.mean("vhd")


def test_unknown_methods_are_refused() -> None:
    model, data = shared_model(), examples()[:2]
    for methods in (["attention"], [], ["vhd", "vhd"], ["patching"]):
        with pytest.raises(ConfigError):
            head_table(model, data, methods=methods)
    with pytest.raises(PatchError, match="data is empty"):
        head_table(model, [])


def test_a_model_whose_logits_are_no_linear_map_is_named() -> None:
    p = planted_circuits.plant(0)
    hook = p.model.hf.lm_head.register_forward_hook(lambda _m, _a, out: 3 * torch.tanh(out / 3))
    with pytest.raises(ModelError, match="not linear in the normed residual"):
        head_table(p.model, p.examples(2), methods=["direct"])
    hook.remove()
    layer = layers_of(p.model)[1].self_attn
    hook = layer.register_forward_hook(lambda _m, _a, out: (2 * out[0], *out[1:]))
    with pytest.raises(ModelError, match="attention of layer 1 does not add"):
        head_table(p.model, p.examples(2), methods=["direct"])
    hook.remove()
