"""Pairs from hand-made diagnoses: which answers are used, and what is chosen and rejected."""

from __future__ import annotations

from dataclasses import replace

import pytest

from concepts import scenes
from concepts.schema import Example
from diagnosis import Diagnoses, Diagnosis, preference_pairs
from groundscope.core.errors import ConfigError, DataError

EXAMPLES = tuple(scenes.dataset(30).where(split="conflict"))[:10]
VERDICTS = ("overridden by the prior", "overridden late", "not seen", "not integrated", "other", *(None,) * 5)


def wrong_answer(example: Example) -> str:
    return next(c for c in example.candidates if c != example.answer)


def diagnoses() -> Diagnoses:
    rows = []
    for example, verdict in zip(EXAMPLES, VERDICTS, strict=True):
        about = {name: getattr(example, name) for name in ("id", "group", "level", "split", "kind", "question")}
        answer = example.answer if verdict is None else wrong_answer(example)
        rows.append(Diagnosis({**about, "truth": example.answer}, answer, "", verdict, 0.75))
    return Diagnoses(tuple(rows), (), "m", "c", "w")


def test_overridden_answers_are_rejected_and_their_truth_is_chosen() -> None:
    data = preference_pairs(diagnoses(), EXAMPLES)
    assert [p.id for p in data] == [e.id for e in EXAMPLES[:2]]
    for pair, example in zip(data, EXAMPLES, strict=False):
        assert (pair.chosen, pair.rejected) == (example.answer, wrong_answer(example))
        assert (pair.source, pair.group, pair.images) == ("diagnosis", example.group, (example.image,))
    assert data[0].provenance["verdict"] == "overridden by the prior"
    assert data[0].provenance["confidence"] == 0.75
    assert data.provenance["left_out"] == {"wrong answers with other verdicts": 3}
    every = preference_pairs(diagnoses(), EXAMPLES, verdicts=None)
    assert [p.id for p in every] == [e.id for e in EXAMPLES[:5]]
    assert [p.id for p in preference_pairs(diagnoses(), EXAMPLES, verdicts=["not seen"])] == [EXAMPLES[2].id]


@pytest.mark.parametrize(("anchors", "n"), [(0.0, 0), (1.0, 2), (1.5, 3), (9.0, 5)])
def test_anchors_are_right_answers_against_the_prior_or_another_candidate(anchors: float, n: int) -> None:
    right = {e.id: e for e in EXAMPLES[5:]}
    data = preference_pairs(diagnoses(), EXAMPLES, anchors=anchors, seed=3)
    own = data.filter(lambda p: p.provenance["verdict"] == "right")
    assert len(own) == n == data.provenance["anchors"]
    for pair in own:
        example = right[pair.id]
        assert pair.chosen == example.answer
        assert pair.rejected in example.candidates
        if example.prior_answer != example.answer:
            assert pair.rejected == example.prior_answer
    assert data.digest == preference_pairs(diagnoses(), tuple(reversed(EXAMPLES)), anchors=anchors, seed=3).digest


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"unknown verdict 'overriden late'.*did you mean overridden late"):
        preference_pairs(diagnoses(), EXAMPLES, verdicts=["overriden late"])
    with pytest.raises(ConfigError, match="anchors=-1"):
        preference_pairs(diagnoses(), EXAMPLES, anchors=-1)
    with pytest.raises(DataError, match="is not among the data"):
        preference_pairs(diagnoses(), EXAMPLES[1:])
    with pytest.raises(DataError, match="is another question in the data"):
        preference_pairs(diagnoses(), [replace(EXAMPLES[0], question="Why?"), *EXAMPLES[1:]])
    with pytest.raises(DataError, match="no wrong answer has the verdict lost at the projector; there are: overridden"):
        preference_pairs(diagnoses(), EXAMPLES, verdicts=["lost at the projector"])
