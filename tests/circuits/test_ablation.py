"""Ablation against plain torch hooks, one example at a time, and on circuits that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from circuits import HeadSet, ablate
from circuits.ablation import Method
from concepts.schema import Example
from groundscope.core.errors import ConfigError, PatchError, SiteError
from groundscope.testing import planted_circuits
from lvlm import Head
from lvlm.model import Lvlm
from tests.toys.random_models import examples, hooks_of, layers_of, shared_model

SETS = [Head(1, 3), HeadSet([Head(0, 0), Head(4, 7), Head(4, 2)])]


def margin(logits: torch.Tensor, model: Lvlm, example: Example) -> float:
    ids = {c: model.processor.tokenizer.convert_tokens_to_ids(c) for c in example.candidates}
    others = [float(logits[i]) for c, i in ids.items() if c != example.answer]
    return float(logits[ids[example.answer]]) - max(others)


@torch.no_grad()
def outputs(model: Lvlm, example: Example) -> list[torch.Tensor]:
    head_outputs: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: head_outputs.append(args[0][0].clone()))
        for layer in layers_of(model)
    ]
    model.hf(**model.encode(example).inputs)
    for hook in hooks:
        hook.remove()
    return head_outputs


def spots(model: Lvlm, example: Example, tokens: str) -> list[int]:
    ids = model.encode(example).inputs["input_ids"][0].tolist()
    image = [i for i, t in enumerate(ids) if t == model.processor.tokenizer.convert_tokens_to_ids("<image>")]
    every = list(range(len(ids)))
    return {"last": every[-1:], "suffix:all": every[image[-1] + 1 :], "image:all": image, "all": every}[tokens]


@torch.no_grad()
def naive(model: Lvlm, example: Example, heads: Sequence[Head], values: list[torch.Tensor], tokens: str) -> float:
    """Run with each head's columns set at some positions; `values` are ``[n, width]`` for each layer."""
    hooks = []
    at, dim = spots(model, example, tokens), model.head_dim
    for i, layer in enumerate(layers_of(model)):
        mine = [h.head for h in heads if h.layer == i]

        def replace_heads(
            _m: object, args: tuple[torch.Tensor], i: int = i, mine: list[int] = mine
        ) -> tuple[torch.Tensor]:
            z = args[0].clone()
            for h in mine:
                for k, position in enumerate(at):
                    z[0, position, h * dim : (h + 1) * dim] = values[i][k, h * dim : (h + 1) * dim]
            return (z,)

        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(replace_heads))
    logits = model.hf(**model.encode(example).inputs).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return margin(logits, model, example)


@pytest.mark.parametrize("tokens", ["last", "suffix:all", "image:all", "all"])
@pytest.mark.parametrize("method", ["zero", "mean"])
def test_ablated_margins_equal_plain_hooks(method: Method, tokens: str) -> None:
    model, data, reference = shared_model(), examples(4), examples()[2:7]
    ablation = ablate(model, data, SETS, method=method, tokens=tokens, reference=reference, batch_size=3)
    collected = [[z[spots(model, e, tokens)] for z in outputs(model, e)] for e in reference]
    mean = [torch.cat([example[i] for example in collected]).double().mean(0).float() for i in range(model.n_layers)]
    for n, example in enumerate(data):
        count = len(spots(model, example, tokens))
        values = [(m if method == "mean" else 0 * m).expand(count, -1) for m in mean]
        assert ablation.margins[n] == pytest.approx(naive(model, example, [], values, tokens), abs=1e-5)
        for s, heads in enumerate(ablation.heads):
            assert ablation.ablated[n, s] == pytest.approx(naive(model, example, heads, values, tokens), abs=1e-5)
    assert np.abs(ablation.effects).max() > 1e-3
    assert ablation.heads == (HeadSet("L1.H3"), SETS[1])
    assert hooks_of(model) == 0


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_resampling_takes_another_groups_output(tokens: str) -> None:
    model, data = shared_model(), examples()
    ablation = ablate(model, data, SETS, method="resample", tokens=tokens, seed=3)
    for n, example in enumerate(data[:3]):
        possible = []
        for other in data:
            same = tokens == "last" or len(spots(model, other, tokens)) == len(spots(model, example, tokens))
            if other.group != example.group and same:
                values = [z[spots(model, other, tokens)] for z in outputs(model, other)]
                possible.append([naive(model, example, heads, values, tokens) for heads in ablation.heads])
        nearest = np.abs(np.array(possible) - ablation.ablated[n]).max(axis=1).min()
        assert nearest < 1e-5, "one donor explains all sets"
        own = [z[spots(model, example, tokens)] for z in outputs(model, example)]
        assert naive(model, example, ablation.heads[1], own, tokens) == pytest.approx(
            float(ablation.margins[n]), abs=1e-5
        )
    repeated = ablate(model, data, SETS, method="resample", tokens=tokens, seed=3, batch_size=2)
    np.testing.assert_allclose(repeated.ablated, ablation.ablated, atol=1e-5)
    assert (
        np.abs(ablate(model, data, SETS, method="resample", tokens=tokens, seed=4).ablated - ablation.ablated).max()
        > 1e-4
    )


