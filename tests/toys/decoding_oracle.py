"""Answers by a naive loop: at each step one whole, uncached forward per prompt and branch, and a rule on their logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lvlm import Lvlm
from tests.toys.edge_oracle import double

Rule = Callable[[int, Sequence[Tensor]], Tensor]
"""From the number of the step and the logits ``[V]`` of prompt and branches to the logits of the next token."""


@cache
def double_model(family: str) -> Lvlm:
    """A toy family in float64; its norms and rotary embeddings are float32 inside, so results agree to about 1e-5."""
    return double(family)


def naive_steps(
    model: Lvlm, inputs: Sequence[Mapping[str, Any]], rule: Rule, steps: int, context: Sequence[Any] = ()
) -> tuple[list[int], list[Tensor]]:
    """Continue one prompt and its branches (inputs of one row each); return the tokens and the rule's logits at each step.

    Parameters
    ----------
    model
        The model, of a family whose decoder reads the prompt.
    inputs
        Inputs of the prompt, then of each branch.
    rule
        The written formula.
    steps
        Number of tokens.
    context
        A function for each of `inputs` that opens changes of the model for its forward passes; none by default.
    """
    rows = [dict(row) for row in inputs]
    tokens: list[int] = []
    scores: list[Tensor] = []
    for step in range(steps):
        logits = []
        for number, row in enumerate(rows):
            opened = context[number]() if context else torch.no_grad()
            with torch.no_grad(), opened:
                logits.append(model.hf(**row, use_cache=False).logits[0, -1])
        scores.append(rule(step, logits))
        token = int(scores[-1].argmax())
        tokens.append(token)
        for row in rows:
            row["input_ids"] = torch.cat([row["input_ids"], torch.tensor([[token]])], 1)
            row["attention_mask"] = torch.ones_like(row["input_ids"])
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in row:
                    row[name] = torch.cat([row[name], torch.zeros_like(row[name][:, :1])], 1)
    return tokens, scores


def text_only(model: Lvlm, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of one row without its image tokens and pixels, by the id of the image token."""
    ids = inputs["input_ids"][inputs["input_ids"] != model.content_id][None]
    zeros = {n: torch.zeros_like(ids) for n in ("mm_token_type_ids", "token_type_ids") if n in inputs}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **zeros}
