"""Answer keys where whitespace between the prompt and the answer matters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from activation_store.tracing.continuation import append_answers
from lvlm import Lvlm, answer_key, wrap_lvlm
from lvlm.answer_keys import answer_tokens
from lvlm.encoding.processor import Parts
from tests.toys.examples import example
from tests.toys.families import BUILDERS, build, model

ANSWERS = ("yes", "no", "red")


def spaced(*merged: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for which ``yes`` and `` yes`` are two tokens, like that of GPT-2, and further merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    for word in ("yes", "no", "red", "Yes", "No", "Red"):
        pairs = [*((word[:n], word[n]) for n in range(1, len(word))), ("Ġ", word)]  # Ġ stands for the space
        for first, second in pairs:
            if first + second not in vocabulary:
                merges.append((first, second))
                vocabulary[first + second] = len(vocabulary)
    for first, second in merged:
        merges.append((first, second))
        vocabulary[first + second] = len(vocabulary)
    words = Tokenizer(models.BPE(vocabulary, merges))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merged)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken("<image>", normalized=False), AddedToken("[/INST]", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<image>")


def with_template(template: str, *merged: tuple[str, str]) -> Lvlm:
    network, processor = build("llava")
    spec = replace(model("llava").spec, template=template)
    return wrap_lvlm(
        network, Parts(spaced(*merged), processor.image_processor, "<image>"), spec=spec, name="s", validate=False
    )


@pytest.mark.parametrize(
    ("template", "space"),
    [
        ("USER: {image}\n{question} ASSISTANT:", True),
        ("{image}{question}", True),
        ("{image}{question}\nassistant\n", False),
        ("{image}{question} A: ", False),  # the space is the prompt's own
        ("{image}{question}[/INST]", False),  # a token that is no text
    ],
)
def test_the_answer_key_follows_the_whitespace_at_the_end_of_the_prompt(template: str, space: bool) -> None:
    lvlm = with_template(template)
    question = replace(example(0), candidates=ANSWERS, answer="yes")
    key = answer_key(lvlm, question)
    name: Any = lvlm.processor.tokenizer.convert_ids_to_tokens
    mark = "Ġ" if space else ""
    assert [name(list(ids)) for ids in key.tokens] == [[f"{mark}{a}", f"{mark}{a.capitalize()}"] for a in ANSWERS]
    # The tokens the model is given, and the answer's, read as one text.
    prompt = lvlm.prompt(question.question)
    ids = lvlm.processor.tokenizer(prompt)["input_ids"] + answer_tokens(lvlm, question, "yes")
    assert lvlm.processor.tokenizer.decode(ids) == prompt + (" yes" if space else "yes")


@pytest.mark.parametrize("family", list(BUILDERS))
def test_every_family_reads_an_answer_after_its_own_prompt(family: str) -> None:
    lvlm = model(family)
    question = replace(example(0), candidates=("yes", "no"), answer="yes")
    tokenizer = lvlm.processor.tokenizer
    key = answer_key(lvlm, question)
    assert [tokenizer.convert_ids_to_tokens(list(ids)) for ids in key.tokens] == [["yes"], ["no"]]
    assert torch.equal(key.scores(torch.eye(len(tokenizer))[key.tokens[0][0]]), torch.tensor([1.0, 0.0]))


def test_a_forced_answer_begins_with_the_answer_key() -> None:
    lvlm = model("qwen2_vl")
    question = replace(example(0), candidates=("yes", "no"), answer="yes")
    batch = next(lvlm.batches([question], 1))
    on = append_answers(lvlm, batch)
    first = on.inputs["input_ids"][0, on.tokens[0].generated[0]] if on.tokens[0].generated else None
    assert first is not None
    assert int(first) in answer_key(lvlm, question).tokens[0]
