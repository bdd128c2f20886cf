"""Patching sites, sets of heads and positions against whole forwards with plain torch hooks, and other metrics."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuits import HeadSet, PatchScores, patch, patch_heads
from concepts.counterfactual_pair import CounterfactualPair
from concepts.schema import Example
from groundscope.core.errors import ConfigError, PatchError, SiteError
from lvlm import Head, Lvlm
from tests.toys.families import WHERE, at, model
from tests.toys.patching_oracle import pair_of
from tests.toys.random_models import layers_of, pairs, random_model, shared_model

PARTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@torch.no_grad()
def logits_of(lvlm: Lvlm, example: Example) -> torch.Tensor:
    return lvlm.logits(lvlm.encode(example).inputs)[0]


def score(lvlm: Lvlm, logits: torch.Tensor, pair: CounterfactualPair) -> float:
    right, wrong = (lvlm.processor.tokenizer.convert_tokens_to_ids(e.answer) for e in (pair.clean, pair.corrupt))
    return float(logits[right] - logits[wrong])


def tensor(x: Any) -> torch.Tensor:
    return x[0] if isinstance(x, tuple) else x


def wrapped(new: torch.Tensor, x: Any) -> Any:
    return (new, *x[1:]) if isinstance(x, tuple) else new


class Naive:
    """The residual stream rebuilt from a llama-like layer's parts, by hooks on the Hugging Face modules."""

    def __init__(self, lvlm: Lvlm, layers: Any) -> None:
        self.lvlm, self.layers = lvlm, layers
        self.kept: dict[tuple[int, str], torch.Tensor] = {}

    def keep(self, example: Example) -> None:
        hooks = []
        for i, layer in enumerate(self.layers):

            def whole(_m: Any, args: Any, kwargs: Any, out: Any, i: int = i) -> None:
                self.kept[i, "resid_pre"] = (args[0] if args else kwargs["hidden_states"]).clone()
                self.kept[i, "resid_post"] = tensor(out).clone()

            def attended(_m: Any, _a: Any, out: Any, i: int = i) -> None:
                self.kept[i, "attn_out"] = tensor(out).clone()

            def mapped(_m: Any, _a: Any, out: Any, i: int = i) -> None:
                self.kept[i, "mlp_out"] = tensor(out).clone()

            hooks.append(layer.register_forward_hook(whole, with_kwargs=True))
            if hasattr(layer, "mlp"):
                hooks += [layer.self_attn.register_forward_hook(attended), layer.mlp.register_forward_hook(mapped)]
        logits_of(self.lvlm, example)
        for hook in hooks:
            hook.remove()
        for i in {i for i, part in self.kept if part == "attn_out"}:
            self.kept[i, "resid_mid"] = self.kept[i, "resid_pre"] + self.kept[i, "attn_out"]

    def patched(self, example: Example, layer: int, part: str, positions: list[int]) -> torch.Tensor:
        """Logits of an example with one part replaced at some positions."""
        new, block = self.kept[layer, part][:, positions], self.layers[layer]
        pre: list[torch.Tensor] = []

        def patch_output(_m: Any, _a: Any, out: Any) -> Any:
            x = tensor(out).clone()
            x[:, positions] = new - pre[0][:, positions] if part == "resid_mid" else new
            return wrapped(x, out)

        def before(_m: Any, args: Any, kwargs: Any) -> Any:
            x = (args[0] if args else kwargs["hidden_states"]).clone()
            pre.append(x)
            if part != "resid_pre":
                return None
            x[:, positions] = new
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        hooks = [block.register_forward_pre_hook(before, with_kwargs=True)]
        paths = {"resid_post": "", "resid_mid": "self_attn", "attn_out": "self_attn", "mlp_out": "mlp"}
        if part in paths:
            hooks.append(block.get_submodule(paths[part]).register_forward_hook(patch_output))
        try:
            return logits_of(self.lvlm, example)
        finally:
            for hook in hooks:
                hook.remove()


