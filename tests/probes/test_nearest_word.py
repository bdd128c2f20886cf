"""Nearest words and what they predict, against loops and a logistic regression of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from activation_store import MemorySource
from groundscope.core.errors import ProbeError
from probes.analysis.logit_lens import Unembedding
from probes.analysis.nearest_word import (
    WordScores,
    log_odds_slopes,
    predict_wrong_answers,
    score_vectors,
    score_words,
)

WORDS = ("cat", "dog", "owl", "key")


def source(x: np.ndarray) -> MemorySource:
    table = {"id": [f"q{i}" for i in range(len(x))], "group": [f"g{i // 2}" for i in range(len(x))]}
    return MemorySource({("resid_post", "object:mean"): x}, table)


def test_words_are_scored_by_the_unembedding_and_by_vectors() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(9, 6)).astype(np.float32)
    matrix[:8:2] = 2 * np.linalg.qr(rng.normal(size=(6, 6)))[0][:4]
    vocabulary = {word: 2 * i for i, word in enumerate(WORDS)}
    truth = np.arange(30) % 4
    x = matrix[2 * truth][:, None] * np.array([0.0, 3.0])[:, None] + rng.normal(size=(30, 2, 6))
    x[7] = np.nan
    store = source(x)
    head = Unembedding(matrix, np.ones(6, np.float32), None, None, "rms", 0.0)
    scores = score_words(store, WORDS, vocabulary, tokens="object:mean", unembedding=head)
    for layer in (0, 1):
        for row in (0, 5, 29):
            h = x[row, layer] / np.sqrt((x[row, layer] ** 2).mean())
            logits = matrix @ h
            log_p = logits - np.log(np.exp(logits).sum())
            np.testing.assert_allclose(scores.values[layer, row], log_p[::2][:4], atol=1e-4)
    names = [WORDS[t] for t in truth]
    near = scores.words_at(1)
    assert near[7] == ""
    table = scores.accuracy(names).set_index("layer")
    right = [a == b for i, (a, b) in enumerate(zip(near, names, strict=True)) if i != 7]
    assert table.loc[1, "accuracy"] == pytest.approx(np.mean(right))
    assert (table["n"] == 29).all()
    assert table.loc[1, "accuracy"] > 0.8 > table.loc[0, "accuracy"]
    assert table.loc[1, "low"] < table.loc[1, "accuracy"] <= table.loc[1, "high"]
    # A text tower: vectors of the words in the space of the rows, behind a modality gap.
    vectors = {word: matrix[2 * i] + 20 for i, word in enumerate(WORDS)}
    by_vector = score_vectors(store, vectors, tokens="object:mean")
    assert by_vector.accuracy(names).set_index("layer").loc[1, "accuracy"] > 0.8
    a = x[:, 1] - np.nanmean(x[:, 1], axis=0)
    b = np.array(list(vectors.values())) - np.mean(list(vectors.values()), axis=0)
    cosine = a[3] @ b[2] / np.linalg.norm(a[3]) / np.linalg.norm(b[2])
    assert by_vector.values[1, 3, 2] == pytest.approx(cosine, abs=1e-5)


def test_slopes_equal_a_logistic_regression() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=200)
    outcome = (rng.random(200) < 1 / (1 + np.exp(1 - 1.5 * x))).astype(float)
    weights = np.stack([np.ones(200), rng.integers(0, 3, size=200)]).astype(float)
    slopes = log_odds_slopes(outcome, x, weights)
    for weight, slope in zip(weights, slopes, strict=True):
        model = LogisticRegression(C=1e3, tol=1e-10, max_iter=1000).fit(x[:, None], outcome, sample_weight=weight)
        assert slope == pytest.approx(float(model.coef_[0, 0]), rel=1e-4)


def make_answers(n: int, strength: float, seed: int) -> tuple[WordScores, list[str], list[str]]:
    """A model whose answers follow the scores of wrong words with some strength, in layer 1 only."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2, n, 4))
    truth = rng.integers(0, 4, size=n)
    answers = (strength * values[1] + 2 * np.eye(4)[truth] + rng.gumbel(size=(n, 4))).argmax(axis=1)
    names = tuple(f"g{i // 2}" for i in range(n))
    scores = WordScores(values, (3, 5), WORDS, tuple(f"q{i}" for i in range(n)), names, "unembedding")
    return scores, [WORDS[t] for t in truth], [WORDS[a] for a in answers]


