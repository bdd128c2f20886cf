"""Open answers: the rules of comparison, answers of a model and of a file, and choices for open questions."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from behavior import load_answers
from behavior.matching import MATCHES, matches_answer, normalize_answer
from concepts import ConceptDataset, scenes
from groundscope.core.errors import ConfigError, DataError

CASES = [
    ("Red.", "red", True, True),
    ("the red one", "red", False, True),
    ("reddish", "red", False, False),
    ("Two", "2", True, True),
    ("a T-shirt", "t shirt", True, True),
    ("1,000", "1000", True, True),
    ("3.5", "35", False, False),
    ("it's 3.5 m.", "3.5 m", False, True),
    ("don\u2019t know", "don't know", True, True),
    ("", "red", False, False),
    ("50%", "50", False, False),
]


@pytest.mark.parametrize(("text", "answer", "equal", "contained"), CASES)
def test_rules_agree_with_the_hand_made_truth(text: str, answer: str, equal: bool, contained: bool) -> None:
    assert matches_answer(text, [answer]) is equal
    assert matches_answer(text, ["other", answer], "contains") is contained
    assert matches_answer(text, [answer], "exact") is (text == answer)


PUNCTUATION = [*';/[]"{}()=+\\_-><@`,?!']


def vqa_release(text: str) -> str:
    """The steps of the VQA evaluation (VT-vision-lab/VQA, ``vqaEval.py``) without its table of contractions."""
    plain = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in PUNCTUATION:
        inside = f"{mark} " in plain or f" {mark}" in plain or re.search(r"(\d)(,)(\d)", plain) is not None
        plain = plain.replace(mark, "" if inside else " ")
    plain = re.sub(r"(?!<=\d)(\.)(?!\d)", "", plain)
    names = "none zero one two three four five six seven eight nine ten".split()
    numbers = {name: str(max(0, i - 1)) for i, name in enumerate(names)}
    words = [numbers.get(word, word) for word in plain.lower().split()]
    return " ".join(word for word in words if word not in {"a", "an", "the"})


def test_usual_short_answers_are_normalized_as_in_the_vqa_evaluation() -> None:
    texts = [
        "A red car",
        "two",
        "The dog.",
        "yes!",
        "black, white",
        "left-hand",
        "on the table",
        "3 people",
        "12:30",
        "St. Mary",
    ]
    for text in texts:
        assert normalize_answer(text).replace(":", "") == vqa_release(text).replace(":", ""), text


def open_questions() -> ConceptDataset:
    colors = scenes.dataset(20).where(kind="what_color")[:4]
    examples = tuple(replace(e, candidates=(), aliases=("grey",) if e.answer == "gray" else ()) for e in colors)
    return ConceptDataset("open", (*examples, scenes.dataset(10).where(kind="caption")[0]), {"loader": "table"})


def test_open_answers_of_a_file_are_right_or_wrong_and_captions_neither(tmp_path: Path) -> None:
    data = open_questions()
    texts = [f"It is {data[0].answer}.", f" {data[1].answer.upper()}. ", "purplish", data[3].answer, "a caption"]
    lines = [json.dumps({"question_id": e.id, "text": text}) for e, text in zip(data, texts, strict=True)]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    answers = load_answers(data, tmp_path / "answers.jsonl").answers
    assert [a.correct for a in answers] == [False, True, False, True, None]
    assert all(a.given is None for a in answers)


def test_choices_make_open_questions_answerable_by_candidates() -> None:
    data = open_questions()
    colors = list(dict.fromkeys(e.answer for e in data if e.kind != "caption"))
    chosen = data.with_choices([*colors, "mauve"])
    assert all(e.candidates == (*colors, "mauve") for e in chosen if e.kind != "caption")
    assert chosen[-1] == data[-1]
    with pytest.raises(DataError, match=r"the true answer '.*' is not one of the choices mauve, teal"):
        data.with_choices(["mauve", "teal"])
    with pytest.raises(DataError, match="has no open question"):
        chosen.with_choices(["mauve", "teal"])
    with pytest.raises(DataError, match="give two or more different answers"):
        data.with_choices(["red"])
    spelled = ConceptDataset("one", (replace(data[0], answer="grey", aliases=("gray",)),)).with_choices(["gray", "red"])
    assert spelled[0].answer == "gray"


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(
        ConfigError, match="unknown match 'contain'; choose from normalized, contains, exact; did you mean"
    ):
        matches_answer("a", ["a"], "contain")
    assert next(iter(MATCHES)) == "normalized"
