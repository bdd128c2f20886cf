"""Beam search against transformers' own, the selection of rows of a run, and diverse beams against a loop of whole forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from groundscope.core.errors import ConfigError
from lvlm import Lvlm
from lvlm.decoding.beam import Beams, beam_search, continue_diversely, diverse_tokens
from lvlm.decoding.decoder import AnswerRule, Branch, Step
from lvlm.decoding.loop import DecodingRun, merges_caches, prompts_of
from lvlm.generation import end_tokens
from mitigation.training_free.branches import without_image
from tests.toys.decoding_oracle import double_model, naive_steps, text_only
from tests.toys.examples import example
from tests.toys.families import model

FAMILIES = ("llava", "qwen2_5_vl", "gemma3")


def generated(lvlm: Lvlm, inputs: dict[str, Any], ends: Sequence[int], steps: int, count: int, penalty: float) -> Any:
    """Answers of transformers' beam search, up to the end token."""
    settings = type(lvlm.hf.generation_config)(
        max_new_tokens=steps,
        num_beams=count,
        do_sample=False,
        length_penalty=penalty,
        early_stopping=False,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    out = lvlm.hf.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in out]


def ending(lvlm: Lvlm, monkeypatch: pytest.MonkeyPatch, ends: Sequence[int]) -> None:
    monkeypatch.setattr("lvlm.decoding.beam.end_tokens", lambda _: frozenset(ends))


@pytest.mark.parametrize("family", [*FAMILIES, "mllama"])
@pytest.mark.parametrize(("count", "penalty"), [(5, 1.0), (3, 0.0), (2, -1.0)])
def test_beams_are_those_of_transformers(
    family: str, count: int, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lvlm = model(family)
    batch = next(lvlm.batches([example(0), example(1)], 2))
    # Random models hardly ever end an answer, so tokens that beams often contain end them here.
    ranked = lvlm.logits(batch.inputs)[0].argsort(descending=True).tolist()
    for ends in ([*end_tokens(lvlm), lvlm.content_id], [ranked[1], lvlm.content_id], [*ranked[2:8], lvlm.content_id]):
        ending(lvlm, monkeypatch, ends)
        expected = generated(lvlm, batch.inputs, ends, 6, count, penalty)
        names = ["a", "b"]
        answers = beam_search(lvlm, prompts_of(batch), AnswerRule(), 6, names=names, beams=Beams(count, penalty))
        assert answers == expected


def test_some_of_these_answers_end_early_and_prompts_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0), example(1), example(2)], 3))
    lengths = set()
    for rank in range(12):
        ends = [lvlm.logits(batch.inputs)[0].argsort(descending=True).tolist()[rank], lvlm.content_id]
        ending(lvlm, monkeypatch, ends)
        answers = beam_search(lvlm, prompts_of(batch), AnswerRule(), 6, names=["a", "b", "c"])
        assert answers == generated(lvlm, batch.inputs, ends, 6, 5, 1.0)
        lengths |= {len(answer) for answer in answers}
    assert len(lengths) > 1


class Contrast(AnswerRule):
    """Twice the logits minus those without the image."""

    def __init__(self, lvlm: Lvlm, batch: Any) -> None:
        self.lvlm, self.batch = lvlm, batch
        self.parents: list[list[int]] = []

    def branches(self, first: Step) -> Sequence[Branch]:
        return [without_image(self.lvlm, self.batch)]

    def combine(self, step: Step) -> Tensor:
        return 2 * step.logits - step.branches[0]

    def select(self, parents: Sequence[int]) -> None:
        self.parents.append(list(parents))


