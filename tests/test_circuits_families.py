"""Patches of every family against the loop of one whole forward a patch, written with plain torch hooks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from family_toys import BUILDERS
from stand_ins import STAND_INS, build_stand_in
from test_lvlm_families import WHERE, at, example, model

from circuits import patch_heads
from concepts.schema import CounterfactualPair
from lvlm import Lvlm, wrap_lvlm

WHOLE = {"instructblip_t5", "florence2"}
"""Families that are patched by whole forwards: an encoder reads their prompt."""


def pair_of(number: int = 0) -> CounterfactualPair:
    """The same question about two images."""
    clean = example(number)
    other = "no" if clean.answer == "yes" else "yes"
    return CounterfactualPair(
        clean, replace(clean, image=example(number + 1).image, answer=other), "image", "another image"
    )


def projections(lvlm: Lvlm, family: str) -> list[Any]:
    """The modules whose inputs are head outputs, found by path."""
    decoder, path, *_ = WHERE[family]
    layers = list(at(lvlm.hf, decoder))
    return [
        at(x, path) if hasattr(x, path.split(".")[0]) or family != "mllama" else x.cross_attn.o_proj for x in layers
    ]


@torch.no_grad()
def naive(lvlm: Lvlm, modules: list[Any], pair: CounterfactualPair, first: int) -> torch.Tensor:
    """Logits at the last position after each head of the clean run is put into the corrupt one, [layers, heads, V]."""
    kept: dict[int, torch.Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _m, a, i=i: kept.update({i: a[0].clone()})) for i, m in enumerate(modules)
    ]
    lvlm.logits(lvlm.encode(pair.clean).inputs)
    for hook in hooks:
        hook.remove()
    out = []
    for i, module in enumerate(modules):
        for h in range(lvlm.n_heads):

            def patch(_m: Any, args: Any, i: int = i, h: int = h) -> Any:
                z, w = args[0].clone(), args[0].shape[-1] // lvlm.n_heads
                z[:, first:, h * w : (h + 1) * w] = kept[i][:, first:, h * w : (h + 1) * w]
                return (z, *args[1:])

            hook = module.register_forward_pre_hook(patch)
            out.append(lvlm.logits(lvlm.encode(pair.corrupt).inputs)[0])
            hook.remove()
    return torch.stack(out).unflatten(0, (len(modules), -1))


def check(lvlm: Lvlm, modules: list[Any], tokens: Any, whole: bool) -> None:
    given = [pair_of(0), pair_of(2)]
    scores = patch_heads(lvlm, given, tokens, min_effect=0)
    assert scores.provenance["path"] == ("whole forwards" if whole else "shared prefix")
    moved = 0.0
    for k, pair in enumerate(given):
        positions = lvlm.encode(pair.clean).tokens
        first = positions.last if tokens == "last" else max(positions.image, default=-1) + 1
        patched = naive(lvlm, modules, pair, first)
        right, wrong = (lvlm.processor.tokenizer.convert_tokens_to_ids(e.answer) for e in (pair.clean, pair.corrupt))
        logits = [lvlm.logits(lvlm.encode(e).inputs)[0] for e in (pair.clean, pair.corrupt)]
        clean, corrupt = (float(x[right] - x[wrong]) for x in logits)
        ours = scores.effects[k] * (scores.clean[k] - scores.corrupt[k]) + scores.corrupt[k]
        expected = (patched[..., right] - patched[..., wrong]).numpy()
        assert scores.clean[k] == pytest.approx(clean, abs=1e-5)
        assert scores.corrupt[k] == pytest.approx(corrupt, abs=1e-5)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
        moved = max(moved, float(np.abs(expected - corrupt).max()))
    assert moved > 1e-4


@pytest.mark.parametrize("tokens", ["last", "suffix"])
@pytest.mark.parametrize("family", list(BUILDERS))
def test_equals_one_forward_a_head(family: str, tokens: str) -> None:
    lvlm = model(family)
    check(lvlm, projections(lvlm, family), tokens, family in WHOLE)


@pytest.mark.parametrize("family", list(STAND_INS))
def test_families_with_code_of_their_own(family: str) -> None:
    lvlm = wrap_lvlm(*build_stand_in(family), name=family, validate=False)
    modules = [lvlm.output_projection("decoder", i) for i in range(lvlm.n_layers)]
    check(lvlm, modules, "suffix", whole=True)
