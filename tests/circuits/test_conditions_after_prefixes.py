"""Conditions of questions that share prefixes, against a forward pass of each question alone under each condition."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits import Add, Intervention, Zero, intervened, logits_under
from lvlm import Lvlm, Site
from tests.lvlm.test_prefix_groups import SHARING, questions, shared_batches, tokens_of
from tests.toys.families import model


def conditions_of(lvlm: Lvlm) -> dict[str, list[Intervention]]:
    top = lvlm.n_layers - 1
    direction = torch.ones(lvlm.width)
    return {
        "plain": [],
        "head": [Intervention(Site.parse("decoder.L0.z"), Zero(), "last+generated", head=1)],
        "layer": [Intervention(Site.parse(f"decoder.L{top}.resid_post"), Add(direction), "last")],
        "both": [
            Intervention(Site.parse("decoder.L0.mlp_out"), Add(direction), "last"),
            Intervention(Site.parse(f"decoder.L{top}.z"), Zero(), "last", head=0),
        ],
        "both positions": [
            Intervention(Site.parse("decoder.L0.attn_out"), Add(direction), "all"),
            Intervention(Site.parse(f"decoder.L{top}.mlp_out"), Add(direction), "last"),
        ],
        "everywhere": [Intervention(Site.parse("decoder.L0.resid_post"), Add(direction), "all")],
        "image": [Intervention(Site.parse("decoder.L0.resid_post"), Zero(), "image:all")],
    }


@torch.no_grad()
def alone(lvlm: Lvlm, items: list[Intervention]) -> Tensor:
    with intervened(lvlm, items):
        return torch.cat([lvlm.hf(**lvlm.encode(example).inputs).logits[:, -1] for example in questions()])


@pytest.mark.parametrize("family", SHARING)
def test_each_condition_equals_each_question_alone(family: str, caplog: pytest.LogCaptureFixture) -> None:
    lvlm, conditions = model(family), conditions_of(model(family))
    with caplog.at_level(logging.WARNING):
        (batch,) = shared_batches(lvlm, questions())
        logits = logits_under(lvlm, list(conditions.values()))(batch)
    assert not caplog.records  # no fallback to whole prompts
    plain = alone(lvlm, [])
    for (name, items), got in zip(conditions.items(), logits, strict=True):
        expected = alone(lvlm, items)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-6, msg=lambda m, name=name: f"{name}: {m}")
        if items:
            assert (expected - plain).abs().max() > 1e-4, name


def test_the_prefix_runs_once_for_all_conditions_at_the_last_token() -> None:
    lvlm = model("llava")
    conditions = {
        name: items for name, items in conditions_of(lvlm).items() if name in ("plain", "head", "layer", "both")
    }
    (batch,) = shared_batches(lvlm, questions())
    run = logits_under(lvlm, list(conditions.values()))
    with tokens_of(lvlm) as counts, tokens_of(lvlm, "projector.out") as pictures:
        run(batch)
    tails = len(batch.index) * batch.tail
    # Layer 0 of a resumed run computes the last token of the unchanged check and of the conditions that change layer 0.
    assert sum(counts) == sum(batch.lengths) + tails + 3 * len(batch.index)
    assert sum(pictures) == 3 * len(batch.encodings[0].tokens.image)


def test_the_prefix_runs_once_more_for_a_condition_at_all_tokens() -> None:
    lvlm = model("llava")
    conditions = conditions_of(lvlm)
    (batch,) = shared_batches(lvlm, questions())
    run = logits_under(lvlm, [[], conditions["everywhere"]])
    assert run.continue_prefixes == (True, True)
    assert logits_under(lvlm, list(conditions.values())).continue_prefixes == (True,) * 6 + (False,)
    with tokens_of(lvlm) as counts:
        run(batch)
    assert sum(counts) == 2 * (sum(batch.lengths) + len(batch.index) * batch.tail)


def test_conditions_that_cannot_resume_run_again_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from circuits.execution import patch_runner
    from circuits.execution.prefix_attention import NotShared

    def refused(*_: Any, **__: Any) -> None:
        msg = "it is a test"
        raise NotShared(msg)

    lvlm = model("llava")
    conditions = list(conditions_of(lvlm).values())
    (batch,) = shared_batches(lvlm, questions())
    monkeypatch.setattr(patch_runner, "record_tails", refused)
    with caplog.at_level(logging.WARNING, "circuits.execution.patch_runner"):
        logits = logits_under(lvlm, conditions)(batch)
    assert [record.getMessage().count("it is a test") for record in caplog.records] == [1]
    for items, got in zip(conditions, logits, strict=True):
        torch.testing.assert_close(got, alone(lvlm, items), rtol=1e-5, atol=5e-6)
