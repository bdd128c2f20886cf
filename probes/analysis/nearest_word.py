"""The word nearest to an image or an object, by layer, and whether a nearer wrong word predicts that wrong answer.

Zero-shot reading of image tokens (Shu et al., arXiv 2501.01346, appendix B; Neo et al. 2410.07149): no probe is fitted. The
score of a word is its log-probability under the unembedding, or its cosine with a vector of the word from a text tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from groundscope.core.artifacts import freeze
from groundscope.core.errors import ProbeError
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import draws_interval, rates_of_columns
from groundscope.core.text import format_count, nearest
from probes.analysis.logit_lens import TensorSource, Unembedding, logit_lens
from probes.protocol.inputs import find_array, read_features, read_groups, row_mask
from probes.protocol.scoring import auc, auc_interval, bootstrap_auc, resample_groups

if TYPE_CHECKING:
    import pandas as pd

    from activation_store import ActivationSource

_RIDGE = 1e-3
"""Penalty of the slope, so that it stays finite where a margin separates the answers."""


@dataclass(frozen=True, eq=False)
class WordScores:
    """How near each word is to each row, by layer; returned by `score_words` and `score_vectors`.

    Examples
    --------
    >>> import numpy as np
    >>> from probes.analysis.nearest_word import WordScores
    >>> scores = WordScores(np.array([[[0.1, 0.9], [0.7, 0.2]]]), (3,), ("cat", "dog"), ("a", "b"), ("x", "y"), "unembedding")
    >>> scores.words_at(3).tolist(), scores.accuracy(["dog", "dog"])["accuracy"].tolist()
    (['dog', 'cat'], [0.5])
    """

    values: np.ndarray
    """float [L, N, W]; NaN for a row whose token selection was empty."""
    layers: tuple[int, ...]
    words: tuple[str, ...]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    reader: Literal["unembedding", "text tower"]

    __repr__ = short_repr

    def __post_init__(self) -> None:
        freeze(self)

    def words_at(self, layer: int) -> np.ndarray:
        """Return the nearest word of each row, str [N]; empty where the token selection was empty."""
        if layer not in self.layers:
            msg = f"no layer {layer}; choose from {', '.join(map(str, self.layers))}"
            raise ProbeError(msg)
        values = self.values[self.layers.index(layer)]
        empty = np.isnan(values).any(axis=1)
        return np.where(empty, "", np.array(self.words)[np.where(empty[:, None], 0, values).argmax(axis=1)])

    def accuracy(self, truth: Sequence[str], *, confidence: float = 0.95) -> pd.DataFrame:
        """Return by layer how often the right word of a row is the nearest: layer, accuracy, low, high, chance, n.

        Rows whose right word is not among the words are left out.
        """
        import pandas as pd

        names = np.array([str(word) for word in truth], dtype=np.str_)
        if len(names) != len(self.ids):
            msg = f"{format_count(len(names), 'word')} for {format_count(len(self.ids), 'row')}; give the right word of each row"
            raise ProbeError(msg)
        table = []
        for layer in self.layers:
            near = self.words_at(layer)
            used = np.isin(names, self.words) & (near != "")
            right = (near == names)[used].astype(float)
            groups = np.array(self.groups)[used].tolist()
            low, high = (
                rates_of_columns(right[:, None], groups, confidence) if len(right) else (np.full(1, np.nan),) * 2
            )
            rate = float(right.mean()) if len(right) else np.nan
            table.append((layer, rate, float(low[0]), float(high[0]), 1 / len(self.words), len(right)))
        return pd.DataFrame(table, columns=["layer", "accuracy", "low", "high", "chance", "n"])


def score_words(
    store: TensorSource,
    words: Sequence[str],
    vocabulary: Mapping[str, int],
    site: str = "resid_post",
    *,
    tokens: str = "image:mean",
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    unembedding: Unembedding | None = None,
) -> WordScores:
    """Score words at every layer by the model's own unembedding; parameters and errors as for `logit_lens`.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes.analysis.nearest_word import score_words
    >>> from probes.analysis.logit_lens import Unembedding
    >>> x = np.array([[[2.0, 0.0]], [[0.0, 2.0]]])
    >>> store = MemorySource({("resid_post", "image:mean"): x}, {"id": ["a", "b"], "group": ["a", "b"]})
    >>> head = Unembedding(np.eye(2, dtype=np.float32), np.ones(2, np.float32), None, None, "rms", 0.0)
    >>> score_words(store, ["cat", "dog"], {"cat": 0, "dog": 1}, unembedding=head).words_at(0).tolist()
    ['cat', 'dog']
    """
    read = logit_lens(store, words, vocabulary, site, tokens=tokens, rows=rows, unembedding=unembedding)
    return _scores(store, rows, read, words, "unembedding")


def score_vectors(
    store: ActivationSource,
    vectors: Mapping[str, np.ndarray],
    site: str = "resid_post",
    *,
    tokens: str = "image:mean",
    rows: Sequence[bool] | np.ndarray | pd.Series | None = None,
    centered: bool = True,
) -> WordScores:
    """Score words at every layer by the cosine with a vector of each word, in the space of the site.

    The vectors come from a text tower that shares the space of the image tower (CLIP: the projected text embedding, and as `site`
    an array of projected image embeddings), or from the model's own decoder: the mean residual of texts with the word.

    Parameters
    ----------
    store
        Activations at image or object tokens.
    vectors
        Vector [D] by word.
    site, tokens, rows
        As for `logit_lens`.
    centered
        Subtract the mean over rows, and that over words, first: the modality gap would otherwise make all cosines alike.

    Raises
    ------
    SiteError
        If the store has no such array.
    ProbeError
        If there are fewer than 2 words, or widths differ.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from probes.analysis.nearest_word import score_vectors
    >>> x = np.array([[[2.0, 0.0]], [[0.0, 2.0]]])
    >>> store = MemorySource({("resid_post", "image:mean"): x}, {"id": ["a", "b"], "group": ["a", "b"]})
    >>> words = {"cat": np.array([6.0, 5.0]), "dog": np.array([5.0, 6.0])}
    >>> score_vectors(store, words).words_at(0).tolist()
    ['cat', 'dog']
    """
    frame = store.frame()
    mask = row_mask(rows, len(frame))
    array = find_array(store, site, tokens, heads=False)
    words = tuple(vectors)
    matrix = np.array([np.asarray(vectors[w], dtype=np.float64) for w in words]) if len(words) > 1 else np.empty((0, 0))
    read = {}
    for layer in array.layers:
        x = read_features(store, array, layer, mask, frame["id"].to_numpy()[mask]).astype(np.float64)
        if matrix.ndim != 2 or matrix.shape[1] != x.shape[1]:
            msg = (
                f"{format_count(len(words), 'word')} with vectors of shape {list(matrix.shape[1:])} for rows of width "
                f"{x.shape[1]}; give at least 2 words, each with a vector of the site's width"
            )
            raise ProbeError(msg)
        y = matrix
        if centered:
            x, y = x - np.nanmean(x, axis=0), y - y.mean(axis=0)
        lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)[None]
        read[layer] = x @ y.T / np.where(lengths == 0, 1, lengths)
    return _scores(store, rows, read, words, "text tower")


def predict_wrong_answers(
    scores: WordScores,
    truth: Sequence[str],
    answers: Sequence[str],
    *,
    within_word: bool = True,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure by layer whether a wrong word that is nearer to the image predicts that wrong answer.

    A case is a row with one of the wrong words; its outcome is whether the model gave this word as the answer, its margin the
    score of the wrong word minus that of the right one.

    Parameters
    ----------
    scores
        Scores of the possible answers.
    truth, answers
        Right word and answer of the model for each row [N]; rows whose right word is not among the words are left out.
    within_word
        Subtract each wrong word's mean margin first, so that words which the model often says or which lie near all images
        predict nothing by that alone.
    resamples, confidence, seed
        Of the bootstrap over images.

    Returns
    -------
    One row per layer: odds_ratio (of one standard deviation of the margin, logistic regression) and auc, each with the ends of
    its interval; n (cases) and wrong (cases with that answer). NaN without any wrong answer.

    Raises
    ------
    ProbeError
        If there is not one right word and one answer for each row.

    Examples
    --------
    >>> import numpy as np
    >>> from probes.analysis.nearest_word import WordScores, predict_wrong_answers
    >>> rng = np.random.default_rng(0)
    >>> near = rng.normal(size=(1, 60, 3))
    >>> names = tuple(map(str, range(60)))
    >>> scores = WordScores(near, (0,), ("cat", "dog", "owl"), names, names, "unembedding")
    >>> answers = np.array(scores.words)[near[0].argmax(axis=1)]  # the model says what is nearest
    >>> table = predict_wrong_answers(scores, ["cat"] * 60, answers, resamples=50)
    >>> bool(table["auc_low"][0] > 0.6), int(table["n"][0])
    (True, 120)
    """
    import pandas as pd

    right, answer_words = (np.array([str(word) for word in words], dtype=np.str_) for words in (truth, answers))
    if not len(right) == len(answer_words) == len(scores.ids):
        msg = (
            f"{len(right)} right words and {len(answer_words)} answers for {format_count(len(scores.ids), 'row')}; give "
            "one of each for every row"
        )
        raise ProbeError(msg)
    words = np.array(scores.words)
    has_word = np.isin(right, words)
    if not has_word.any():
        msg = f"no right word is among {', '.join(scores.words)}{nearest(str(right[0]) if len(right) else '', scores.words)}"
        raise ProbeError(msg)
    table = []
    for at, layer in enumerate(scores.layers):
        values = scores.values[at]
        row, word = np.nonzero(
            (right[:, None] != words[None]) & has_word[:, None] & ~np.isnan(values).any(axis=1)[:, None]
        )
        own = np.array([scores.words.index(w) for w in right[row]], dtype=np.int64)
        margin = (values[row, word] - values[row, own]).astype(np.float64)
        if within_word:
            margin -= (np.bincount(word, margin, len(words)) / np.maximum(np.bincount(word, minlength=len(words)), 1))[
                word
            ]
        outcome = (answer_words[row] == words[word]).astype(np.float64)
        names, of_row = np.unique(np.array(scores.groups)[row], return_inverse=True)
        table.append((layer, *_association(outcome, margin, names, of_row, resamples, confidence, seed)))
    columns = ["layer", "odds_ratio", "odds_ratio_low", "odds_ratio_high", "auc", "auc_low", "auc_high", "n", "wrong"]
    return pd.DataFrame(table, columns=columns)