def test_a_nearer_wrong_word_predicts_its_answer_only_where_answers_follow_it() -> None:
    scores, truth, answers = make_answers(300, 2.0, seed=5)
    table = predict_wrong_answers(scores, truth, answers, resamples=200).set_index("layer")
    assert table.loc[5, "odds_ratio_low"] > 1.5
    assert table.loc[5, "auc_low"] > 0.65
    assert table.loc[3, "odds_ratio_low"] < 1 < table.loc[3, "odds_ratio_high"]
    assert table.loc[3, "auc_low"] < 0.5 < table.loc[3, "auc_high"]
    plain = predict_wrong_answers(scores, truth, answers, within_word=False, resamples=0).set_index("layer")
    margin, outcome = [], []
    for i, (right, said) in enumerate(zip(truth, answers, strict=True)):
        for w, word in enumerate(WORDS):
            if word != right:
                margin.append(scores.values[1, i, w] - scores.values[1, i, WORDS.index(right)])
                outcome.append(said == word)
    assert plain.loc[5, "auc"] == pytest.approx(roc_auc_score(outcome, margin), abs=1e-9)
    assert (plain.loc[5, "n"], plain.loc[5, "wrong"]) == (900, sum(outcome))
    assert np.isnan(plain.loc[5, "odds_ratio_low"])
    x = (np.array(margin) - np.mean(margin)) / np.std(margin)
    model = LogisticRegression(C=1e3, tol=1e-10).fit(x[:, None], outcome)
    assert plain.loc[5, "odds_ratio"] == pytest.approx(float(np.exp(model.coef_[0, 0])), rel=1e-4)


def test_a_word_that_is_always_near_and_always_said_predicts_nothing_within_words() -> None:
    rng = np.random.default_rng(3)
    n = 200
    values = rng.normal(size=(1, n, 4))
    values[:, :, 1] += 5
    names = tuple(f"g{i}" for i in range(n))
    scores = WordScores(values, (0,), WORDS, names, names, "unembedding")
    truth = [WORDS[t] for t in rng.choice([0, 2, 3], size=n)]
    answers = [("dog" if rng.random() < 0.5 else t) for t in truth]
    pooled = predict_wrong_answers(scores, truth, answers, within_word=False, resamples=50)
    within = predict_wrong_answers(scores, truth, answers, resamples=50)
    assert pooled.loc[0, "auc"] > 0.8
    assert within.loc[0, "auc_low"] < 0.5 < within.loc[0, "auc_high"]


def test_bad_input_is_refused() -> None:
    scores, truth, answers = make_answers(20, 1.0, seed=4)
    cases: list[tuple[Any, str]] = [
        (lambda: predict_wrong_answers(scores, truth[:5], answers), "5 right words and 20 answers for 20 rows"),
        (lambda: predict_wrong_answers(scores, ["cats"] * 20, answers), "did you mean cat"),
        (lambda: scores.accuracy(truth[:5]), "5 words for 20 rows"),
        (lambda: scores.words_at(9), "choose from 3, 5"),
        (lambda: score_vectors(source(np.ones((4, 1, 3))), {"cat": np.ones(3)}, tokens="object:mean"), "at least 2"),
        (
            lambda: score_vectors(source(np.ones((4, 1, 3))), {"a": np.ones(2), "b": np.ones(2)}, tokens="object:mean"),
            "rows of width 3",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ProbeError, match=message):
            call()
    said = predict_wrong_answers(scores, truth, truth, resamples=10)
    assert np.isnan(said["auc"]).all()
    assert (said["wrong"] == 0).all()