def raw(scores: PatchScores, k: int = 0) -> np.ndarray:
    """The metric after each patch, [sites, positions]."""
    gap = scores.clean[k] - scores.corrupt[k]
    effects = scores.effects[k].astype(np.float64)
    return scores.corrupt[k] + gap * (effects if scores.mode == "denoise" else 1 - effects)


@pytest.mark.parametrize("tokens", ["last", "suffix:all", "image:all", "object:all", "positions:40,44"])
def test_every_site_equals_a_whole_forward(tokens: str) -> None:
    lvlm, pair = shared_model(), pairs("color")[0]
    where = lvlm.encode(pair.clean).tokens
    positions = {
        "last": [where.last],
        "suffix:all": list(range(where.image[-1] + 1, where.length)),
        "image:all": list(where.image),
        "object:all": sorted(where.object(pair.clean.subject or "")),
        "positions:40,44": [40, 44],
    }[tokens]
    scores = patch(lvlm, [pair], list(PARTS), tokens=tokens, min_effect=0)
    assert scores.path == "shared prefix"
    assert scores.sites == tuple(f"decoder.L{i}.{p}" for p in PARTS for i in range(lvlm.n_layers))
    loop = Naive(lvlm, layers_of(lvlm))
    loop.keep(pair.clean)
    expected = [
        score(lvlm, loop.patched(pair.corrupt, i, p, positions), pair) for p in PARTS for i in range(lvlm.n_layers)
    ]
    np.testing.assert_allclose(raw(scores)[:, 0], expected, atol=2e-5)
    assert np.ptp(expected) > 1e-2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "paligemma", "gemma3", "llama4", "idefics3"])
def test_image_positions_restart_at_the_layer(family: str) -> None:
    lvlm, pair = model(family), pair_of(0)
    image = sorted(lvlm.encode(pair.clean).tokens.image)
    chosen = [image[0], image[-1]]
    scores = patch(
        lvlm,
        [pair],
        ["resid_pre", "resid_post"],
        tokens="positions:" + ",".join(map(str, chosen)),
        mode="noise",
        min_effect=0,
    )
    assert scores.path == "shared prefix"
    loop = Naive(lvlm, at(lvlm.hf, WHERE[family][0]))
    loop.keep(pair.corrupt)
    expected = [
        score(lvlm, loop.patched(pair.clean, i, p, chosen), pair)
        for p in ("resid_pre", "resid_post")
        for i in range(lvlm.n_layers)
    ]
    np.testing.assert_allclose(raw(scores)[:, 0], expected, atol=1e-5)
    assert np.ptp(expected) > 1e-5


def test_each_position_is_patched_separately_and_aligned_at_the_last() -> None:
    lvlm = shared_model()
    data = [pairs("color")[0], pairs("object")[0]]
    lengths = [lvlm.encode(p.clean).tokens.length - max(lvlm.encode(p.clean).tokens.image) - 1 for p in data]
    assert lengths[0] != lengths[1]
    scores = patch(lvlm, data, ["attn_out", Head(2, 3)], tokens="suffix:each", min_effect=0)
    assert scores.positions[-1] == "0"
    assert scores.effects.shape == (2, lvlm.n_layers + 1, max(lengths))
    short = int(np.argmin(lengths))
    assert np.isnan(scores.effects[short, :, : max(lengths) - min(lengths)]).all()
    for k, pair in enumerate(data):
        loop = Naive(lvlm, layers_of(lvlm))
        loop.keep(pair.clean)
        last = lvlm.encode(pair.clean).tokens.last
        for back in (0, 1, lengths[k] - 1):
            expected = [score(lvlm, loop.patched(pair.corrupt, i, "attn_out", [last - back]), pair) for i in range(3)]
            np.testing.assert_allclose(raw(scores, k)[:3, -1 - back], expected, atol=1e-5)
    frame = scores.frame()
    assert len(frame) == (lvlm.n_layers + 1) * max(lengths)
    assert set(frame["n_pairs"]) == {1, 2}


