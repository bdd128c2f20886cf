"""Patching against the one-forward-a-head loop written with plain torch hooks, and what it must refuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuits import patch_heads
from circuits.execution.prefix_attention import Prefix, SharedAttention
from circuits.patching.activation import pairs_digest
from concepts.counterfactual_pair import CounterfactualPair
from concepts.schema import Example
from groundscope.core.errors import ConfigError, PatchError
from lvlm.model import Lvlm
from tests.toys.random_models import hooks_of, layers_of, pairs, random_model, shared_model

LEAST = 0.02


def difference(model: Lvlm, logits: torch.Tensor, pair: CounterfactualPair) -> float:
    """Log-odds of the two answers; the toy tokenizer has one token for each."""
    right, wrong = (model.processor.tokenizer.convert_tokens_to_ids(e.answer) for e in (pair.clean, pair.corrupt))
    return float(logits[right] - logits[wrong])


@torch.no_grad()
def plain(model: Lvlm, example: Example) -> torch.Tensor:
    return model.hf(**model.encode(example).inputs).logits[0, -1]


@torch.no_grad()
def naive(model: Lvlm, pair: CounterfactualPair, first: int, mode: str) -> np.ndarray:
    """Log-odds after each single patch: one full forward a head, float64 ``[layers, heads]``."""
    source, target = (pair.clean, pair.corrupt) if mode == "denoise" else (pair.corrupt, pair.clean)
    clean_values: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: clean_values.append(args[0].clone()))
        for layer in layers_of(model)
    ]
    plain(model, source)
    for hook in hooks:
        hook.remove()
    out = np.zeros((model.n_layers, model.n_heads))
    dim = model.head_dim
    for i, layer in enumerate(layers_of(model)):
        for h in range(model.n_heads):

            def patch(_module: object, args: tuple[torch.Tensor], i: int = i, h: int = h) -> tuple[torch.Tensor]:
                z = args[0].clone()
                z[:, first:, h * dim : (h + 1) * dim] = clean_values[i][:, first:, h * dim : (h + 1) * dim]
                return (z,)

            hook = layer.self_attn.o_proj.register_forward_pre_hook(patch)
            out[i, h] = difference(model, plain(model, target), pair)
            hook.remove()
    return out


@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.parametrize("tokens", ["last", "suffix:all"])
def test_equals_one_forward_a_head(tokens: str, mode: str) -> None:
    model = shared_model()
    data = [*pairs("color"), *pairs("object")]
    scores = patch_heads(model, data, tokens=tokens, mode=mode, min_effect=LEAST)  # pyright: ignore[reportArgumentType]  # any
    by_id = {p.clean.id: p for p in data}
    assert scores.n_pairs >= 4
    assert len({model.encode(by_id[i].clean).tokens.length for i in scores.ids}) > 1
    for k in (0, scores.n_pairs - 1):
        pair = by_id[scores.ids[k]]
        positions = model.encode(pair.clean).tokens
        first = positions.last if tokens == "last" else positions.image[-1] + 1
        clean, corrupt = (difference(model, plain(model, e), pair) for e in (pair.clean, pair.corrupt))
        assert scores.clean[k] == pytest.approx(clean, abs=1e-5)
        assert scores.corrupt[k] == pytest.approx(corrupt, abs=1e-5)
        patched = naive(model, pair, first, mode)
        expected = (patched - corrupt) / (clean - corrupt)
        ours = scores.patching_effect[k] * (clean - corrupt) + corrupt
        assert np.abs(ours - patched).max() <= 1e-5
        assert np.abs(patched - (corrupt if mode == "denoise" else clean)).max() > 1e-3
        zero_based = expected if mode == "denoise" else 1 - expected
        np.testing.assert_allclose(scores.effects[k], zero_based, atol=2e-5 / abs(clean - corrupt))


def test_the_batch_size_changes_only_rounding() -> None:
    model, data = shared_model(), pairs("color")
    some = patch_heads(model, data, tokens="suffix:all", min_effect=LEAST)
    few = patch_heads(model, data, tokens="suffix:all", min_effect=LEAST, batch_size=7)
    assert some.ids == few.ids
    gap = np.abs(some.clean - some.corrupt)[:, None, None]
    assert np.abs((some.effects - few.effects) * gap).max() <= 1e-5


def test_eager_attention_gives_the_same() -> None:
    fused, eager = shared_model(), random_model()
    eager.hf.set_attn_implementation("eager")
    for tokens in ("last", "suffix:all"):
        a, b = (patch_heads(m, pairs("color")[:3], tokens=tokens, min_effect=LEAST) for m in (fused, eager))
        gap = np.abs(a.clean - a.corrupt)[:, None, None]
        assert np.abs((a.effects - b.effects) * gap).max() <= 1e-5


def test_only_the_head_that_reaches_the_residual_stream_has_an_effect() -> None:
    model = random_model(seed=3)
    chosen, other = (2, 5), []
    with torch.no_grad():
        for i, layer in enumerate(layers_of(model)):
            for h in range(model.n_heads):
                if (i, h) != chosen:
                    layer.self_attn.o_proj.weight[:, h * model.head_dim : (h + 1) * model.head_dim] = 0
                    other.append((i, h))
    scores = patch_heads(model, pairs("color"), min_effect=1e-4)
    # Nothing else moves between positions: the last token's only news of the image is this head's.
    np.testing.assert_allclose(scores.effects[:, *chosen], 1, atol=1e-2)
    assert max(np.abs(scores.effects[:, i, h]).max() for i, h in other) < 1e-2
    assert scores.top(1)[0] == type(scores.top(1)[0])(*chosen)


def test_pairs_without_a_difference_are_left_out_and_counted() -> None:
    model, data = shared_model(), list(pairs("color"))
    same = replace(data[0], corrupt=replace(data[0].corrupt, image=data[0].clean.image))
    scores = patch_heads(model, [*data, same], min_effect=LEAST)
    without = patch_heads(model, data, min_effect=LEAST)
    assert scores.excluded == without.excluded + 1
    assert scores.ids == without.ids
    assert scores.n_pairs + scores.excluded == len(data) + 1


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_identical_images_have_no_effect_at_all(mode: str) -> None:
    data = pairs("color")
    same = [replace(p, corrupt=replace(p.corrupt, image=p.clean.image)) for p in data]
    with pytest.raises(PatchError, match=rf"{len(same)} of {len(same)} pairs .* min_effect=0\.5"):
        patch_heads(shared_model(), same)
    zero = patch_heads(shared_model(), [*data, *same], mode=mode, min_effect=0)  # pyright: ignore[reportArgumentType]
    assert zero.excluded == 0
    assert np.array_equal(zero.effects[len(data) :], np.zeros_like(zero.effects[len(data) :]))
    assert np.abs(zero.effects[: len(data)]).max() > 0.01


def test_most_pairs_under_the_threshold_is_an_error() -> None:
    with pytest.raises(PatchError, match=r"of \d+ pairs .* min_effect=1000"):
        patch_heads(shared_model(), pairs("color"), min_effect=1000)


def test_leaves_no_trace() -> None:
    model = shared_model()
    before = {name: p.clone() for name, p in model.hf.state_dict().items()}
    logits = plain(model, pairs("color")[0].clean)
    patch_heads(model, pairs("color"), min_effect=LEAST)
    with pytest.raises(PatchError):
        patch_heads(model, pairs("color"), min_effect=1000)
    assert hooks_of(model) == 0
    assert all(torch.equal(p, before[name]) for name, p in model.hf.state_dict().items())
    assert torch.equal(plain(model, pairs("color")[0].clean), logits)


def test_results_record_model_pairs_and_options() -> None:
    model, data = shared_model(), pairs("color")
    scores = patch_heads(model, data, min_effect=LEAST)
    assert (scores.model, scores.config_hash, scores.weights_hash) == (
        "random",
        model.config_hash,
        model.weights_hash,
    )
    assert scores.pairs_digest == pairs_digest(data) != pairs_digest(data[1:])
    assert (scores.tokens, scores.mode, scores.min_effect) == ("last", "denoise", LEAST)
    assert set(scores.levels) == {"attribute"}
    assert set(scores.kinds) == {"color"}
    assert scores.shape == (model.n_layers, model.n_heads)


def test_pairs_of_unlike_length_name_the_first_differing_token() -> None:
    pair = pairs("color")[0]
    assert pair.clean.question == "What color is the apple?"
    longer = replace(pair, corrupt=replace(pair.corrupt, question="What color is the big apple?"))
    with pytest.raises(PatchError, match=r"position \d+, 'apple' and 'big'"):
        patch_heads(shared_model(), [pair, longer])
    shorter = replace(pair, corrupt=replace(pair.corrupt, question="What color is"))
    with pytest.raises(PatchError, match="first differ at position"):
        patch_heads(shared_model(), [shorter])


@pytest.mark.parametrize(
    ("answer", "message"),
    [("red", "the same answer"), ("red car", "same token"), ("mauve", "is unknown to the tokenizer")],
)
def test_answers_with_one_first_token_are_refused(answer: str, message: str) -> None:
    pair = pairs("color")[0]
    clean = replace(pair.clean, answer="red", candidates=("red", answer))
    wrong = CounterfactualPair(clean, replace(pair.corrupt, answer=answer), "color", "by hand")
    with pytest.raises(PatchError, match=message):
        patch_heads(shared_model(), [wrong])


def test_no_pairs() -> None:
    with pytest.raises(PatchError, match="pairs is empty"):
        patch_heads(shared_model(), [])


def test_a_model_in_training_mode() -> None:
    model = random_model()
    layers_of(model)[1].train()
    with pytest.raises(PatchError, match="training mode"):
        patch_heads(model, pairs("color"))


def test_attention_that_drops_outside_of_training() -> None:
    keys = torch.randn(1, 2, 3, 4)
    attention = SharedAttention()
    attention.prefix = Prefix(keys, keys, None, cross=False)
    new = torch.randn(1, 2, 1, 4)
    with pytest.raises(PatchError, match=r"applies attention dropout 0.1"):
        attention(torch.nn.Identity(), new, new, new, dropout=0.1)


@pytest.mark.parametrize(
    "options",
    [{"mode": "both"}, {"batch_size": 0}, {"min_effect": -1.0}, {"min_effect": float("nan")}],
)
def test_options_that_do_not_exist(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        patch_heads(shared_model(), pairs("color"), **options)  # pyright: ignore[reportArgumentType]  # a user's mistake


@pytest.mark.parametrize("tokens", ["last", "suffix:all"])
def test_a_family_that_acts_between_layers_is_run_whole(tokens: str, caplog: pytest.LogCaptureFixture) -> None:
    model, pair = random_model(), pairs("color")[0]
    # As in DeepStack: a term is added between two layers, outside of any layer.
    # Only a run over the whole sequence sees it, as DeepStack sees the image's positions.
    layers_of(model)[2].register_forward_pre_hook(
        lambda _module, args: (args[0] + 1.0, *args[1:]) if args[0].shape[1] > 49 else None
    )
    scores = patch_heads(model, [pair], tokens=tokens, min_effect=0)  # pyright: ignore[reportArgumentType]  # any
    assert (
        "every patch runs as a full forward pass, because its decoder layers, run one by one, do not reproduce"
        in caplog.text
    )
    assert scores.provenance["path"] == "whole forwards"
    positions = model.encode(pair.clean).tokens
    first = positions.last if tokens == "last" else positions.image[-1] + 1
    ours = scores.patching_effect[0] * (scores.clean[0] - scores.corrupt[0]) + scores.corrupt[0]
    assert np.abs(ours - naive(model, pair, first, "denoise")).max() <= 1e-5
