"""One forward pass over prompts and branches of text, against separate passes in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lvlm import Lvlm
from lvlm.decoding import loop
from lvlm.decoding.attention_edits import edit_attention
from lvlm.decoding.attention_rows import AttentionRows
from lvlm.decoding.decoder import AnswerRule, Branch, Step
from lvlm.decoding.joined_prefill import joins_prefills
from mitigation.training_free.branches import unknown_image, without_image
from tests.toys.decoding_oracle import double_model
from tests.toys.examples import example
from tests.toys.families import model
from tests.toys.float64 import float64_inside


class Blind(AnswerRule):
    """The logits with and without an image; its branches are known before the prompts run."""

    independent = True

    def __init__(self, lvlm: Lvlm, batch: Any) -> None:
        self.lvlm, self.batch = lvlm, batch

    def branches(self, first: Step) -> Sequence[Branch]:
        return [without_image(self.lvlm, self.batch), unknown_image(self.lvlm, self.batch)]

    def combine(self, step: Step) -> Tensor:
        return torch.stack([step.logits, *step.branches], dim=1).log_softmax(-1)


def logits_of(lvlm: Lvlm, batch: Any, context: Callable[[], AbstractContextManager[Any]]) -> tuple[list[Tensor], int]:
    """Log-probabilities at three steps, and the number of forward passes of the prefill."""
    passes: list[int] = []
    handle = lvlm.hf.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with torch.no_grad(), context():
            run = loop.DecodingRun(lvlm, loop.prompts_of(batch), Blind(lvlm, batch))
            passes.clear()
            logits = [run.start()]
            count = len(passes)
            for _ in range(2):
                logits.append(run.next(logits[-1][:, 0].argmax(-1)))
    finally:
        handle.remove()
    return logits, count


def doubled_scores(rows: AttentionRows) -> AttentionRows:
    return rows.with_scores(torch.where(rows.image, 2 * rows.scores, rows.scores - 0.1 * rows.scores.abs()))


@pytest.mark.parametrize(("edit", "branches"), [(False, None), (True, None), (True, [0]), (True, [2])])
@float64_inside()
def test_a_joined_prefill_has_the_results_of_separate_ones(
    edit: bool, branches: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lvlm = double_model("llava")
    batch = next(lvlm.batches([example(0), example(1)], 2))

    def edited() -> AbstractContextManager[Any]:
        return edit_attention(lvlm, doubled_scores, queries="all", branches=branches)

    context = edited if edit else nullcontext
    assert joins_prefills(lvlm)
    joined, passes = logits_of(lvlm, batch, context)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "joins_prefills", lambda _: False)
        separate, more = logits_of(lvlm, batch, context)
    assert (passes, more) == (1, 3)
    for shared, alone in zip(joined, separate, strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-9, rtol=0)
    assert lvlm.attention == "sdpa"


def test_hooks_inside_of_the_model_see_separate_passes() -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0)], 1))
    assert loop.merges_caches(lvlm)  # both are measured once a model, with passes that are not counted here
    assert joins_prefills(lvlm)
    lengths: list[int] = []
    layer = lvlm.layers("decoder")[1]
    handle = layer.register_forward_hook(lambda _m, _a, out: lengths.append(out.shape[1]))
    try:
        _, passes = logits_of(lvlm, batch, nullcontext)
    finally:
        handle.remove()
    assert passes == 3
    assert lengths[0] == batch.inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("family", "joins"),
    [
        ("llava", True),
        ("internvl", True),
        ("qwen2_5_vl", False),
        ("gemma3", False),
        ("paligemma", False),
        ("mllama", False),
    ],
)
def test_families_whose_positions_or_masks_need_more_are_prefilled_separately(family: str, joins: bool) -> None:
    assert joins_prefills(model(family)) == joins


def test_an_error_in_a_joined_prefill_restores_the_attention() -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0)], 1))

    def fail(_rows: AttentionRows) -> None:
        raise ZeroDivisionError

    assert joins_prefills(lvlm)
    with pytest.raises(ZeroDivisionError), edit_attention(lvlm, fail):
        logits_of(lvlm, batch, nullcontext)
    assert lvlm.attention == "sdpa"
    assert logits_of(lvlm, batch, nullcontext)[1] == 1