@cache
def heads_naive(heads: tuple[tuple[int, int], ...]) -> float:
    """Several heads of the clean run at once in the corrupt one, at the last token."""
    lvlm, pair = shared_model(), pairs("color")[0]
    clean_values: dict[int, torch.Tensor] = {}
    modules = [layer.self_attn.o_proj for layer in layers_of(lvlm)]
    hooks = [
        m.register_forward_pre_hook(lambda _m, a, i=i: clean_values.update({i: a[0].clone()}))
        for i, m in enumerate(modules)
    ]
    logits_of(lvlm, pair.clean)
    for hook in hooks:
        hook.remove()
    hooks = []
    for i, h in heads:

        def patch_heads_(_m: Any, args: Any, i: int = i, h: int = h) -> Any:
            z, columns = args[0].clone(), slice(h * lvlm.head_dim, (h + 1) * lvlm.head_dim)
            z[:, -1, columns] = clean_values[i][:, -1, columns]
            return (z,)

        hooks.append(modules[i].register_forward_pre_hook(patch_heads_))
    out = score(lvlm, logits_of(lvlm, pair.corrupt), pair)
    for hook in hooks:
        hook.remove()
    return out


def test_sets_of_heads_are_patched_together() -> None:
    lvlm, pair = shared_model(), pairs("color")[0]
    sets = [HeadSet([Head(1, 2), "L4.H0", Head(1, 5)]), HeadSet([Head(3, 3)])]
    scores = patch(lvlm, [pair], sets, min_effect=0)
    assert scores.sites == ("L1.H2+L1.H5+L4.H0", "L3.H3")
    expected = [heads_naive(tuple((h.layer, h.head) for h in joint)) for joint in sets]
    np.testing.assert_allclose(raw(scores)[:, 0], expected, atol=1e-5)
    joint = patch(lvlm, [pair], Head(3, 3), min_effect=0)
    whole = patch_heads(lvlm, [pair], min_effect=0)
    np.testing.assert_allclose(joint.effects[0, 0, 0], whole.effects[0, 3, 3], atol=1e-4)


# -- metrics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.parametrize("metric", ["probability", "kl"])
def test_other_metrics_are_their_formulas(metric: Any, mode: Any) -> None:
    lvlm, pair = shared_model(), pairs("color")[0]
    scores = patch(lvlm, [pair], ["resid_post"], tokens="last", mode=mode, metric=metric, min_effect=0)
    clean, corrupt = (logits_of(lvlm, e).double() for e in (pair.clean, pair.corrupt))
    ids = [lvlm.processor.tokenizer.convert_tokens_to_ids(a) for a in (pair.clean.answer,)]

    def measure(logits: torch.Tensor) -> float:
        p = logits.double().softmax(-1).numpy()
        q = clean.softmax(-1).numpy()
        return float(p[ids].sum()) if metric == "probability" else -float((q * np.log(q / p)).sum())

    source, target = (pair.clean, pair.corrupt) if mode == "denoise" else (pair.corrupt, pair.clean)
    loop = Naive(lvlm, layers_of(lvlm))
    loop.keep(source)
    last = lvlm.encode(pair.clean).tokens.last
    expected = [measure(loop.patched(target, i, "resid_post", [last])) for i in range(lvlm.n_layers)]
    assert scores.clean[0] == pytest.approx(measure(clean), abs=1e-5)
    assert scores.corrupt[0] == pytest.approx(measure(corrupt), abs=1e-5)
    np.testing.assert_allclose(raw(scores)[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize("family", ["", "gemma3", "paligemma", "qwen2_vl", "mllama", "instructblip_t5", "chameleon"])
def test_the_log_probability_of_a_whole_answer_is_teacher_forced(family: str) -> None:
    lvlm = model(family) if family else shared_model()
    pair = pair_of(0) if family else pairs("color")[0]
    words = "red car"
    pair = replace(pair, clean=replace(pair.clean, answer=words), corrupt=replace(pair.corrupt, answer="red dog"))
    tokens = "last" if family else "suffix:all"
    scores = patch_heads(lvlm, [pair], tokens=tokens, metric="log_probability", min_effect=0)  # pyright: ignore[reportArgumentType]
    ids = [lvlm.processor.tokenizer.convert_tokens_to_ids(w) for w in words.split()]
    for side, value in ((pair.clean, scores.clean[0]), (pair.corrupt, scores.corrupt[0])):
        inputs, total = dict(lvlm.encode(side).inputs), 0.0
        name = "decoder_input_ids" if lvlm.encoder_decoder else "input_ids"
        for token in ids:  # one forward a token
            total += float(lvlm.logits(inputs)[0].double().log_softmax(-1)[token])
            inputs[name] = torch.cat([inputs[name], torch.tensor([[token]])], 1)
            for other in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
                if other in inputs and not lvlm.encoder_decoder:
                    mark = (
                        1 if other == "attention_mask" or (other == "token_type_ids" and family == "paligemma") else 0
                    )
                    inputs[other] = torch.cat([inputs[other], torch.tensor([[mark]])], 1)
            if "cross_attention_mask" in inputs:
                mask = inputs["cross_attention_mask"]
                inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:]], 1)
        assert value == pytest.approx(total, abs=2e-5)
    assert np.isfinite(scores.effects).all()
    assert np.ptp(scores.effects) > 0


