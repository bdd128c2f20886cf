"""A prefix is read as if the model had written it: against plain transformers, token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from concepts import Example
from concepts.answer_prefix import join_words
from groundscope.core.errors import DataError
from lvlm import Lvlm, TokenSelection, answer_key
from lvlm.answer_keys import answer_tokens, check_prefixes
from tests.lvlm.test_answer_keys import with_template
from tests.toys.examples import example
from tests.toys.families import model

PREFIX = "the cat is"
FAMILIES = [
    "llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "gemma3",
    "paligemma",
    "mllama",
    "blip2_opt",
    "instructblip_t5",
    "florence2",
]


def forced(lvlm: Lvlm, question: Example, ids: list[int]) -> torch.Tensor:
    """Logits ``[V]`` after the given tokens, each decoded by `generate` with its cache as the only allowed one."""
    inputs = lvlm.encode(question).inputs
    start = inputs["decoder_input_ids" if lvlm.encoder_decoder else "input_ids"].shape[1]

    def allowed(_row: int, so_far: torch.Tensor) -> list[int]:
        return [ids[len(so_far) - start] if len(so_far) - start < len(ids) else 0]

    out: Any = lvlm.hf.generate(
        **inputs,
        max_new_tokens=len(ids) + 1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        prefix_allowed_tokens_fn=allowed,
    )
    return out.logits[-1][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_after_a_prefix_are_those_of_generation(family: str) -> None:
    lvlm = model(family)
    plain = replace(example(0), answer="red", candidates=("red", "green"))
    question = replace(plain, prefix=PREFIX)
    ids = lvlm.processor.tokenizer(PREFIX, add_special_tokens=False)["input_ids"]
    encoding = lvlm.encode(question)
    assert len(ids) == 3
    without = lvlm.encode(plain)
    assert encoding.tokens.prefix == tuple(range(without.tokens.length, without.tokens.length + 3))
    assert encoding.tokens.last == encoding.tokens.prefix[-1]
    assert encoding.tokens.image == without.tokens.image
    assert encoding.tokens.question == without.tokens.question
    assert encoding.tokens.positions(TokenSelection.parse("prefix:all")) == encoding.tokens.prefix
    assert without.tokens.positions(TokenSelection.parse("prefix:mean")) == ()
    got = lvlm.logits(lvlm.collate([encoding]))[0]
    torch.testing.assert_close(got, forced(lvlm, plain, ids), atol=2e-5, rtol=0)
    assert not torch.allclose(got, lvlm.logits(lvlm.collate([without]))[0], atol=1e-2)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_logits_after_a_prefix_are_those_of_appended_tokens(family: str) -> None:
    lvlm = model(family)
    plain = lvlm.encode(example(0)).inputs
    ids = torch.tensor([lvlm.processor.tokenizer(PREFIX, add_special_tokens=False)["input_ids"]])
    by_hand = {**plain, "input_ids": torch.cat([plain["input_ids"], ids], 1)}
    by_hand["attention_mask"] = torch.ones_like(by_hand["input_ids"])
    if "mm_token_type_ids" in plain:
        by_hand["mm_token_type_ids"] = torch.cat([plain["mm_token_type_ids"], torch.zeros_like(ids)], 1)
    with torch.no_grad():
        want = lvlm.hf(**by_hand).logits[0, -1]
    got = lvlm.logits(lvlm.encode(replace(example(0), prefix=PREFIX)).inputs)[0]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_a_batch_of_prefixes_equals_each_alone() -> None:
    lvlm = model("llava")
    texts = ["", "the cat is", "a", "the cat is a big red", "the dog is"]
    questions = [replace(example(n % 2), id=f"e{n}", prefix=text) for n, text in enumerate(texts)]
    alone = [lvlm.logits(lvlm.collate([lvlm.encode(question)]))[0] for question in questions]
    for batch in lvlm.batches(questions, 8):
        for i, row in zip(batch.index, lvlm.logits(batch.inputs, batch.images), strict=True):
            torch.testing.assert_close(row, alone[i], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        ("{image}{question} ASSISTANT:", "The car is"),
        ("{image}{question} ASSISTANT:", "The car is "),  # the space belongs to the next word
        ("{image}{question}\nassistant\n", "The car is"),
        ("{image}{question}[/INST]", "The car (not"),
    ],
)
def test_a_candidate_has_the_tokens_of_the_whole_answer(template: str, prefix: str) -> None:
    lvlm = with_template(template)
    question = replace(example(0), candidates=("red", "no"), answer="red", prefix=prefix)
    tokenizer = lvlm.processor.tokenizer
    whole = answer_tokens(lvlm, replace(question, prefix=""), f"{prefix.rstrip()} red")
    encoding = lvlm.encode(question)
    read = encoding.inputs["input_ids"][0, list(encoding.tokens.prefix)].tolist()
    assert [*read, *answer_tokens(lvlm, question, "red")] == whole
    key = answer_key(lvlm, question)
    assert [tokenizer.convert_ids_to_tokens(list(ids)) for ids in key.tokens] == [["Ġred", "ĠRed"], ["Ġno", "ĠNo"]]
    assert tokenizer.convert_ids_to_tokens(read)[-1] != "Ġ"


def test_words_are_joined_as_they_are_written() -> None:
    cases = [
        ("", "red", "red"),
        ("It is", "red", "It is red"),
        ("It is ", "red", "It is red"),
        ("a hot-", "dog", "a hot-dog"),
        ('It says "', "stop", 'It says "stop'),
        ('It says "stop"', "now", 'It says "stop" now'),
        ("One (", "red", "One (red"),
        ("Done.", "A cat", "Done. A cat"),
        ("x\n", "y", "x\ny"),
        ("\u56fe\u4e2d\u6709", "\u72d7", "\u56fe\u4e2d\u6709\u72d7"),
        ("\u56fe\u4e2d\u6709", "cat", "\u56fe\u4e2d\u6709 cat"),
    ]
    for start, words, text in cases:
        assert join_words(start, words) == text


def test_prefixes_that_cannot_be_read_are_refused() -> None:
    lvlm = model("llava")
    for prefix, message in [
        ("  ", "its prefix is white space; give the words"),
        ("the zyzzyva", "does not know 'zyzzyva'; give the words"),
        ("the cat </s>", "contains the special token '</s>'; give the words"),
        ("the <image> is", "contains the special token '<image>'; give the words"),
    ]:
        question = replace(example(0), prefix=prefix)
        with pytest.raises(DataError, match=message):
            lvlm.encode(question)
        with pytest.raises(DataError, match=f"example '{question.id.split('-')[0]}.*{message}"):
            check_prefixes(lvlm, [question])


def test_a_word_that_starts_no_token_is_refused() -> None:
    lvlm = with_template("{image}{question} ASSISTANT:", ("-", "red"))
    question = replace(example(0), candidates=("red", "no"), answer="red", prefix="infra-")
    with pytest.raises(
        DataError, match=r"'red' does not start a token after the prefix 'infra-' .*; end the prefix before"
    ):
        answer_key(lvlm, question)
    answer_key(lvlm, replace(question, prefix="infra"))  # a space comes between
    answer_key(lvlm, replace(question, prefix="infra-", candidates=("yes", "no"), answer="no"))
