"""Rows that share the run of their prefix, against whole forward passes of each row alone by nothing of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits import Add, Gate, Intervention, Zero, intervened
from concepts.image_source import NoImage
from concepts.schema import Example
from lvlm import Lvlm, Sampling, Site, load_lvlm
from lvlm.decoding.prefix_run import PrefixBatch, prefix_batches
from lvlm.encoding.continued_inputs import append_tokens
from lvlm.generation import greedy
from lvlm.prefix_groups import PrefixGroups, attention_window
from lvlm.prefix_sharing import unshared_because
from tests.toys.examples import example
from tests.toys.families import BUILDERS, model

EXCLUDED = {
    "paligemma": "image tokens attend to later tokens",
    "paligemma2": "image tokens attend to later tokens",
    "gemma3": "image tokens attend to later tokens",
    "mllama": "cross-attention layers read the image",
    "blip2_opt": "the model takes no positions",
    "blip2_llama": "the model takes no positions",
    "instructblip_llama": "the model takes no positions",
    "instructblip_t5": "an encoder reads the prompt",
    "florence2": "an encoder reads the prompt",
    "kosmos2": "rows that continue a shared prefix do not have the logits of full forward passes",
    "llama4": "attention is limited to chunks",
}
SHARING = [family for family in BUILDERS if family not in EXCLUDED]
QUESTIONS = ("Is there a dog?", "Is there a cat in the image? Is there a dog?", "What color is the car?")


def questions(*, system: str | None = None, suffix: str = "") -> list[Example]:
    """Three questions of different length about each of two images, and two about a third with another size."""
    images = [example(0), example(1), example(2, (100, 140))]
    questions_by_image = [QUESTIONS, QUESTIONS, QUESTIONS[:2]]
    return [
        replace(e, id=f"{e.id} {n}", question=text, system=system, suffix=suffix)
        for e, texts in zip(images, questions_by_image, strict=True)
        for n, text in enumerate(texts)
    ]


def shared_batches(lvlm: Lvlm, examples: Sequence[Example], size: int = 16, extra: int = 0) -> list[PrefixBatch]:
    return list(prefix_batches(lvlm, PrefixGroups(lvlm, examples, size, extra)))


@torch.no_grad()
def alone(lvlm: Lvlm, examples: Sequence[Example], answers: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Each row's logits in a forward pass alone: the last, or those before the tokens of an answer."""
    rows = []
    for number, item in enumerate(examples):
        inputs = lvlm.encode(item).inputs
        if answers is None:
            rows.append(lvlm.hf(**inputs).logits[:, -1])
        else:
            inputs = append_tokens(lvlm, inputs, [list(answers[number])])
            rows.append(lvlm.hf(**inputs).logits[:, -len(answers[number]) - 1 : -1])
    return torch.cat(rows)


def with_system_prompts() -> Lvlm:
    lvlm = load_lvlm("tiny", validate=False)
    image = "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    lvlm.processor.chat_template = f"{{% for m in messages %}}{{{{ m['role'] }}}}: {image} {{% endfor %}}"
    return lvlm


@contextmanager
def tokens_of(lvlm: Lvlm, site: str = "decoder.L0.resid_post") -> Iterator[list[int]]:
    """Number of tokens, of all rows, in each forward pass of a site."""
    counts: list[int] = []
    handle = lvlm.locate(site).watch(lambda x: counts.append(x.shape[0] * x.shape[1]))
    try:
        yield counts
    finally:
        handle.remove()


@pytest.mark.parametrize("family", list(BUILDERS))
def test_every_family_is_equal_or_excluded_by_name(family: str) -> None:
    lvlm = model(family)
    assert unshared_because(lvlm) == EXCLUDED.get(family, "")