def test_whole_answers_are_patched_as_by_whole_forwards() -> None:
    lvlm, pair = shared_model(), pairs("color")[0]
    pair = replace(pair, clean=replace(pair.clean, answer="red car"), corrupt=replace(pair.corrupt, answer="red dog"))
    scores = patch(lvlm, [pair], ["resid_post"], tokens="last", metric="log_probability", min_effect=0)
    ids = [lvlm.processor.tokenizer.convert_tokens_to_ids(w) for w in ("red", "car")]
    last = lvlm.encode(pair.clean).tokens.last
    longer = {}
    for side in (pair.clean, pair.corrupt):
        inputs = dict(lvlm.encode(side).inputs)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        longer[side.image.identity] = inputs
    layers = layers_of(lvlm)
    with torch.no_grad():
        for i in range(lvlm.n_layers):
            clean_values: list[torch.Tensor] = []
            hook = layers[i].register_forward_hook(
                lambda _m, _a, out, clean_values=clean_values: clean_values.append(tensor(out))
            )
            lvlm.hf(**longer[pair.clean.image.identity])
            hook.remove()

            def patch_output(_m: Any, _a: Any, out: Any, clean_values: list[torch.Tensor] = clean_values) -> Any:
                x = tensor(out).clone()
                x[:, last] = clean_values[0][:, last]
                return wrapped(x, out)

            hook = layers[i].register_forward_hook(patch_output)
            log_probabilities = lvlm.hf(**longer[pair.corrupt.image.identity]).logits[0, -3:-1].double().log_softmax(-1)
            hook.remove()
            assert raw(scores)[i, 0] == pytest.approx(
                float(log_probabilities[0, ids[0]] + log_probabilities[1, ids[1]]), abs=2e-5
            )


# -- memory, precision, company ------------------------------------------------------------------------------------------