def test_sweeps_cover_every_head_and_layer() -> None:
    model = shared_model()
    heads, layers = (ablate(model, examples(2), kind, method="zero") for kind in ("each", "layers"))
    assert [h for (h,) in heads.heads] == [Head(i, h) for i in range(6) for h in range(8)]
    assert [{h.layer for h in s} for s in layers.heads] == [{i} for i in range(6)]
    assert {len(s) for s in layers.heads} == {8}


@pytest.mark.parametrize("method", ["zero", "mean"])
@pytest.mark.parametrize("backups", [1, 2])
def test_backups_show_in_joint_but_not_in_single_ablation(method: Method, backups: int) -> None:
    for seed in range(6):
        p = planted_circuits.plant(seed, backups=backups)
        assert p.grounding is not None
        balanced = [e for pair in p.pairs(4) for e in (pair.clean, pair.corrupt)]
        chain = [p.grounding, *p.backups]
        sets = [*chain, HeadSet(chain[:-1]), HeadSet(chain)]
        effects = ablate(p.model, balanced, sets, method=method).effects.mean(0)
        # 6 is what the picture says, in logits.
        np.testing.assert_allclose(effects[:-1], 0, atol=0.1)
        assert effects[-1] == pytest.approx(6, abs=0.2)


def test_ablation_of_the_prior_head_raises_margins_on_conflicts() -> None:
    p = planted_circuits.plant(2)
    assert p.prior is not None
    data = p.examples(20)
    effects = ablate(p.model, data, [p.prior], method="zero").effects[:, 0]
    for example, effect in zip(data, effects, strict=True):
        assert effect == pytest.approx({"neutral": 0, "typical": 3, "conflict": -3}[example.split], abs=0.1)


def test_effects_are_averaged_by_group() -> None:
    p = planted_circuits.plant(5)
    assert p.grounding is not None
    data = [replace(e, group=f"g{i // 3}") for i, e in enumerate(p.examples(30))]
    ablation = ablate(p.model, data, [p.grounding, p.decoys[0]], method="zero")
    frame = ablation.frame()
    assert list(frame["name"]) == [str(p.grounding), str(p.decoys[0])]
    np.testing.assert_allclose(frame["effect"], ablation.effects.mean(0), rtol=1e-6)
    assert (frame["effect_low"] <= frame["effect"]).all()
    assert (frame["effect"] <= frame["effect_high"]).all()
    assert frame["lost"][1] == 0 < frame["lost"][0]
    np.testing.assert_allclose(frame["accuracy"] + frame["lost"], ablation.right.mean())
    values = ablation.effects[:, 0].astype(np.float64)
    means = [values[3 * i : 3 * i + 3].mean() for i in range(10)]
    t = stats.t.interval(0.95, 9, np.mean(means), stats.sem(means))
    assert frame["effect_high"][0] - frame["effect_low"][0] == pytest.approx(t[1] - t[0], rel=0.35)
    some = ablation.select(np.array([e.split == "conflict" for e in data]))
    assert len(some.ids) == sum(e.split == "conflict" for e in data) == len(some.ablated)


def test_invalid_options_and_heads_are_refused() -> None:
    model, data = shared_model(), examples(2)
    for options in ({"method": "noise"}, {"batch_size": 0}, {"memory": 0}):
        with pytest.raises(ConfigError):
            ablate(model, data, **options)
    with pytest.raises(SiteError, match="unknown token selection 'image'; write 'image:all'"):
        ablate(model, data, tokens="image")
    with pytest.raises(SiteError, match=r"L9\.H0: random has 6 layers"):
        ablate(model, data, [Head(9, 0)])
    with pytest.raises(PatchError, match="heads is empty"):
        ablate(model, data, [])
    for joint in ([[Head(0, 0), Head(1, 1)]], [("L0.H0", "L1.H1")], [{Head(0, 0)}]):
        with pytest.raises(SiteError, match=r"HeadSet\(\[…\]\) for heads that are patched together"):
            ablate(model, data, joint)  # pyright: ignore[reportArgumentType]  # a user's mistake
    with pytest.raises(SiteError, match="empty set of heads"):
        HeadSet([])
    with pytest.raises(PatchError, match="examples is empty"):
        ablate(model, [])
    with pytest.raises(PatchError, match="reference is empty"):
        ablate(model, data, reference=[])
    with pytest.raises(PatchError, match="no reference example of another group"):
        ablate(model, data[:1], method="resample")
