"""SumGD: drafts, tags and words after the summary, against naive continuations with whole forwards."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import groundscope as gs
from mitigation.training_free.methods.sumgd import SumGD, _Caption, _Decoder, vocabulary_tagger

LVLM = gs.load_lvlm("tiny")
QUESTION = next(e for e in gs.scenes.dataset(10) if e.kind == "caption")


def ids(text: str) -> list[int]:
    return LVLM.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def naive_word(written: Sequence[int]) -> list[int]:
    """The next word (one token in this tokenizer) after written tokens, by one whole forward."""
    inputs = LVLM.on_device(dict(LVLM.encode(QUESTION).inputs))
    row = torch.cat([inputs["input_ids"], torch.tensor([list(written)], dtype=torch.long)], 1)
    inputs |= {"input_ids": row, "attention_mask": torch.ones_like(row)}
    with torch.no_grad():
        return [int(LVLM.hf(**inputs, use_cache=False).logits[0, -1].argmax())]


def caption(method: SumGD, tagger: object = None) -> _Caption:
    decoder = _Decoder(method, tagger or vocabulary_tagger())  # type: ignore[arg-type]
    return _Caption(decoder, LVLM, LVLM.collate([LVLM.encode(QUESTION)]), "a", None)


@pytest.mark.parametrize("content", [True, False])
def test_a_content_word_follows_the_summary_and_the_sentence(content: bool) -> None:
    spans: list[tuple[str, int, int]] = []

    def tag(text: str, start: int, stop: int) -> bool:
        spans.append((text, start, stop))
        return content

    state = caption(SumGD(), tag)
    before, sentence, state.summary = ids("a yellow guitar ."), ids("a"), ids("a yellow guitar , a yellow banana ,")
    state.tokens, state.sentence = [*before, *sentence], len(before)
    expected = naive_word([*state.summary, *sentence] if content else state.tokens)
    assert naive_word([*state.summary, *sentence]) != naive_word(state.tokens)
    assert state._next_word() == expected
    ((text, start, stop),) = spans
    draft: list[int] = []
    for _ in range(3):  # the word and two further ones
        draft += naive_word([*state.tokens, *draft])
    assert text.startswith(LVLM.processor.tokenizer.decode([*sentence, *draft]).strip())
    assert text[start:stop].split() == LVLM.processor.tokenizer.decode(draft[:1]).split()


def test_the_summary_follows_each_sentence_and_sees_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    state = caption(SumGD(summary_prompt="Describe the image: {}", summary_tokens=5))
    words = iter([ids("a"), ids("dog"), ids("."), ids("a"), ids("cat"), []])
    monkeypatch.setattr(state, "_next_word", lambda: next(words))
    assert state.write(40) == ids("a dog . a cat")
    assert state.sentence == 3
    prompt = LVLM.prompt(f"Describe the image: {LVLM.processor.tokenizer.decode(ids('a dog .'))}", 0)
    assert LVLM.processor.tokenizer.decode(state.summary).strip() == LVLM.generate([], prompt, max_new_tokens=5)


def test_the_first_sentence_is_plain() -> None:
    data = gs.ConceptDataset("one", (QUESTION,))
    plain = gs.answer(LVLM, data, max_new_tokens=7)
    with SumGD(tagger=lambda *_: True).applied(LVLM):
        assert gs.answer(LVLM, data, max_new_tokens=7).answers == plain.answers


def test_the_tagger_is_named_in_the_parameters() -> None:
    def my_tagger(_text: str, _start: int, _stop: int) -> bool:
        return False

    assert SumGD(tagger=my_tagger).parameters["tagger"].endswith("my_tagger")
    assert SumGD().parameters["tagger"] is None
