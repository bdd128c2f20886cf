"""Answers by a naive loop of whole, uncached forwards that also hands over the residual streams, by plain torch hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvlm import Lvlm
from tests.toys.families import L, at


@dataclass(frozen=True)
class Pass:
    """One whole forward over a prompt and its answer so far."""

    logits: Tensor
    """``[V]`` at the last position."""
    streams: Sequence[Tensor]
    """``[T, D]``: what the first block reads, then the output of each block."""
    tokens: Tensor
    """``[T]``."""


Rule = Callable[[int, Pass], Tensor]


def norm_and_head(lvlm: Lvlm) -> tuple[Any, Any]:
    return lvlm.hf.model.language_model.norm, lvlm.hf.lm_head


@torch.no_grad()
def whole_pass(lvlm: Lvlm, inputs: Mapping[str, Any]) -> Pass:
    streams: list[Tensor] = []
    layers = at(lvlm.hf, L)

    def before(_m: Any, args: Any, kwargs: Any) -> None:
        streams.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    def after(_m: Any, _a: Any, out: Any) -> None:
        streams.append((out[0] if isinstance(out, tuple) else out)[0].clone())

    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        logits = lvlm.hf(**inputs, use_cache=False).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()
    return Pass(logits, streams, inputs["input_ids"][0])


def doubled(lvlm: Lvlm, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def appended(inputs: Mapping[str, Tensor], token: int) -> dict[str, Tensor]:
    row = dict(inputs)
    row["input_ids"] = torch.cat([row["input_ids"], torch.tensor([[token]])], 1)
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in row:
            row[name] = torch.cat([row[name], torch.zeros_like(row[name][:, :1])], 1)
    return row


@torch.no_grad()
def naive_answer(
    lvlm: Lvlm,
    inputs: Mapping[str, Tensor],
    rule: Rule,
    steps: int,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[list[int], list[Tensor]]:
    """Continue one prompt greedily; return its tokens and the rule's logits at each step."""
    row, tokens, scores = doubled(lvlm, inputs), [], []
    for step in range(steps):
        with context():
            scores.append(rule(step, whole_pass(lvlm, row)))
        tokens.append(int(scores[-1].argmax()))
        row = appended(row, tokens[-1])
    return tokens, scores
