"""Detectors of hallucinated objects against formulas by hand, scikit-learn and whole forwards."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import groundscope as gs
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError, DataError
from mitigation.detectors.lure import lure_scores
from mitigation.detectors.metatoken import classify_mentions, metatoken_features
from mitigation.detectors.scores import MentionScores
from mitigation.detectors.written_tokens import read_written_tokens

TEXTS = ("a red apple, a dog and a blue car.", "a green dog.")


@cache
def written() -> ConceptDataset:
    data = gs.scenes.dataset(30, splits=["caption"])[:2]
    texts = {e.id: text for e, text in zip(data, TEXTS, strict=True)}
    return gs.with_mentions(data, texts, vocabulary=["apple", "dog", "car"])


@cache
def scored() -> tuple[list[torch.Tensor], list[list[int]], list[torch.Tensor]]:
    """Log-probabilities before each token of the answers, the tokens, and the last block's attention to the image."""
    lvlm = gs.load_lvlm("tiny")
    logs, tokens, attention = [], [], []
    for example in written():
        inputs = lvlm.encode(example).inputs
        ids = inputs["input_ids"][0]
        count = len(lvlm.processor.tokenizer(example.prefix, add_special_tokens=False)["input_ids"])
        with torch.no_grad(), lvlm.eager():
            out = lvlm.hf(**inputs, output_attentions=True, use_cache=False)
        start = len(ids) - count
        logs.append(out.logits[0, start - 1 : -1].double().log_softmax(-1))
        tokens.append(ids[start:].tolist())
        image = ids == lvlm.content_id
        attention.append(out.attentions[-1][0, :, start - 1 : -1][..., image].double().sum(-1).T)
    return logs, tokens, attention


def test_tokens_are_read_with_what_precedes_them() -> None:
    lvlm = gs.load_lvlm("tiny")
    logs, tokens, attention = scored()
    texts = list(read_written_tokens(lvlm, written().examples, layer=lvlm.n_layers - 1))
    for text, log_p, ids, share in zip(texts, logs, tokens, attention, strict=True):
        assert list(text.tokens) == ids
        np.testing.assert_allclose(text.log_p, log_p.numpy(), atol=1e-4)
        np.testing.assert_allclose(text.image_attention, share.numpy(), atol=1e-5)


def test_lure_is_the_written_rule() -> None:
    lvlm = gs.load_lvlm("tiny")
    logs, tokens, _ = scored()
    scores = lure_scores(lvlm, written().examples)
    assert scores.nouns == ("apple", "dog", "car", "dog")
    words = [TEXTS[0].replace(",", " ,").replace(".", " .").split(), TEXTS[1].replace(".", " .").split()]
    expected = [(0, "apple"), (0, "dog"), (0, "car"), (1, "dog")]
    for row, (text, noun) in enumerate(expected):
        token = lvlm.processor.tokenizer.convert_tokens_to_ids(noun)
        place = tokens[text].index(token)
        assert scores.values["uncertainty"][row] == pytest.approx(-float(logs[text][place, token]), abs=1e-4)
        position = words[text].index(noun) / len(words[text])
        assert scores.values["position"][row] == pytest.approx(position)
        flagged = scores.values["uncertainty"][row] > 0.9 or position >= 0.8
        assert scores.values["flagged"][row] == flagged
    present = [{o.noun for o in e.objects} for e in written()]
    assert scores.hallucinated.tolist() == [float(noun not in present[text]) for text, noun in expected]


def test_metatoken_features_are_the_written_formulas() -> None:
    lvlm = gs.load_lvlm("tiny")
    logs, tokens, attention = scored()
    features = metatoken_features(lvlm, written().examples)
    row, text, noun = 1, 0, "dog"
    token = lvlm.processor.tokenizer.convert_tokens_to_ids(noun)
    place = tokens[text].index(token)
    log_p = logs[text][place]
    p = log_p.exp()
    entropy = -(p * log_p).nansum()
    own = [float(logs[text][i, t]) for i, t in enumerate(tokens[text])]
    top = p.sort(descending=True).values
    expected = {
        "position": place / len(tokens[text]),
        "occurrences": 1,
        "log_p": own[place],
        "cumulative_log_p": sum(own[: place + 1]),
        "sequence_score": sum(own[: place + 1]) / (place + 1),
        "entropy": float(entropy),
        "variance": float((p * (log_p + entropy) ** 2).nansum()),
        "variation_ratio": float(1 - top[0]),
        "margin": float(1 - (top[0] - top[1])),
        "probability_difference": float(top[0] - p[token]),
        **{f"attention.H{h}": float(x) for h, x in enumerate(attention[text][place])},
    }
    assert list(features.values) == list(expected)
    for name, value in expected.items():
        assert features.values[name][row] == pytest.approx(value, abs=2e-4), name


