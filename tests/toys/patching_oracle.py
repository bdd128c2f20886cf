"""Counterfactual pairs for every family, and head patching by one whole forward a head with plain torch hooks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from concepts.counterfactual_pair import CounterfactualPair
from lvlm import Lvlm
from tests.toys.examples import example
from tests.toys.families import WHERE, at


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
    clean_inputs: dict[int, torch.Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _m, a, i=i: clean_inputs.update({i: a[0].clone()}))
        for i, m in enumerate(modules)
    ]
    lvlm.logits(lvlm.encode(pair.clean).inputs)
    for hook in hooks:
        hook.remove()
    out = []
    for i, module in enumerate(modules):
        for h in range(lvlm.n_heads):

            def patch(_m: Any, args: Any, i: int = i, h: int = h) -> Any:
                z, w = args[0].clone(), args[0].shape[-1] // lvlm.n_heads
                z[:, first:, h * w : (h + 1) * w] = clean_inputs[i][:, first:, h * w : (h + 1) * w]
                return (z, *args[1:])

            hook = module.register_forward_pre_hook(patch)
            out.append(lvlm.logits(lvlm.encode(pair.corrupt).inputs)[0])
            hook.remove()
    return torch.stack(out).unflatten(0, (len(modules), -1))
