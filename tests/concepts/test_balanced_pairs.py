"""`balanced_pairs`: one pair per image, each answer about equally often true, against counts by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from concepts import counterfactuals, scenes
from concepts.counterfactual_pair import CounterfactualPair
from concepts.counterfactuals.pair_making import MAX_LEAD
from concepts.schema import ConceptDataset
from tests.toys.examples import example

KIND = "by a test"


def pairs_of(answers: Sequence[tuple[int, str]], candidates: tuple[str, ...], limit: int) -> list[tuple[int, str]]:
    """Return image and answer of the balanced pairs, of examples with these images and true answers."""
    data = ConceptDataset("answers", tuple(
        replace(example(image), id=str(i), group=str(image), candidates=candidates, answer=answer, split="neutral")
        for i, (image, answer) in enumerate(answers)
    ))  # fmt: skip

    def make(source: ConceptDataset) -> Iterator[CounterfactualPair]:
        for e in source:
            other = next(c for c in candidates if c != e.answer)
            yield CounterfactualPair(e, replace(e, id=f"{e.id}|x", answer=other), KIND, "x")

    counterfactuals.register(KIND, make)
    try:
        result = counterfactuals.balanced_pairs(data, KIND, limit=limit)
    finally:
        counterfactuals.KINDS.unregister(KIND)
    assert all(result.left_out.values())  # no reason without examples
    return [(int(pair.group), pair.clean.answer) for pair in result]


@pytest.mark.parametrize("kind", ["object", "color", "relation"])
def test_each_answer_is_equally_often_true_on_scenes(kind: str) -> None:
    pairs = counterfactuals.balanced_pairs(scenes.dataset(200, seed=0), kind, limit=40)
    assert Counter(pair.clean.answer for pair in pairs) == {"yes": 20, "no": 20}
    assert len({pair.group for pair in pairs}) == 40


YES_NO = ("yes", "no")


def test_pairs_wait_for_the_other_answer() -> None:
    first = [(i, "yes") for i in range(10)] + [(i, "no") for i in range(10, 20)]
    chosen = pairs_of(first, YES_NO, limit=12)
    counts = Counter(answer for _, answer in chosen)
    assert counts.total() == 12
    assert abs(counts["yes"] - counts["no"]) <= MAX_LEAD + 1
    assert len({image for image, _ in chosen}) == 12


def test_the_rarest_answer_of_an_image_is_used() -> None:
    both = [(i, answer) for i in range(6) for answer in YES_NO]
    assert Counter(answer for _, answer in pairs_of(both, YES_NO, limit=6)) == {"yes": 3, "no": 3}
    # Four images allow yes only: the others are used for no.
    some = [(i, answer) for i in range(8) for answer in YES_NO if answer == "yes" or i >= 4]
    assert Counter(answer for _, answer in pairs_of(some, YES_NO, limit=8)) == {"yes": 4, "no": 4}


def test_pairs_of_the_frequent_answer_are_left_out() -> None:
    rare = [(0, "no"), *((i, "yes") for i in range(1, 30))]
    assert Counter(answer for _, answer in pairs_of(rare, YES_NO, limit=29)) == {"yes": MAX_LEAD + 2, "no": 1}


@pytest.mark.parametrize("limit", [4, 40])
def test_a_kind_for_one_answer_is_not_balanced(limit: int) -> None:
    only = [(i, "yes") for i in range(9)]
    assert pairs_of(only, YES_NO, limit=limit) == only[:limit]


def test_answers_that_are_never_true_do_not_count() -> None:
    colors = [(i, ("red", "blue")[i % 2]) for i in range(12)]
    assert pairs_of(colors, ("red", "green", "blue"), limit=10) == colors[:10]


def test_questions_about_an_image_in_several_places_make_one_pair() -> None:
    scattered = [(0, "yes"), (1, "no"), (0, "no"), (2, "yes"), (1, "yes")]
    assert pairs_of(scattered, YES_NO, limit=9) == [(0, "yes"), (1, "no"), (2, "yes")]