def log_odds_slopes(outcome: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the slopes of logistic regressions of an outcome [N] on x [N], one for each row of weights [B, N].

    Newton's method with a penalty of ``1e-3 slope^2 / 2``.

    Examples
    --------
    >>> import numpy as np
    >>> from probes.analysis.nearest_word import log_odds_slopes
    >>> outcome, x = np.array([0, 0, 0, 1, 0, 1, 1, 1]), np.repeat([0, 1], 4)  # odds 1:3 and 3:1
    >>> np.exp(log_odds_slopes(outcome, x, np.ones((1, 8)))).round()
    array([9.])
    """
    a, b = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(a[:, None] + b[:, None] * x, -30, 30)))
        residual, curve = weights * (outcome - p), weights * p * (1 - p)
        gradient = residual.sum(axis=1), residual @ x - _RIDGE * b
        aa, ab, bb = curve.sum(axis=1) + 1e-9, curve @ x, curve @ (x * x) + _RIDGE
        scale = aa * bb - ab * ab
        step = (bb * gradient[0] - ab * gradient[1]) / scale, (aa * gradient[1] - ab * gradient[0]) / scale
        a, b = a + np.clip(step[0], -3, 3), b + np.clip(step[1], -3, 3)
        if max(np.abs(step[0]).max(), np.abs(step[1]).max()) < 1e-10:
            break
    return b


def _association(
    outcome: np.ndarray,
    margin: np.ndarray,
    names: np.ndarray,
    of_row: np.ndarray,
    resamples: int,
    confidence: float,
    seed: int,
) -> tuple[float, ...]:
    """Return odds ratio and AUC with their intervals, and the numbers of cases."""
    numbers = len(outcome), int(outcome.sum())
    spread = float(margin.std())
    if not 0 < numbers[1] < numbers[0] or spread == 0:
        return (*[float("nan")] * 6, *numbers)
    x = (margin - margin.mean()) / spread
    counts = resample_groups(names, resamples, seed)
    slope = float(log_odds_slopes(outcome, x, np.ones((1, len(x))))[0])
    low = high = np.array(np.nan)
    if resamples:
        weights = counts[:, of_row]
        both = ((weights * outcome).sum(axis=1) > 0) & ((weights * (1 - outcome)).sum(axis=1) > 0)
        draws = np.full(resamples, np.nan)
        draws[both] = log_odds_slopes(outcome, x, weights[both].astype(float))
        low, high = draws_interval(draws, slope, len(names), confidence)
    area = auc(outcome, margin)
    areas = bootstrap_auc(outcome, margin, of_row, counts)[:, None]
    (auc_low,), (auc_high,) = auc_interval(outcome, np.array([area]), areas, of_row, len(names), confidence)
    odds = (float(np.exp(v)) for v in (slope, float(low), float(high)))
    return (*odds, area, float(auc_low), float(auc_high), *numbers)


def _scores(
    store: ActivationSource,
    rows: Sequence[bool] | np.ndarray | pd.Series | None,
    read: Mapping[int, np.ndarray],
    words: Sequence[str],
    reader: Literal["unembedding", "text tower"],
) -> WordScores:
    frame = store.frame()
    mask = row_mask(rows, len(frame))
    values = np.stack([np.asarray(read[layer], dtype=np.float32) for layer in read])
    ids, groups = frame["id"].to_numpy()[mask], read_groups(frame)[mask]
    return WordScores(values, tuple(read), tuple(words), tuple(ids.tolist()), tuple(groups.tolist()), reader)
