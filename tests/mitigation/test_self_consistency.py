"""Self-consistency: sentences, votes and tokens against counts by hand, and answers of the embedded model."""

from __future__ import annotations

import re

import pytest

import groundscope as gs
from concepts.scenes.icons import NOUNS
from groundscope.core.errors import ConfigError
from mitigation.training_free.methods import self_consistency
from mitigation.training_free.methods.self_consistency import (
    SelfConsistency,
    confirmed_shares,
    confirms,
    questions_about,
    removed_sentences,
)

METHOD = SelfConsistency(samples=3, attributes=False, nouns=tuple(NOUNS))


def test_shares_are_counts_of_sampled_answers() -> None:
    model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(20, splits=["caption"])
    examples, texts = data.examples[:2], ["a red apple and a dog.", "a blue car."]
    method = SelfConsistency(samples=3, attributes=False, nouns=tuple(NOUNS), temperature=3.0)
    shares = confirmed_shares(model, method, examples, texts)
    assert [sorted(s) for s in shares] == [["apple", "dog"], ["car"]]
    from dataclasses import replace

    from concepts.nouns import article

    for example, share in zip(examples, shares, strict=True):
        for noun, value in share.items():
            question = f"Is there {article(noun)} {noun} in the image?"
            name = f"{example.id}\0{question}\0{noun}"
            count = 0
            for seed in range(3):
                changed = replace(example, id=name, question=question)
                batch = next(model.batches([changed], 1))
                (text,) = model.generate_batch(batch, 16, sampling=gs.Sampling(temperature=3.0, seed=seed))
                count += text.lower().startswith("yes")
            assert value == pytest.approx(count / 3)
    assert len({v for s in shares for v in s.values()}) > 1


def test_captions_lose_the_sentences_that_are_not_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(20, splits=["caption"])
    plain = gs.answer(model, data)
    share = {"value": 0.4}

    def shares(_model: object, method: SelfConsistency, _examples: object, texts: list[str]) -> list[dict[str, float]]:
        return [dict.fromkeys(questions_about(method, text), share["value"]) for text in texts]

    monkeypatch.setattr(self_consistency, "confirmed_shares", shares)
    with METHOD.applied(model):
        assert gs.answer(model, data).answers == plain.answers  # a share of exactly the threshold stays
        share["value"] = 0.39
        removed = gs.answer(model, data)
    assert all(a.text and any(noun in a.text for noun in NOUNS) for a in plain.answers)
    for answer in removed.answers:
        assert not any(re.search(rf"\b{noun}\b", answer.text or "") for noun in NOUNS)
    assert model.decoder is None


def test_only_sentences_with_a_rejected_object_are_removed() -> None:
    text = "A man rides a horse. Two dogs run! Is there a cat? The end"
    method = SelfConsistency()
    spans = removed_sentences(text, {"man": 1.0, "horse": 0.39, "dog": 0.4, "cat": 0.0}, method)
    assert [text[a:b] for a, b in spans] == ["A man rides a horse. ", "Is there a cat? "]


def test_questions_have_the_attribute_before_the_noun() -> None:
    changed = questions_about(SelfConsistency(), "A small red apple. The apple is green.")
    assert changed == {"apple": ("Is there an apple in the image?", "Which objects are red?")}
    assert list(questions_about(SelfConsistency(), "An orange car and an orange.")) == ["car", "orange"]
    assert questions_about(SelfConsistency(attributes=False), "A red apple")["apple"] == (
        "Is there an apple in the image?",
    )


@pytest.mark.parametrize(
    ("answer", "expected"), [("yes", True), ("Yes.", True), ("no", False), ("yesterday", False), ("I say yes", False)]
)
def test_an_answer_confirms_if_it_begins_with_yes(answer: str, expected: bool) -> None:
    assert confirms(answer, "dog", "Is there a dog in the image?", {}) is expected


def test_answers_without_objects_and_scored_questions_are_those_of_the_model() -> None:
    model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)[:6]
    plain = gs.answer(model, data)
    written = gs.answer(model, data, generate=True)
    with METHOD.applied(model):
        assert [a.given for a in gs.answer(model, data).answers] == [a.given for a in plain.answers]
        assert gs.answer(model, data, generate=True).answers == written.answers
    with SelfConsistency(threshold=0).applied(model):
        assert model.decoder is None


def test_refusals() -> None:
    model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)
    assert SelfConsistency(attributes=False).problem(model, data[0]) is None
    problem = SelfConsistency().problem(model, data[0])
    assert problem is not None
    assert "2 prompt words unknown (objects, are)" in problem
    with pytest.raises(ConfigError, match="samples=0"):
        SelfConsistency(samples=0)
    with pytest.raises(ConfigError, match="threshold=2"):
        SelfConsistency(threshold=2)
    with pytest.raises(ConfigError, match="temperature=0: must be a number above 0"):
        SelfConsistency(temperature=0)
