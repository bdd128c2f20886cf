"""A method's rule for logits against the written formula with whole uncached forwards in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lvlm import Lvlm
from lvlm.decoding.decoder import Step
from lvlm.decoding.loop import generate
from mitigation.training_free.branch_methods import BranchMethod, BranchRule
from tests.toys.decoding_oracle import double_model, naive_steps
from tests.toys.examples import example

STEPS = 4


class Recorded(BranchRule):
    """The rule of a method, with the logits that it returned."""

    def __init__(self, method: BranchMethod, lvlm: Lvlm, batch: Any) -> None:
        super().__init__(method, lvlm, batch)
        self.scores: list[Tensor] = []

    def combine(self, step: Step) -> Tensor:
        self.scores.append(super().combine(step))
        return self.scores[-1]


def doubled(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def compare(
    method: BranchMethod,
    family: str,
    branches: Callable[[Lvlm, Any, dict[str, Tensor]], Sequence[Mapping[str, Tensor]]],
    rule: Callable[[int, Sequence[Tensor]], Tensor],
) -> None:
    """Compare tokens and logits of a batch of two rows with the written rule, row by row."""
    lvlm = double_model(family)
    batch = next(lvlm.batches([example(0), example(1)], 2))
    ours = Recorded(method, lvlm, batch)
    answers = generate(lvlm, batch, ours, STEPS, ends=False)
    for row, encoding in enumerate(batch.encodings):
        plain = doubled(encoding.inputs)
        tokens, scores = naive_steps(lvlm, [plain, *branches(lvlm, encoding.example, plain)], rule, STEPS)
        assert answers[row] == tokens
        for got, expected in zip(ours.scores, scores, strict=True):
            assert torch.equal(got[row].isinf(), expected.isinf())
            torch.testing.assert_close(got[row].log_softmax(-1), expected.log_softmax(-1), atol=1e-5, rtol=0)


def masked(scores: Tensor, main: Tensor, beta: float) -> Tensor:
    """Minus infinity where the probability is below a share of the largest."""
    p = main.exp() / main.exp().sum()
    return torch.where(p < beta * p.max(), -math.inf, scores)
