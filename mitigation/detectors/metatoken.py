"""MetaToken: a classifier of hallucinated objects, on probabilities and attention at the tokens of an object."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from concepts.schema import Example
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.statistics import Estimate
from groundscope.core.text import format_count
from mitigation.detectors.scores import MentionScores, grouped_auc
from mitigation.detectors.written_tokens import WrittenTokens, read_written_tokens

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def metatoken_features(model: Lvlm, examples: Sequence[Example], *, layer: int | None = None) -> MentionScores:
    """Return MetaToken's features of mentioned objects, the columns of a classifier.

    Fieback et al. 2024, arXiv 2405.19186. The features of an object are:

    - ``position``: index of its first token, divided by the number of tokens of the answer;
    - ``occurrences``: how often the answer names it;
    - ``log_p``: sum of the log-probabilities of its tokens;
    - ``cumulative_log_p``: sum of the log-probabilities of the answer's tokens, up to the object's last token;
    - ``sequence_score``: ``cumulative_log_p`` divided by the number of these tokens.

    The others are means over its tokens. With p the distribution from which a token is chosen, they are:

    - ``entropy``, and ``variance`` of the log-probability;
    - ``variation_ratio``: ``1 - max p``;
    - ``margin``: ``1 - (p_1 - p_2)`` with the two largest probabilities;
    - ``probability_difference``: ``max p`` minus the probability of the token;
    - ``attention.H<head>``: attention to the image from the position that predicts the token.

    The forms of the variance and the margin, and the means over tokens, are this package's interpretation: they have not
    been compared with the text of the paper.

    Parameters
    ----------
    model
        The model that wrote the answers, or another one that reads them.
    examples
        Written answers with their mentions: ``gs.with_mentions(data, texts)``.
    layer
        Block whose heads are features; None for the last one.

    Raises
    ------
    DataError
        For an example without a written answer.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.detectors.metatoken import metatoken_features
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["caption"])[:1]
    >>> written = gs.with_mentions(data, {data[0].id: "a yellow banana and a dog."}, vocabulary=["dog"])
    >>> features = metatoken_features(model, written)
    >>> features.nouns, features.matrix().shape, [name for name in features.values][:3]
    (('banana', 'dog'), (2, 18), ['position', 'occurrences', 'log_p'])
    """
    chosen = model.n_layers - 1 if layer is None else layer
    texts = list(read_written_tokens(model, examples, layer=chosen))
    rows = [(text, i, _features(text, i)) for text in texts for i in range(len(text.mentions))]
    if not rows:
        msg = "no example mentions an object; make the examples with gs.with_mentions(data, texts)"
        raise DataError(msg)
    mentions = [text.example.mentions[i] for text, i, _ in rows]
    return MentionScores(
        tuple(text.example.id for text, _, _ in rows),
        tuple(text.example.group for text, _, _ in rows),
        tuple(m.noun for m in mentions),
        np.array([math.nan if m.present is None else float(not m.present) for m in mentions]),
        {name: np.array([features[name] for _, _, features in rows]) for name in rows[0][2]},
    )


def _features(text: WrittenTokens, mention: int) -> Mapping[str, float]:
    first, last = text.mentions[mention]
    noun = text.example.mentions[mention].noun
    part = slice(first, last + 1)
    log_p = text.log_p[part]  # [tokens, V]
    p = np.exp(log_p)
    entropy = -np.where(p > 0, p * log_p, 0).sum(1)
    spread = np.where(p > 0, p * (np.where(p > 0, log_p, 0) + entropy[:, None]) ** 2, 0).sum(1)
    ranked = np.sort(p, axis=1)[:, ::-1]
    own = np.exp(text.chosen[part])
    cumulative = float(text.chosen[: last + 1].sum())
    return {
        "position": first / len(text.tokens),
        "occurrences": float(sum(m.noun == noun for m in text.example.mentions)),
        "log_p": float(text.chosen[part].sum()),
        "cumulative_log_p": cumulative,
        "sequence_score": cumulative / (last + 1),
        "entropy": float(entropy.mean()),
        "variance": float(spread.mean()),
        "variation_ratio": float((1 - ranked[:, 0]).mean()),
        "margin": float((1 - (ranked[:, 0] - ranked[:, 1])).mean()),
        "probability_difference": float((ranked[:, 0] - own).mean()),
        **{f"attention.H{head}": float(x) for head, x in enumerate(text.image_attention[part].mean(0))},
    }


def classify_mentions(
    features: MentionScores, *, folds: int = 5, C: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, Estimate]:
    """Return held-out log-odds that each object is hallucinated, and their area under the ROC curve over images.

    Logistic regression on standardized features; all mentions of an image are in one fold, and each is scored by the
    model that was fitted on the other folds.

    Parameters
    ----------
    features
        Features with labels; rows with an unknown label or a feature that is not defined are NaN.
    folds
        Number of folds, at least 2.
    C
        Inverse strength of the L2 penalty.
    seed
        Seed of the folds and of the interval.

    Returns
    -------
    scores
        float64 ``[N]``.
    auc
        Its interval is over images.

    Raises
    ------
    ConfigError
        For fewer than 2 folds.
    DataError
        For fewer images than folds, or labels of one class only.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation.detectors.metatoken import classify_mentions
    >>> from mitigation.detectors.scores import MentionScores
    >>> rng = np.random.default_rng(0)
    >>> x, names = rng.normal(size=60), tuple(f"image {i}" for i in range(60))
    >>> features = MentionScores(names, names, ("dog",) * 60, (x > 0).astype(float), {"entropy": x})
    >>> scores, auc = classify_mentions(features)
    >>> auc.value > 0.99
    True
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if folds < 2:
        msg = f"folds={folds}: must be at least 2"
        raise ConfigError(msg)
    x, y = features.matrix(), features.hallucinated
    rows = np.flatnonzero(~np.isnan(y) & ~np.isnan(x).any(1))
    groups = np.asarray(features.groups)[rows]
    if len(set(groups.tolist())) < folds or len(set(y[rows].tolist())) < 2:
        msg = (
            f"{format_count(len(set(groups.tolist())), 'image')} with labels of "
            f"{format_count(len(set(y[rows].tolist())), 'class', 'classes')} for {folds} folds: use at least as many "
            "images as folds, with present and hallucinated objects"
        )
        raise DataError(msg)
    scores = np.full(len(y), math.nan)
    split = GroupKFold(folds, shuffle=True, random_state=seed)
    for fitted, held_out in split.split(x[rows], y[rows], groups):
        if len(set(y[rows[fitted]].tolist())) < 2:
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000))
        model.fit(x[rows[fitted]], y[rows[fitted]])
        scores[rows[held_out]] = model.decision_function(x[rows[held_out]])
    return scores, grouped_auc(y, scores, features.groups, seed=seed)