def whole(lvlm: Lvlm, inputs: dict[str, Any], tokens: list[int]) -> Tensor:
    """Twice the logits minus those without the image after some tokens, by whole forwards."""
    plain = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    position = iter(tokens)

    def forced(_: int, x: Sequence[Tensor]) -> Tensor:
        logits = 2 * x[0] - x[1]
        token = next(position, None)
        return logits if token is None else torch.full_like(logits, -1e9).index_fill(0, torch.tensor([token]), 0.0)

    return naive_steps(lvlm, [plain, text_only(lvlm, plain)], forced, len(tokens) + 1)[1][-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("merges", [True, False])
def test_branch_caches_follow_the_selected_answers(family: str, merges: bool) -> None:
    lvlm = double_model(family)
    batch = next(lvlm.batches([example(0), example(1)], 2))
    rule = Contrast(lvlm, batch)
    assert merges_caches(lvlm)
    run = DecodingRun(lvlm, prompts_of(batch), rule, merges=merges, names=["a", "b"])

    def check(logits: Tensor, prompts: list[int], tokens: list[list[int]]) -> None:
        for row, (prompt, answer) in enumerate(zip(prompts, tokens, strict=True)):
            expected = whole(lvlm, dict(batch.encodings[prompt].inputs), answer)
            torch.testing.assert_close(logits[row].log_softmax(-1), expected.log_softmax(-1), atol=1e-5, rtol=0)

    with torch.no_grad():
        run.start()
        run.select([0, 0, 1])
        check(run.next(torch.tensor([11, 12, 13])), [0, 0, 1], [[11], [12], [13]])
        run.select([2, 1, 1, 0])
        check(run.next(torch.tensor([14, 15, 16, 17])), [1, 0, 0, 0], [[13, 14], [12, 15], [12, 16], [11, 17]])
        run.select([3, 0])
        assert run.names == ["a", "b"]
        logits = run.rewind(torch.tensor([[11, 18, 19], [13, 14, 20]]))
        check(logits, [0, 1], [[11, 18, 19], [13, 14, 20]])
        check(run.rewind(torch.tensor([[11], [21]])), [0, 1], [[11], [21]])
        check(run.next(torch.tensor([22, 23])), [0, 1], [[11, 22], [21, 23]])
        run.select([1])
        check(run.next(torch.tensor([24])), [1], [[21, 23, 24]])
    assert rule.parents == [[0, 0, 1], [2, 1, 1, 0], [3, 0], [1]]


def test_diverse_tokens_are_penalized_by_earlier_running_ones() -> None:
    log_p = torch.tensor([[-0.1, -1.0, -2.0, -9.0]] * 5)
    # Penalties after each choice: 0; 1 after (2,0,0,0) is -2.1, -1, -2; 0 and 2 tie at 0: -2.1, 1: -3, 2: -2; …
    assert diverse_tokens(log_p, [True] * 5, 2.0) == [0, 1, 2, 0, 1]
    assert diverse_tokens(log_p, [False, True, True, False, True], 2.0) == [0, 0, 1, 0, 2]
    assert diverse_tokens(log_p[:3], [True] * 3, 0.0) == [0, 0, 0]
    assert diverse_tokens(torch.zeros(2, 3), [True, True], 1.0) == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_diverse_continuations_are_those_of_whole_forwards(family: str) -> None:
    lvlm = double_model(family)
    batch = next(lvlm.batches([example(0)], 1))
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in batch.encodings[0].inputs.items()}
    ranked = lvlm.logits(batch.inputs)[0].argsort(descending=True).tolist()
    stops, ends = frozenset({ranked[2]}), frozenset({ranked[3]})
    rows: list[list[int]] = [[] for _ in range(5)]
    alive, totals, ended = [True] * 5, [0.0] * 5, [False] * 5
    for _ in range(4):
        counts = torch.zeros(len(ranked), dtype=torch.float64)
        chosen: list[tuple[int, int]] = []
        for k in range(5):
            if not alive[k]:
                continue
            steps = naive_steps(lvlm, [inputs], _forced(rows[k]), len(rows[k]) + 1)[1]
            log_p = steps[-1].log_softmax(-1)
            token = int((log_p - 2.0 * counts).argmax())
            counts[token] += 1
            totals[k] += float(log_p[token])
            chosen.append((k, token))
        for k, token in chosen:
            ended[k] = token in ends
            rows[k] += [] if ended[k] else [token]
            alive[k] = token not in ends | stops
    run = DecodingRun(lvlm, prompts_of(batch), AnswerRule(), names=["a"])
    with torch.no_grad():
        logits = run.start()
        run.select([0] * 5)
        ours = continue_diversely(run, logits.expand(5, -1), 4, diversity=2.0, stops=stops, ends=ends)
    assert [list(c.tokens) for c in ours] == rows
    assert [c.ended for c in ours] == ended
    assert any(ended)
    torch.testing.assert_close([c.log_p for c in ours], totals, atol=1e-4, rtol=0)


def _forced(tokens: list[int]) -> Any:
    position = iter(tokens)

    def rule(_: int, x: Sequence[Tensor]) -> Tensor:
        token = next(position, None)
        return x[0] if token is None else torch.full_like(x[0], -1e9).index_fill(0, torch.tensor([token]), 0.0)

    return rule


def test_options_of_beams_are_checked() -> None:
    with pytest.raises(ConfigError, match="count=0: the number of beams must be an integer of at least 1"):
        Beams(0)
    with pytest.raises(ConfigError, match="length_penalty=nan: must be a finite number"):
        Beams(length_penalty=float("nan"))
