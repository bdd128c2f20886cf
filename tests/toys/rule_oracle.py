"""A method's rule for logits against the written formula with whole uncached forwards in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lvlm import Lvlm
from mitigation.training_free.branch_methods import BranchMethod
from tests.toys.decoding_oracle import naive_steps
from tests.toys.exact_decoding import assert_exact

STEPS = 4


def doubled(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def compare(
    method: BranchMethod,
    family: str,
    branches: Callable[[Lvlm, Any, dict[str, Tensor]], Sequence[Mapping[str, Tensor]]],
    rule: Callable[[int, Sequence[Tensor]], Tensor],
    *,
    weight: float = 1.0,
) -> None:
    """Compare tokens and logits of a batch of two rows with the written rule, row by row; `weight` is that of the contrast."""

    def write(lvlm: Lvlm, question: Any, plain: dict[str, Tensor]) -> tuple[list[int], list[Tensor]]:
        return naive_steps(lvlm, [plain, *branches(lvlm, question, plain)], rule, STEPS)

    assert_exact(family, method, write, STEPS, weight=weight)


def masked(scores: Tensor, main: Tensor, beta: float) -> Tensor:
    """Minus infinity where the probability is below a share of the largest."""
    p = main.exp() / main.exp().sum()
    return torch.where(p < beta * p.max(), -math.inf, scores)