@pytest.mark.parametrize("family", SHARING)
def test_rows_of_several_images_and_lengths_equal_each_row_alone(family: str) -> None:
    lvlm, examples = model(family), questions()
    (batch,) = shared_batches(lvlm, examples)
    assert batch.index == tuple(range(8))
    lengths = [e.tokens.length for e in batch.encodings]
    assert len(set(lengths)) >= 3
    with tokens_of(lvlm) as counts:
        logits = batch.logits()
    torch.testing.assert_close(logits, alone(lvlm, examples), rtol=0, atol=2e-6)
    assert sum(counts) == sum(batch.lengths) + len(batch.index) * batch.tail
    assert sum(counts) < sum(lengths)  # a toy's image has few tokens, and tails are padded to the longest
    for encoding, group in zip(batch.encodings, batch.group_of, strict=True):
        assert batch.lengths[group] > max(encoding.tokens.image)


@pytest.mark.parametrize("family", SHARING)
def test_answers_are_those_of_each_row_alone(family: str) -> None:
    lvlm, examples = model(family), questions()
    (batch,) = shared_batches(lvlm, examples, extra=4)
    with lvlm.without_end_tokens():
        expected = [greedy(lvlm, lvlm.encode(e).inputs, 4)[0] for e in examples]
        assert batch.generate(4) == expected
    assert batch.generate(4) == [greedy(lvlm, lvlm.encode(e).inputs, 4)[0] for e in examples]
    logits = batch.answer_logits(expected)
    torch.testing.assert_close(logits, alone(lvlm, examples, expected), rtol=0, atol=3e-6)


def test_sampled_answers_are_those_of_each_row_alone() -> None:
    lvlm, examples, sampling = model("llava"), questions(), Sampling(seed=3)
    (batch,) = shared_batches(lvlm, examples)
    draw = [sampling.processor([e.id]) for e in examples]
    expected = [greedy(lvlm, lvlm.encode(e).inputs, 5, choose=d)[0] for e, d in zip(examples, draw, strict=True)]
    assert batch.generate(5, sampling=sampling) == expected


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_a_divided_group_runs_its_prefix_once(size: int) -> None:
    lvlm, examples = model("llava"), questions()
    image, rows, sizes = len(lvlm.encode(examples[0]).tokens.image), [], []
    with tokens_of(lvlm) as counts, tokens_of(lvlm, "projector.out") as pictures:
        for batch in prefix_batches(lvlm, PrefixGroups(lvlm, examples, size)):
            rows.append((batch.index, batch.logits()))
            sizes.append(len(batch.index))
    assert [i for index, _ in rows for i in index] == list(range(8))
    torch.testing.assert_close(torch.cat([x for _, x in rows]), alone(lvlm, examples), rtol=0, atol=2e-6)
    assert max(sizes) <= size
    assert sum(pictures) == 3 * image
    assert sum(counts) < sum(lvlm.encode(e).tokens.length for e in examples)


def test_prefixes_of_different_length_are_padded() -> None:
    """System prompts and other text before the image change the tokens that rows have in common."""
    lvlm = with_system_prompts()
    brief = [replace(e, id=f"{e.id} brief", system="Answer yes or no.") for e in questions(suffix="Is it red?")]
    examples = [item for pair in zip(questions(), brief, strict=True) for item in pair]
    (batch,) = shared_batches(lvlm, examples, 32)
    assert len(batch.groups) == 6
    assert len(set(batch.lengths)) > 1
    assert sorted(batch.index) == list(range(16))
    order = [examples[i] for i in batch.index]
    torch.testing.assert_close(batch.logits(), alone(lvlm, order), rtol=0, atol=1e-4)


def test_questions_without_a_partner_are_no_group() -> None:
    lvlm, examples = with_system_prompts(), questions()
    single = [replace(example(5), id="single"), replace(examples[0], id="text", image=NoImage(), objects=())]
    other = replace(examples[0], id="system", system="Answer yes or no.")
    groups = PrefixGroups(lvlm, [*single, other, *examples], 16)
    rows = [row for batch in groups.batches() for group in batch for row in group.index]
    assert rows == list(range(3, 11))
    assert groups.others() == [0, 1, 2]


def test_a_q_former_that_reads_the_question_divides_a_group() -> None:
    lvlm = model("instructblip_llama")
    examples = questions()
    assert not list(PrefixGroups(lvlm, examples, 16).batches())


