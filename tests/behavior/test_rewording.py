"""Answers that change when a question is asked otherwise: the rules by hand, and rates against a naive count."""

from __future__ import annotations

from dataclasses import replace

import pytest

import groundscope as gs
from behavior.card import REWORDINGS, Rewording, fact_cells, reword, rewording_cells
from concepts.schema import Example
from groundscope.core.errors import ConfigError

YES_NO = ("yes", "no")


def about(question: str, answer: str = "yes", candidates: tuple[str, ...] = YES_NO) -> Example:
    first = gs.scenes.dataset(10)[0]
    return replace(first, question=question, answer=answer, candidates=candidates)


@pytest.mark.parametrize(
    ("rule", "question", "expected"),
    [
        ("contain", "Is there a traffic light in the image?", "Does the image contain a traffic light?"),
        ("contain", "Is there an apple in this image?", "Does the image contain an apple?"),
        ("contain", "Is the apple red?", None),
        ("see", "is there a dog in the image?", "Can you see a dog in the image?"),
        ("which", "What color is the wine glass?", "Which color does the wine glass have?"),
        ("which", "What is the color?", None),
        ("describe_as", "Is the apple red?", "Would you describe the apple as red?"),
        ("describe_as", "Is the apple left of the cup?", None),
        ("look", "Who is it?", "Look at the image. Who is it?"),
    ],
)
def test_paraphrases_by_hand(rule: str, question: str, expected: str | None) -> None:
    reworded = REWORDINGS[rule].make(about(question))
    assert (None if reworded is None else reworded.question) == expected
    if reworded is not None:
        assert (reworded.answer, reworded.candidates) == ("yes", YES_NO)


def test_formats_by_hand() -> None:
    colors = ("red", "green", "blue")
    choice = REWORDINGS["as_choice"].make(about("What color is it?", "green", colors))
    assert choice is not None
    assert choice.request == "What color is it? A. red B. green C. blue\nAnswer with the letter of the right option."
    assert (choice.candidates, choice.answer) == (("A", "B", "C"), "B")
    yes_no = REWORDINGS["as_yes_no"].make(about("What color is it?", "green", colors))
    assert yes_no is not None
    assert (yes_no.question, yes_no.answer, yes_no.candidates) == ("What color is it? Is it green?", "yes", YES_NO)
    assert REWORDINGS["as_yes_no"].make(about("Is it green?")) is None
    assert REWORDINGS["as_open"].make(about("What is it?", "a cat", ())) is None
    assert REWORDINGS["as_choice"].make(about("What is it?", "a cat", ())) is None


def test_rates_are_those_of_a_naive_count() -> None:
    model = gs.load_lvlm("tiny")
    data = gs.scenes.dataset(10).filter(lambda e: bool(e.candidates))[:24]
    answers = gs.answer(model, data)
    rules = ["contain", "look", "as_open", "as_yes_no"]
    result = reword(model, data, answers, rules=rules, max_new_tokens=2)
    first = {a.id: a for a in answers.answers}
    changed: dict[str, dict[str, bool]] = {"paraphrase": {}, "format": {}}
    for name in rules:
        rows = result.answers[name].answers
        assert {a.id for a in rows} == {e.id for e in data if REWORDINGS[name].make(e) is not None}
        own = []
        for a in rows:
            before = first[a.id]
            reached = (a.given == "yes") != (before.given == before.answer)
            differs = reached if name == "as_yes_no" else a.given != before.given
            own.append(differs)
            kind = changed[REWORDINGS[name].kind]
            kind[a.id] = kind.get(a.id, False) or differs
        assert result.rates[name].value == pytest.approx(sum(own) / len(own))
    for kind, values in changed.items():
        assert result.rates[kind].value == pytest.approx(sum(values.values()) / len(values))
        assert result.rates[kind].n == len(values)
    card = gs.evaluation_card({"tiny": {"scenes": answers}}, reworded={"tiny": {"scenes": result.rates}})
    head, line = fact_cells(card)
    assert line[head.index("changes under paraphrase")].startswith(f"{100 * result.rates['paraphrase'].value:.1f} [")
    assert [row[3] for row in rewording_cells(card)[1:]] == rules


def test_rules_are_an_open_table() -> None:
    REWORDINGS.register(
        "please", Rewording("paraphrase", lambda e: replace(e, question=f"Please answer. {e.question}"))
    )
    try:
        model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10)[:2]
        assert set(reword(model, data, gs.answer(model, data), rules=["please"]).rates) == {"paraphrase", "please"}
    finally:
        REWORDINGS.unregister("please")
    with pytest.raises(ConfigError, match="kind must be paraphrase or format"):
        REWORDINGS.register("other", Rewording("style", lambda e: e))
    with pytest.raises(ConfigError, match=r"unknown rewording 'contains'.*did you mean contain"):
        reword(gs.load_lvlm("tiny"), data, gs.answer(model, data), rules=["contains"])
