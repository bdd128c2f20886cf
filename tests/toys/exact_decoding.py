"""Compare decoding under a method with written scores: in float64 to 1e-9 in each form of decoding, and in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lvlm import Lvlm
from lvlm.decoding import loop
from lvlm.decoding.decoder import AnswerRule, Branch, Step
from mitigation.training_free.method import TrainingFree
from tests.toys.decoding_oracle import double_model
from tests.toys.examples import example
from tests.toys.families import model
from tests.toys.float64 import float64_inside

Form = Literal["cached", "padded", "whole"]
"""Cached rows of prompts and branches; the same behind padding, next to a longer branch; or whole passes for each token."""
Written = tuple[list[int], list[Tensor]]
"""Tokens of an answer, and the scores ``[V]`` that each is chosen from."""
EXACT = 1e-9
"""Largest difference of log-probabilities in float64."""


class _Padded(AnswerRule):
    """A rule whose rows begin with padding, because a longer branch that nothing reads is decoded with them."""

    def __init__(self, rule: AnswerRule, lvlm: Lvlm, batch: Any) -> None:
        self._rule, self._lvlm, self._batch = rule, lvlm, batch
        self.sites, self.image_sites, self.independent = rule.sites, rule.image_sites, rule.independent

    def branches(self, first: Step) -> Sequence[Branch]:
        longer = [replace(e.example, question=f"Is there a cat? {e.example.question}") for e in self._batch.encodings]
        return [
            *self._rule.branches(first), Branch.of("padding", self._lvlm, [self._lvlm.encode(e) for e in longer])
        ]  # fmt: skip

    def combine(self, step: Step) -> Tensor:
        return self._rule.combine(replace(step, branches=step.branches[:-1]))

    def select(self, parents: Sequence[int]) -> None:
        self._rule.select(parents)


@contextmanager
def recorded(form: Form, lvlm: Lvlm, batch: Any) -> Iterator[list[Any]]:
    """Record the scores of each run of the loop, in a form of decoding."""
    runs: list[Any] = []

    class Run(loop.DecodingRun):
        def __init__(self, model: Lvlm, prompts: Any, rule: AnswerRule, **options: Any) -> None:
            # The check of a model's cache states itself whether it merges.
            if options.get("merges") is None and options.get("continues", True):
                rule = _Padded(rule, lvlm, batch) if form == "padded" else rule
                options["merges"] = False if form == "whole" else None
            super().__init__(model, prompts, rule, **options)
            self.scores: list[Tensor] = []
            runs.append(self)

        def start(self) -> Tensor:
            self.scores.append(super().start())
            return self.scores[-1]

        def _append(self, tokens: Tensor) -> Tensor:
            self.scores.append(super()._append(tokens))
            return self.scores[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "DecodingRun", Run)
        yield runs


def decoded(
    lvlm: Lvlm, batch: Any, method: TrainingFree, steps: int, form: Form = "cached"
) -> tuple[list[list[int]], list[Tensor]]:
    """Answers of a batch under a method, and the scores ``[B, V]`` of each step."""
    with method.applied(lvlm), lvlm.without_end_tokens(), recorded(form, lvlm, batch) as runs:
        if lvlm.decoder is None:
            answers = loop.generate(lvlm, batch, AnswerRule(), steps)
        else:
            answers = lvlm.decoder.generate(lvlm, batch, steps)
    if form != "whole":
        assert runs[-1].merges
    return answers, runs[-1].scores


def assert_exact(
    family: str,
    method: TrainingFree,
    write: Callable[[Lvlm, Any, dict[str, Tensor]], Written],
    steps: int,
    *,
    forms: Sequence[Form] = ("cached", "padded", "whole"),
    weight: float = 0.0,
) -> list[list[Tensor]]:
    """Compare a batch of two answers with those that `write` computes from a question and its float64 inputs; return the latter.

    In float64 tokens and excluded tokens are equal, and log-probabilities to 1e-9. In float32 the bound is ``1e-4 max(1, |l|)``,
    times ``1 + 2 weight`` for contrasts, as long as the tokens are equal.
    """
    written: list[Written] = []
    with float64_inside():
        lvlm = double_model(family)
        batch = next(lvlm.batches([example(0), example(1)], 2))
        for encoding in batch.encodings:
            written.append(write(lvlm, encoding.example, doubled(encoding.inputs)))
        for form in forms:
            answers, scores = decoded(lvlm, batch, method, steps, form)
            for row, (tokens, expected) in enumerate(written):
                assert answers[row] == tokens, (form, row)
                for got, scores_of_step in zip(scores, expected, strict=True):
                    assert torch.equal(got[row].isinf(), scores_of_step.isinf()), (form, row)
                    assert difference(got[row], scores_of_step) < EXACT, (form, row)
    short = model(family)
    batch = next(short.batches([example(0), example(1)], 2))
    answers, scores = decoded(short, batch, method, steps)
    for row, (tokens, expected) in enumerate(written):
        for number, (got, scores_of_step) in enumerate(zip(scores, expected, strict=True)):
            if answers[row][:number] != tokens[:number]:
                break
            finite = scores_of_step[~scores_of_step.isinf()]
            bound = 1e-4 * max(1.0, float(finite.abs().max())) * (1 + 2 * weight)
            assert torch.equal(got[row].isinf(), scores_of_step.isinf()), ("float32", row)
            assert difference(got[row].double(), scores_of_step) < bound, ("float32", row)
    return [scores for _, scores in written]


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of the log-probabilities of two rows of scores, of tokens that both allow."""
    finite = ~(a.isinf() | b.isinf())
    return float((a.log_softmax(-1) - b.log_softmax(-1))[finite].abs().max())


def doubled(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