def grouped(n: int = 120, seed: int = 0) -> MentionScores:
    rng = np.random.default_rng(seed)
    groups = tuple(f"image {i // 3}" for i in range(n))
    x = rng.normal(size=(n, 2))
    labels = (x[:, 0] + rng.normal(size=n) > 0).astype(float)
    return MentionScores(groups, groups, ("dog",) * n, labels, {"a": x[:, 0], "b": x[:, 1]})


def test_the_area_under_the_curve_is_that_of_scikit_learn() -> None:
    scores = grouped()
    estimate = scores.auc("a")
    assert estimate.value == pytest.approx(roc_auc_score(scores.hallucinated, scores.values["a"]))
    assert estimate.low < estimate.value < estimate.high
    copies = MentionScores(  # ten copies of each row in its image carry no more information than one
        scores.ids * 10,
        scores.groups * 10,
        scores.nouns * 10,
        np.tile(scores.hallucinated, 10),
        {"a": np.tile(scores.values["a"], 10)},
    ).auc("a")
    assert copies.high - copies.low == pytest.approx(estimate.high - estimate.low, rel=0.05)


def test_rows_without_label_or_score_are_left_out() -> None:
    labels = np.array([1, 0, np.nan, 1, 0])
    values = np.array([0.9, 0.1, 5.0, np.nan, 0.2])
    names = tuple("abcde")
    estimate = MentionScores(names, names, names, labels, {"x": values}).auc("x")
    assert (estimate.value, estimate.n) == (1.0, 3)
    assert math.isnan(MentionScores(names, names, names, np.zeros(5), {"x": values}).auc("x").value)


def test_held_out_scores_are_those_of_logistic_regression_without_the_image() -> None:
    features = grouped()
    scores, auc = classify_mentions(features, folds=4, seed=1)
    x, y = features.matrix(), features.hallucinated
    assert auc.value == pytest.approx(roc_auc_score(y, scores))
    images = np.array(features.groups)
    # the fold of a row is the set of images whose scores one fit gives: refit without the images of any one fold
    from sklearn.model_selection import GroupKFold

    for fitted, held_out in GroupKFold(4, shuffle=True, random_state=1).split(x, y, images):
        assert not set(images[fitted]) & set(images[held_out])
        mean, sd = x[fitted].mean(0), x[fitted].std(0)
        model = LogisticRegression(max_iter=2000).fit((x[fitted] - mean) / sd, y[fitted])
        np.testing.assert_allclose(scores[held_out], model.decision_function((x[held_out] - mean) / sd), atol=1e-6)


def test_refusals() -> None:
    lvlm = gs.load_lvlm("tiny")
    with pytest.raises(DataError, match="has no written answer; make the examples with gs"):
        lure_scores(lvlm, gs.scenes.dataset(10)[:1].examples)
    with pytest.raises(ConfigError, match="late=2"):
        lure_scores(lvlm, (), late=2)
    with pytest.raises(DataError, match="no example mentions an object"):
        metatoken_features(lvlm, ())
    with pytest.raises(DataError, match="did you mean a"):
        grouped().auc("aa")
    with pytest.raises(ConfigError, match="folds=1"):
        classify_mentions(grouped(), folds=1)
    with pytest.raises(DataError, match="2 images with labels of 2 classes for 5 folds"):
        classify_mentions(grouped(6))
    with pytest.raises(DataError, match="every score must have one value"):
        MentionScores(("a",), ("a",), ("a",), np.zeros(2), {})