def test_sequences_beyond_a_sliding_window_are_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm, examples = model("mistral3"), questions()
    assert attention_window(lvlm) == 4096
    assert attention_window(model("qwen2_vl")) is None
    (batch,) = shared_batches(lvlm, examples)
    columns = batch.width + batch.tail
    monkeypatch.setattr(lvlm.hf.config.text_config, "sliding_window", columns)
    assert len(shared_batches(lvlm, examples)) == 1
    assert len(shared_batches(lvlm, examples, extra=1)) > 1
    monkeypatch.setattr(lvlm.hf.config.text_config, "sliding_window", 8)
    groups = PrefixGroups(lvlm, examples, 16)
    assert not list(groups.batches())
    assert groups.others() == list(range(8))


LATE = {
    "last": lambda lvlm: [Intervention(Site.parse("decoder.L0.resid_post"), Add(torch.ones(lvlm.width)), "last")],
    "last+generated": lambda lvlm: [Intervention(Site.parse("decoder.L0.z"), Zero(), "last+generated", 1)],
    "generated:all": lambda lvlm: [
        Intervention(Site.parse("decoder.L0.resid_post"), Add(torch.ones(lvlm.width)), "generated:all", decay=0.5)
    ],
    "gate": lambda lvlm: [
        Intervention(
            Site.parse("decoder.L1.resid_post"),
            Add(torch.ones(lvlm.width)),
            "last+generated",
            gate=Gate(Site.parse("decoder.L0.resid_post"), torch.ones(lvlm.width), bias=0.1),
        )
    ],
}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", list(LATE))
def test_a_late_change_continues_the_prefix_of_the_unchanged_model(family: str, name: str) -> None:
    lvlm, examples = model(family), questions()
    (batch,) = shared_batches(lvlm, examples)
    plain = batch.logits()
    with lvlm.without_end_tokens(), intervened(lvlm, LATE[name](lvlm)):
        expected = torch.cat([lvlm.logits(lvlm.encode(e).inputs) for e in examples])
        texts = [greedy(lvlm, lvlm.encode(e).inputs, 4)[0] for e in examples]
        assert unshared_because(lvlm) == ""
    with tokens_of(lvlm) as counts, lvlm.without_end_tokens(), intervened(lvlm, LATE[name](lvlm)):
        logits, answers = batch.logits(), batch.generate(4)
    assert counts == [8 * batch.tail] * 2 + [8] * 3  # no prefix
    assert answers == texts
    torch.testing.assert_close(logits, expected, rtol=0, atol=3e-6)
    assert torch.equal(logits, plain) == (name == "generated:all")


def test_a_late_change_does_not_act_on_the_prefix() -> None:
    lvlm, examples = model("llava"), questions()
    with intervened(lvlm, LATE["last"](lvlm)):
        (batch,) = shared_batches(lvlm, examples)
        logits = batch.logits()  # runs the prefixes inside the context
        expected = torch.cat([lvlm.logits(lvlm.encode(e).inputs) for e in examples])
    torch.testing.assert_close(logits, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("positions", ["all", "image:all", "suffix:all", "suffix+generated", (0, 3)])
def test_a_change_that_may_act_on_the_prefix_excludes_sharing(positions: Any) -> None:
    lvlm = model("llava")
    with intervened(lvlm, [Intervention(Site.parse("decoder.L1.z"), Zero(), positions)]):
        assert unshared_because(lvlm) == "the intervention 'decoder.L1.z' may act on the prefix"
    with intervened(lvlm, [Intervention(Site.parse("vision.L1.z"), Zero(), "last")]):
        assert "may act on the prefix" in unshared_because(lvlm)
    assert unshared_because(lvlm) == ""


def test_hooks_decoders_and_training_exclude_sharing() -> None:
    lvlm = model("llava")
    handle = lvlm.layers("decoder")[1].register_forward_hook(lambda _module, _args, output: None)
    assert "the effect of a hook is unknown" in unshared_because(lvlm)
    handle.remove()
    with lvlm.reading_answers(3):
        assert unshared_because(lvlm) == "the model is answering already"
    assert unshared_because(lvlm) == ""
