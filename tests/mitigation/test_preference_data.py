"""Preference pairs by hand: what they hold, how they split, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from behavior import Answer, BehaviorResult, Cost
from concepts import scenes
from groundscope.core.errors import ConfigError, DataError
from mitigation import PreferenceData, PreferencePair, preference
from tests.toys.preferences import image, pair, preferences


def test_a_pair_of_an_example_has_its_images_request_and_group() -> None:
    from dataclasses import replace

    example = replace(scenes.dataset(10)[0], suffix="One word.", system="Be brief.", prefix="It is")
    converted = PreferencePair.of(example, "red", "blue", source="labels")
    assert converted.prompt == f"{example.question}\nOne word."
    assert (converted.chosen, converted.rejected) == ("It is red", "It is blue")
    assert (converted.images, converted.group, converted.system) == (
        (example.image,),
        example.group,
        "Be brief.",
    )
    example_of_pair = converted.example()
    assert (example_of_pair.request, example_of_pair.images, example_of_pair.system, example_of_pair.answer) == (
        converted.prompt,
        converted.images,
        "Be brief.",
        converted.chosen,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "'prompt' is blank"),
        ({"chosen": ""}, "'chosen' is blank"),
        ({"rejected": "\ud800"}, "'rejected' is blank or not text"),
        ({"chosen": "a dog ", "rejected": "a dog"}, "both 'a dog '"),
    ],
)
def test_pairs_without_a_preference_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pair(0, **changes)


def test_ids_are_unique_and_the_digest_depends_on_every_field() -> None:
    data = preferences()
    assert preferences().digest == data.digest
    changed = [data.filter(lambda p: p.id != "p1")]
    for change in ({"chosen": "x"}, {"images": (image(9),)}, {"group": "h"}, {"system": "s"}, {"provenance": {"a": 1}}):
        changed.append(PreferenceData("by hand", (pair(0, **change), *data.pairs[1:])))
    assert len({d.digest for d in changed} | {data.digest}) == len(changed) + 1
    with pytest.raises(DataError, match="two pairs have the id 'p0'"):
        PreferenceData("twice", (pair(0), pair(0)))


@pytest.mark.parametrize("n", [0, 1, 12])
def test_the_repr_is_short(n: int) -> None:
    text = repr(preferences(n))
    assert len(text.splitlines()) <= 5
    assert f"{n} pair{'s' * (n != 1)}," in text


@pytest.mark.parametrize("seed", range(4))
def test_no_image_is_on_both_sides_of_a_split(seed: int) -> None:
    """Pairs are connected by a group, or by any of their images: here 1-2-3 through a shared image, 4-5 through a group."""
    pairs = [
        pair(10, group="a", images=(image(1), image(2))),
        pair(11, group="b", images=(image(2),)),
        pair(12, group="b", images=(image(3),)),
        pair(13, group="c", images=(image(4),)),
        pair(14, group="c", images=(image(5),)),
        *(pair(20 + i, group=f"d{i}", images=(image(20 + i),)) for i in range(8)),
    ]
    first, second = PreferenceData("linked", tuple(pairs)).split(0.3, seed=seed)
    sides = [{p.id for p in part} for part in (first, second)]
    assert sides[0] | sides[1] == {p.id for p in pairs}
    for linked in ({"p10", "p11", "p12"}, {"p13", "p14"}):
        assert any(linked <= side for side in sides)
    images = [{i.identity for p in part for i in p.images} for part in (first, second)]
    assert not images[0] & images[1]
    assert first
    assert 2 <= len(second) <= 6
    reversed_data = PreferenceData("linked", tuple(reversed(pairs)))
    assert {p.id for p in reversed_data.split(0.3, seed=seed)[1]} == sides[1]


def test_a_split_needs_two_images_and_a_share() -> None:
    with pytest.raises(DataError, match="cannot be divided"):
        preferences(2).split()
    with pytest.raises(ConfigError, match="share=1"):
        preferences().split(1)


def test_exchanged_pairs_are_half_of_them() -> None:
    data = preferences(8)
    control = data.exchanged(seed=1)
    opposite = [(a.chosen, a.rejected) == (b.rejected, b.chosen) for a, b in zip(data, control, strict=True)]
    same = [(a.chosen, a.rejected) == (b.chosen, b.rejected) for a, b in zip(data, control, strict=True)]
    assert sum(opposite) == sum(same) == 4
    assert data.exchanged(seed=1).digest == control.digest != data.exchanged(seed=2).digest


# ---- makers


def table(tmp_path: Path, *lines: str) -> Path:
    for name in ("a", "b"):
        image(ord(name)).load().save(tmp_path / f"{name}.png")
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_a_table_of_pairs(tmp_path: Path) -> None:
    file = table(
        tmp_path, "image,question,chosen,rejected,group,id", "a.png,What?,a cat,a dog,g,x", "b.png,What?,one,two,,y"
    )
    data = preference.from_table(file)
    assert [(p.id, p.prompt, p.chosen, p.rejected, p.source) for p in data] == [
        ("x", "What?", "a cat", "a dog", "labels"),
        ("y", "What?", "one", "two", "labels"),
    ]
    assert data[0].group == "g"
    assert data[1].group == data[1].images[0].identity


def test_a_table_of_judged_answers(tmp_path: Path) -> None:
    rows = [
        "a.png,What?,a cat,yes",
        "a.png,What?,a tom,1",
        "a.png,What?,a dog,no",
        "b.png,What?,a cat,no",
        "a.png,How?,ok,true",
    ]
    data = preference.from_table(table(tmp_path, "image,question,answer,correct", *rows))
    assert [(p.chosen, p.rejected) for p in data] == [("a cat", "a dog"), ("a tom", "a dog")]
    assert data.provenance["left_out"] == {"questions with answers of one kind": 2}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,question,chosen,rejected,correct", "a.png,What?,a,b,yes"], "columns of both forms"),
        (["image,question", "a.png,What?"], "columns of neither form"),
        (
            ["image,question,chosen,rejected", "a.png,What?,a,a"],
            "line 2: preference '1': chosen and rejected are both 'a'",
        ),
        (["image,question,chosen,rejected", "../a.png,What?,a,b"], "leaves the image folder"),
        (["image,question,chosen,rejected", "c.png,What?,a,b"], "line 2: image .*c.png' cannot be read"),
        (["image,question,chosen,rejected", "a.png,What?,,b"], "field 'chosen' must hold text"),
        (["image,question,answer,correct", "a.png,What?,a,maybe"], "column 'correct' must hold yes or no"),
        (
            ["image,question,answer,correct", "a.png,What?,a,yes", "a.png,What?,a,no"],
            "line 3: the answer 'a' is judged both",
        ),
        (["image,question,answer,correct", "a.png,What?,a,yes"], "no question has both"),
        (["image,question,chosen,rejected"], "the table has no rows"),
    ],
)
def test_wrong_tables_give_one_sentence(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        preference.from_table(table(tmp_path, *lines))
    assert "\n" not in str(error.value)


def answered(name: str, text: str, correct: bool | None) -> Answer:
    return Answer(name, "g", "neutral", "object", "existence", "?", "yes", ("yes", "no"), None, correct, text=text)


def test_sampled_answers_become_pairs_of_right_and_wrong_ones() -> None:
    questions = scenes.dataset(10)[:3]
    first, second, third = (e.id for e in questions)
    rows = [
        *(
            answered(f"{first}{s}", t, c)
            for s, t, c in (("", "yes", True), ("#2", "no", False), ("#3", "maybe", False))
        ),
        *(answered(f"{second}{s}", "yes", True) for s in ("", "#2", "#3")),
        answered(third, "a caption", None),
    ]
    result = BehaviorResult(tuple(rows), Cost(None, None, len(rows)))
    data = preference.from_answers(questions, result, limit=5)
    assert {(p.chosen, p.rejected) for p in data} == {("yes", "no"), ("yes", "maybe")}
    assert {p.group for p in data} == {questions[0].group}
    assert data.provenance["left_out"] == {"questions with answers of one kind": 2}
    (only_pair,) = preference.from_answers(questions, result, seed=3)
    assert only_pair.id == first
    with pytest.raises(DataError, match="is to none of the 1 questions"):
        preference.from_answers(questions[:1], result)
    with pytest.raises(DataError, match="both a right and a wrong answer"):
        preference.from_answers(questions, BehaviorResult(tuple(rows[3:]), Cost(None, None, 4)))
    with pytest.raises(ConfigError, match="limit=0"):
        preference.from_answers(questions, result, limit=0)


def test_scored_candidates() -> None:
    example = scenes.dataset(10)[0]
    assert preference.scored_pair(example, ["a", "b"], [1.0, 1.0]) is None
    for scores in ([1.0], [1.0, float("nan")]):
        with pytest.raises(DataError, match="one finite score"):
            preference.scored_pair(example, ["a", "b"], scores)
