"""FGSD against whole forwards and brute force: scores of answers, refusals, the threshold and its rates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import groundscope as gs
from groundscope.core.errors import ConfigError, DataError, ModelError
from mitigation import training_free_methods
from mitigation.self_judgment import (
    HARM_TEMPLATE,
    HarmRefusal,
    Judge,
    calibrate_refusal,
    choose_threshold,
    harm_scores,
    refusal_rates,
)
from mitigation.self_judgment.fgsd import split_sentences
from tests.toys.decoding_oracle import double_model
from tests.toys.examples import example
from tests.toys.judge_oracle import naive_score

TEMPLATE = "Is there {sentence} in the image?"
METHOD = HarmRefusal(0.0, refusal="no.", template=TEMPLATE)
CAPTIONS = gs.scenes.dataset(60, seed=3).where(kind="caption")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_the_score_of_an_answer_is_the_largest_of_its_sentences(family: str) -> None:
    lvlm = double_model(family)
    examples = [example(0), example(1), example(0)]
    answers = ["a cat. a small dog . . a red car", "a bell.", " . "]
    sentences = [["a cat", "a small dog", "a red car"], ["a bell"]]
    scores = harm_scores(lvlm, examples, answers, Judge(TEMPLATE, alpha=0.5))
    for row, several in enumerate(sentences):
        each = [naive_score(lvlm, examples[row], f"Is there {s} in the image?", 0.5) for s in several]
        assert scores[row] == pytest.approx(max(each), abs=1e-5)
    assert scores[2] == -math.inf


def test_answers_with_a_score_at_the_threshold_become_the_refusal() -> None:
    lvlm = gs.load_lvlm("tiny")
    plain = [str(a.text) for a in gs.answer(lvlm, CAPTIONS).answers]
    scores = harm_scores(lvlm, list(CAPTIONS), plain, METHOD.judge)
    ordered = np.sort(np.unique(scores))
    threshold = float(ordered[-2:].mean())  # refuses one answer, or several with one score
    expected = ["no ." if s > threshold else text for s, text in zip(scores, plain, strict=True)]
    assert 0 < expected.count("no .") < len(plain)
    with replace(METHOD, threshold=threshold).applied(lvlm):
        assert [a.text for a in gs.answer(lvlm, CAPTIONS, batch_size=2).answers] == expected
        assert lvlm.ask(CAPTIONS[0].image, CAPTIONS[0].question) == expected[0]
        sampled = gs.answer(lvlm, CAPTIONS[:2], sampling=gs.Sampling(seed=1))
        assert all(a.text for a in sampled.answers)
    assert lvlm.decoder is None
    with replace(METHOD, threshold=float(ordered[-1]) + 1).applied(lvlm):
        assert [a.text for a in gs.answer(lvlm, CAPTIONS).answers] == plain
    with replace(METHOD, threshold=float(ordered[0]) - 1).applied(lvlm):
        assert {a.text for a in gs.answer(lvlm, CAPTIONS).answers} == {"no ."}


def test_answers_scored_by_candidates_stay() -> None:
    lvlm, questions = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["conflict"])
    plain = gs.answer(lvlm, questions).answers
    with replace(METHOD, threshold=-1e9).applied(lvlm):
        assert gs.answer(lvlm, questions).answers == plain


def test_sentences_are_the_parts_between_full_stops() -> None:
    assert split_sentences("A cat. It sleeps.. ") == ("A cat", "It sleeps")
    assert split_sentences("") == ()
    assert Judge(HARM_TEMPLATE).question("Do it").startswith("Answer:Do it\n\nDoes the Answer contains harmful")


def brute_force(scores: np.ndarray, harmful: np.ndarray, limit: float) -> tuple[float, float]:
    """The largest share of harmful answers under the limit, and the smallest over-refusal with it, over all sets."""
    shares = []
    for cut in [*scores, math.inf]:
        refused = [s >= cut for s in scores]
        hits = sum(r and h for r, h in zip(refused, harmful, strict=True)) / sum(harmful)
        over = sum(r and not h for r, h in zip(refused, harmful, strict=True)) / sum(~harmful)
        if over <= limit:
            shares.append((hits, -over))
    hits, over = max(shares)
    return hits, -over


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_that_of_brute_force(seed: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    harmful = rng.random(40) < 0.4
    scores = (rng.normal(size=40) + harmful).round(1)  # with ties
    scores[~harmful & (scores < -1)] = -np.inf
    rates = refusal_rates(scores, harmful, choose_threshold(scores, harmful, limit), list(range(40)))
    hits, over = brute_force(scores, harmful, limit)
    assert (rates.refused_harmful.value, rates.over_refusal.value) == (pytest.approx(hits), pytest.approx(over))
    assert rates.refused_harmful.n + rates.over_refusal.n == 40
    for rate in (rates.refused_harmful, rates.over_refusal):
        assert 0 <= rate.low <= rate.value <= rate.high <= 1
        assert rate.low < rate.high


def test_thresholds_are_between_neighboring_scores() -> None:
    assert choose_threshold([1.0, 3.0], [False, True]) == 2.0
    assert choose_threshold([3.0, 1.0], [False, True]) == 4.0  # nothing can be refused without the harmless answer
    above = float(np.nextafter(1.0, 2.0))
    assert choose_threshold([1.0, above], [False, True]) == above


def test_intervals_count_images_and_not_answers() -> None:
    harmful = np.tile([True, False], 40)
    scores = np.where(np.repeat(np.arange(8), 10) % 2, 1.0, 0.0)  # alike within the groups of ten
    alone = refusal_rates(scores, harmful, 0.5, list(range(80)))
    grouped = refusal_rates(scores, harmful, 0.5, list(np.repeat(np.arange(8), 10)))
    assert grouped.over_refusal.value == alone.over_refusal.value == 0.5
    widths = [r.over_refusal.high - r.over_refusal.low for r in (grouped, alone)]
    assert widths[0] > 1.5 * widths[1]
    assert grouped.over_refusal.few_groups


def test_a_calibrated_method_refuses_what_its_rates_say() -> None:
    lvlm = gs.load_lvlm("tiny")
    plain = [str(a.text) for a in gs.answer(lvlm, CAPTIONS).answers]
    harmful = [i % 2 == 0 for i in range(len(plain))]
    result = calibrate_refusal(lvlm, list(CAPTIONS), plain, harmful, replace(METHOD, threshold=None), limit=0.4)
    with result.method.applied(lvlm):
        refused = [a.text == "no ." for a in gs.answer(lvlm, CAPTIONS).answers]
    share = np.mean([r for r, h in zip(refused, harmful, strict=True) if not h])
    assert result.rates.over_refusal.value == pytest.approx(share)
    assert share <= 0.4
    assert result.method == replace(METHOD, threshold=result.rates.threshold)


def test_unusable_methods_and_data_are_refused_before_work() -> None:
    lvlm = gs.load_lvlm("tiny")
    with pytest.raises(ModelError, match=r"FGSD has no threshold for tiny.*calibrate_refusal"):
        replace(METHOD, threshold=None).check(lvlm)
    with pytest.raises(ModelError, match=r"cannot read the judge's prompt: not applicable: \d+ prompt words unknown"):
        HarmRefusal(0.0, refusal="no.").check(lvlm)
    with pytest.raises(ModelError, match=r"cannot write the refusal: not applicable: 5 prompt words unknown \(Sorry"):
        HarmRefusal(0.0, template=TEMPLATE).check(lvlm)
    assert "Sorry" in str(HarmRefusal(0.0, template=TEMPLATE).problem(lvlm, CAPTIONS[0]))
    assert METHOD.problem(lvlm, CAPTIONS[0]) is None
    values: dict[str, dict[str, Any]] = {
        "threshold=nan: must be a finite number": {"threshold": math.nan},
        "the refusal is blank": {"refusal": " "},
        "it has no place for the sentence": {"template": "Is it harmful?"},
        "unknown blind 'none'": {"blind": "none"},
    }
    for problem, options in values.items():
        with pytest.raises(ConfigError, match=problem):
            HarmRefusal(**options)
    with pytest.raises(DataError, match="2 answers and 1 example;"):
        harm_scores(lvlm, [CAPTIONS[0]], ["a cat", "a dog"], METHOD.judge)
    with pytest.raises(DataError, match="all 2 answers are harmful"):
        calibrate_refusal(lvlm, list(CAPTIONS[:2]), ["a cat", "a dog"], [True, True], METHOD)
    with pytest.raises(ConfigError, match="limit=1: the largest share"):
        calibrate_refusal(lvlm, list(CAPTIONS[:2]), ["a cat", "a dog"], [True, False], METHOD, limit=1)
    with pytest.raises(DataError, match="1 of 2 scores are NaN"):
        choose_threshold([math.nan, 1.0], [True, False])
    with pytest.raises(DataError, match="none of the 2 answers has a finite score"):
        choose_threshold([-math.inf, -math.inf], [True, False])
    assert training_free_methods["fgsd"] is HarmRefusal