def test_a_memory_budget_changes_only_rounding_and_its_minimum_is_named() -> None:
    lvlm, data = shared_model(), pairs("color")[:3]
    some = patch_heads(lvlm, data, tokens="suffix:all", min_effect=0)
    with pytest.raises(PatchError, match=r"needs [\d,]+ bytes in addition to the model") as error:
        patch_heads(lvlm, data, tokens="suffix:all", min_effect=0, memory=1000)
    least = int(str(error.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
    few = patch_heads(lvlm, data, tokens="suffix:all", min_effect=0, memory=least)
    gap = np.abs(some.clean - some.corrupt)[:, None, None]
    assert np.abs((some.effects - few.effects) * gap).max() <= 1e-5


def test_pairs_of_a_batch_equal_pairs_alone() -> None:
    lvlm, data = shared_model(), [*pairs("color"), *pairs("object")]
    joint = patch_heads(lvlm, data, tokens="suffix:all", min_effect=0)
    alone = [patch_heads(lvlm, [p], tokens="suffix:all", min_effect=0) for p in data]
    gap = np.abs(joint.clean - joint.corrupt)[:, None, None]
    assert np.abs((joint.effects - np.concatenate([a.effects for a in alone])) * gap).max() <= 1e-5


def test_half_precision() -> None:
    lvlm, pair = random_model(), pairs("color")[0]
    exact = patch_heads(lvlm, [pair], tokens="suffix:all", min_effect=0)
    lvlm.hf.to(torch.bfloat16)
    rough = patch_heads(lvlm, [pair], tokens="suffix:all", min_effect=0)
    assert rough.provenance["path"] == "shared prefix"
    assert abs(rough.clean[0] - exact.clean[0]) < 0.1 * abs(exact.clean[0]) + 0.1
    assert np.corrcoef(rough.effects.ravel(), exact.effects.ravel())[0, 1] > 0.95


def test_the_attention_implementation_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    lvlm, before = shared_model(), set(ALL_ATTENTION_FUNCTIONS)
    kinds = {m.config._attn_implementation for m in lvlm.hf.modules() if hasattr(m, "config")}
    patch_heads(lvlm, pairs("color")[:1], min_effect=0)

    def fail(*_args: object) -> None:
        msg = "on purpose"
        raise RuntimeError(msg)

    monkeypatch.setattr(layers_of(lvlm)[3].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        patch_heads(lvlm, pairs("color")[:1], min_effect=0)
    assert set(ALL_ATTENTION_FUNCTIONS) == before
    assert {m.config._attn_implementation for m in lvlm.hf.modules() if hasattr(m, "config")} == kinds


def test_an_encoder_decoder_reports_full_forwards(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "circuits.execution.patch_runner"):
        scores = patch(model("florence2"), [pair_of(0)], "z", min_effect=0)
    assert scores.path == "whole forwards"
    assert "because an encoder reads the prompt" in caplog.text
    assert len(caplog.records) == 1


def test_loaded_scores_equal_the_saved_ones(tmp_path: Path) -> None:
    scores = patch(shared_model(), pairs("color")[:3], "mlp_out", min_effect=0)
    loaded = PatchScores.load(scores.save(tmp_path / "s.safetensors"))
    assert repr(loaded) == repr(scores)
    np.testing.assert_array_equal(loaded.effects, scores.effects)
    assert (loaded.sites, loaded.ids, loaded.excluded) == (scores.sites, scores.ids, scores.excluded)


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": "positions:999"}, PatchError, "999"),
        ({"tokens": "suffix:mean"}, SiteError, "'suffix:mean' is not supported here; choose from last"),
        ({"tokens": "suffix"}, SiteError, r"has several readings: 'suffix:all' \(every one of them\), 'suffix:each'"),
        ({"tokens": "12,13"}, SiteError, "write 'positions:12,13'"),
        ({"sites": "decoder.L9.z"}, SiteError, "layers 0-5"),
        ({"sites": "pattern"}, SiteError, "is not a site"),
        ({"sites": "decoder.L1.q"}, SiteError, "cannot be patched at prompt tokens"),
        ({"sites": "vision.L0.z"}, SiteError, "cannot be patched at prompt tokens"),
        ({"sites": Head(1, 9)}, SiteError, "heads 0-7"),
        ({"sites": []}, SiteError, "sites is empty"),
        ({"metric": "bleu"}, ConfigError, "choose from logit_difference"),
        ({"mode": "both"}, ConfigError, "unknown mode 'both'"),
        ({"memory": 0}, ConfigError, "at least 1"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patch(shared_model(), pairs("color")[:1], **options)


def test_pairs_left_out_are_counted_in_units_of_the_metric() -> None:
    data = pairs("color")
    same = replace(data[0], corrupt=replace(data[0].corrupt, image=data[0].clean.image))
    scores = patch(shared_model(), [*data, same], "resid_post", metric="kl", min_effect=1e-6)
    assert scores.excluded == 1
    assert set(scores.frame()["excluded"]) == {1}
    with pytest.raises(PatchError, match="below min_effect=100"):
        patch(shared_model(), data, "resid_post", metric="kl", min_effect=100)
