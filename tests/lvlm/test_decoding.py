"""Decoding with branches: merged caches, positions and rows, against whole uncached forwards."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm import Sampling, wrap_lvlm
from lvlm.decoding.decoder import AnswerRule, Branch, Prompts, RuleDecoder, Step
from lvlm.decoding.loop import first_logits, generate, generate_prompts, merges_caches
from lvlm.generation import greedy
from lvlm.sites import Site
from mitigation.training_free.branches import without_image
from tests.toys.decoding_oracle import double_model, naive_steps, text_only
from tests.toys.examples import example
from tests.toys.families import build_new, model
from tests.toys.random_models import hooks_of

STEPS = 5
FAMILIES = ("llava", "qwen2_5_vl", "gemma3")
FULL_FORWARDS = ("mllama", "kosmos2", "blip2_opt", "instructblip_t5", "florence2")


@pytest.mark.parametrize("family", [*FAMILIES, "llava_next", "internvl", "idefics3", "paligemma", *FULL_FORWARDS])
def test_the_model_alone_writes_what_transformers_generates(family: str) -> None:
    lvlm = model(family)
    batch = next(lvlm.batches([example(0), example(0)], 2))
    expected = greedy(lvlm, batch.inputs, STEPS, images=batch.images)
    assert generate(lvlm, batch, AnswerRule(), STEPS) == expected


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen3_vl", "llava_onevision", "smolvlm", "janus", "mistral3", *FAMILIES]
)
def test_caches_of_most_families_are_merged(family: str) -> None:
    assert merges_caches(model(family))


@pytest.mark.parametrize("family", ["mllama", "kosmos2"])
def test_a_family_whose_cache_cannot_be_merged_is_named_once(family: str, caplog: pytest.LogCaptureFixture) -> None:
    lvlm = model(family)
    lvlm._answer_cache.clear()
    with caplog.at_level(logging.WARNING, logger="lvlm.decoding.loop"):
        assert not merges_caches(lvlm)
        assert not merges_caches(lvlm)
    assert len(caplog.records) == 1
    assert family in caplog.text
    assert "full forward pass per token" in caplog.text


class Contrast(AnswerRule):
    """Twice the logits minus those without the image; records every step."""

    def __init__(self, lvlm: object, batch: object, sites: Sequence[Site] = ()) -> None:
        self.lvlm, self.batch, self.sites = lvlm, batch, sites
        self.steps: list[tuple[Step, Tensor]] = []

    def branches(self, first: Step) -> Sequence[Branch]:
        return [without_image(self.lvlm, self.batch)]  # type: ignore[arg-type]

    def combine(self, step: Step) -> Tensor:
        logits = 2 * step.logits - step.branches[0]
        self.steps.append((step, logits))
        return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_is_continued_as_in_whole_forwards(family: str) -> None:
    lvlm = double_model(family)
    batch = next(lvlm.batches([example(0), example(1)], 2))
    rule = Contrast(lvlm, batch)
    answers = generate(lvlm, batch, rule, STEPS, ends=False)
    for row, encoding in enumerate(batch.encodings):
        inputs = dict(encoding.inputs)
        inputs |= {name: x.double() for name, x in inputs.items() if x.is_floating_point()}
        pair = [inputs, text_only(lvlm, inputs)]
        tokens, logits = naive_steps(lvlm, pair, lambda _, x: 2 * x[0] - x[1], STEPS)
        assert answers[row] == tokens
        for (_, ours), oracle in zip(rule.steps, logits, strict=True):
            torch.testing.assert_close(ours[row].log_softmax(-1), oracle.log_softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_different_length_are_decoded_together_as_alone(family: str) -> None:
    lvlm = double_model(family)
    questions = [example(0), example(1), example(2)]
    texts = ["Is there a cat?", "What is in the image? Is there a cat?", "A cat?"]
    from dataclasses import replace

    encodings = [lvlm.encode(replace(e, question=text)) for e, text in zip(questions, texts, strict=True)]
    assert len({e.shape for e in encodings}) > 1
    branch = Branch.of("prompts", lvlm, encodings)
    batched = generate_prompts(lvlm, branch.prompts, AnswerRule(), STEPS, names=["a", "b", "c"], ends=False)
    for row, encoding in enumerate(encodings):
        alone = [Prompts((0,), lvlm.collate([encoding]))]
        assert generate_prompts(lvlm, alone, AnswerRule(), STEPS, names=["a"], ends=False) == [batched[row]]


def test_sites_are_read_at_the_last_token_of_each_answer() -> None:
    lvlm = double_model("llava")
    batch = next(lvlm.batches([example(0), example(1)], 2))
    site = Site.parse("decoder.L1.resid_post")
    rule = Contrast(lvlm, batch, [site])
    answers = generate(lvlm, batch, rule, 3, ends=False)
    for row, encoding in enumerate(batch.encodings):
        inputs = dict(encoding.inputs)
        for number, (step, _) in enumerate(rule.steps):
            whole = {
                **inputs,
                "input_ids": torch.cat([inputs["input_ids"], torch.tensor([answers[row][:number]], dtype=int)], 1),
            }
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            expected = lvlm.read(lvlm.on_device(whole), [site])[str(site)][0, -1]
            torch.testing.assert_close(step.activations[str(site)][row], expected, atol=1e-5, rtol=0)


def test_image_sites_are_read_at_the_image_tokens_of_prompts_of_different_length() -> None:
    from dataclasses import replace

    lvlm = double_model("llava")
    texts = ["Is there a cat?", "What is in the image? Is there a cat?"]
    encodings = [lvlm.encode(replace(example(i), question=text)) for i, text in enumerate(texts)]
    site = Site.parse("decoder.L1.resid_post")
    steps: list[Step] = []

    class Reads(AnswerRule):
        image_sites = (site,)

        def branches(self, first: Step) -> Sequence[Branch]:
            steps.append(first)
            return ()

        def combine(self, step: Step) -> Tensor:
            assert step.number == 0 or not step.image_activations
            return step.logits

    generate_prompts(lvlm, Branch.of("", lvlm, encodings[::-1]).prompts, Reads(), 2, names=["a", "b"])
    for row, encoding in enumerate(encodings[::-1]):
        inputs = lvlm.on_device(encoding.inputs)
        expected = lvlm.read(inputs, [site])[str(site)][0, inputs["input_ids"][0] == lvlm.content_id]
        torch.testing.assert_close(steps[0].image_activations[str(site)][row], expected, atol=1e-5, rtol=0)


def test_logits_of_the_first_token_are_those_of_the_rule() -> None:
    lvlm = double_model("llava")
    batch = next(lvlm.batches([example(0)], 1))
    rule = Contrast(lvlm, batch)
    logits = first_logits(lvlm, batch, rule)
    main, blind = lvlm.logits(batch.inputs), lvlm.logits(text_only(lvlm, batch.inputs))
    torch.testing.assert_close(logits, 2 * main - blind, atol=1e-5, rtol=0)


def test_sampled_answers_do_not_depend_on_the_batch() -> None:
    lvlm = model("llava")
    sampling = Sampling(temperature=2.0, seed=3)
    batch = next(lvlm.batches([example(0), example(1)], 2))
    batched = generate(lvlm, batch, AnswerRule(), STEPS, sampling=sampling)
    for row, question in enumerate((example(0), example(1))):
        alone = next(lvlm.batches([question], 1))
        assert generate(lvlm, alone, AnswerRule(), STEPS, sampling=sampling) == [batched[row]]


def test_two_decoders_are_refused_and_the_first_stays() -> None:
    lvlm = model("llava")
    first = RuleDecoder()
    with lvlm.decoding_with(first):
        with pytest.raises(ModelError, match="both choose the next token"), lvlm.decoding_with(RuleDecoder()):
            pass
        assert lvlm.decoder is first
    assert lvlm.decoder is None


def test_hooks_and_replaced_methods_are_gone_after_an_error() -> None:
    lvlm = model("llava")
    batch = next(lvlm.batches([example(0)], 1))
    tower = lvlm.tower
    assert tower is not None

    class Fails(AnswerRule):
        sites = (Site.parse("decoder.L0.resid_post"),)

        def combine(self, step: Step) -> Tensor:
            raise RuntimeError

    before, forward = hooks_of(lvlm), vars(tower).get("forward")
    with pytest.raises(RuntimeError):
        generate(lvlm, batch, Fails(), STEPS)
    assert hooks_of(lvlm) == before
    assert vars(tower).get("forward") is forward
    assert lvlm.row_layout is None
    assert lvlm.answer_from is None


def test_the_tower_runs_once_for_branches_with_the_same_pixels() -> None:
    lvlm = wrap_lvlm(*build_new("llava"), name="llava", validate=False)
    batch = next(lvlm.batches([example(0)], 1))
    tower = lvlm.tower
    assert tower is not None
    assert merges_caches(lvlm)  # measured once a model, with runs of the tower
    runs: list[None] = []
    inner = next(m for m in tower.modules() if not list(m.children()))

    class Same(AnswerRule):
        def branches(self, first: Step) -> Sequence[Branch]:
            return [Branch.of("same", lvlm, batch.encodings)]

        def combine(self, step: Step) -> Tensor:
            assert torch.equal(step.logits, step.branches[0]) or step.number > 0
            return step.logits

    original = inner.forward
    inner.forward = lambda *a, **k: (runs.append(None), original(*a, **k))[1]
    try:
        generate(lvlm, batch, Same(), 3)
    finally:
        del inner.forward
    assert len(runs) == 1
