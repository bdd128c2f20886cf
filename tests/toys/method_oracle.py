"""Decoding with a method, compared at every step with written rules in whole uncached forwards in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lvlm import Lvlm
from lvlm.decoding.decoder import AnswerRule, Step
from lvlm.decoding.loop import generate
from mitigation.training_free.method import TrainingFree
from tests.toys.decoding_oracle import double_model, naive_steps
from tests.toys.examples import example

STEPS = 3
Inputs = dict[str, Tensor]
Run = tuple[Inputs, Callable[[], AbstractContextManager[Any]]]
"""Inputs of one prompt or branch, and a function that opens its changes of the model."""
Combine = Callable[[int, Any], Tensor]
"""From the number of the step and the logits of each run, ``[V]``, to the scores of the next token."""


class Recorded:
    """A rule whose scores at each step are stored."""

    def __init__(self, rule: AnswerRule) -> None:
        self.rule, self.scores = rule, []
        self.sites, self.image_sites = rule.sites, rule.image_sites
        self.branches, self.independent = rule.branches, rule.independent

    def combine(self, step: Step) -> Tensor:
        self.scores.append(self.rule.combine(step))
        return self.scores[-1]


def inputs_of(batch: Any) -> list[Inputs]:
    """Return the inputs of each prompt of a batch, in float64."""
    return [{n: x.double() if x.is_floating_point() else x for n, x in e.inputs.items()} for e in batch.encodings]


def answers_of(lvlm: Lvlm, batch: Any, method: TrainingFree) -> tuple[list[list[int]], list[Tensor]]:
    """Return the answers of a batch with caches, and the scores at each step."""
    with method.applied(lvlm):
        decoder: Any = lvlm.decoder
        ours: Any = Recorded(decoder.start(lvlm, batch) if decoder else AnswerRule())
        return generate(lvlm, batch, ours, STEPS, ends=False), ours.scores


def main_logits(_step: int, logits: Any) -> Tensor:
    return logits[0]


def assert_decodes(
    family: str,
    method: TrainingFree,
    runs: Callable[[Lvlm, Inputs], Sequence[Run]],
    combine: Combine = main_logits,
    *,
    atol: float = 1e-5,
) -> None:
    """Assert that two prompts in one batch are decoded as by `runs`, the prompt's first, whose logits `combine` combines.

    The scores must differ from those of the model alone.
    """
    lvlm = double_model(family)
    batch = next(lvlm.batches([example(0), example(1)], 2))
    answers, scores = answers_of(lvlm, batch, method)
    changed = False
    for row, inputs in enumerate(inputs_of(batch)):
        prompts, contexts = zip(*runs(lvlm, inputs), strict=True)
        tokens, expected = naive_steps(lvlm, prompts, combine, STEPS, contexts)
        assert answers[row] == tokens
        for ours, written in zip(scores, expected, strict=True):
            assert torch.equal(ours[row].isinf(), written.isinf())
            torch.testing.assert_close(ours[row].log_softmax(-1), written.log_softmax(-1), atol=atol, rtol=0)
        with torch.no_grad():
            alone = lvlm.hf(**inputs, use_cache=False).logits[0, -1].log_softmax(-1)
        possible = ~expected[0].isinf()
        changed |= not torch.allclose(alone[possible], expected[0].log_softmax(-1)[possible], atol=1e-4)
    assert changed
