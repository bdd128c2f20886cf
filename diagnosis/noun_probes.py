"""Probes of nouns at image tokens, fitted to labels of whole images: for data without boxes.

A label says whether a noun is in an image, not where (multiple-instance learning: Dietterich et al. 1997). The score of a
noun at a token is linear, and the score of the image is the smooth maximum over its tokens, ``log mean_t exp s_t``
(log-sum-exp pooling: Pinheiro & Collobert 2015, arXiv 1411.6228). The probe therefore also shows where the noun is.

Nouns with too few images share one bilinear probe, ``s = x W e`` with the embedding `e` of the noun, which is fitted to all
nouns and tested on nouns that it was not fitted to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diagnosis.image_tokens import ImageTokens

DECAY = 0.01
"""Factor of the squared norm of the weights in the loss, for tokens of unit variance."""
_STEPS, _RATE = 60, 0.05
VALIDATION_SHARE = 0.3
"""Share of the training images on which the accuracy of a fit to the others is measured."""
UNSEEN_FOLDS = 3
"""Parts of the nouns; each is left out once to test the shared probe."""


@dataclass(frozen=True)
class Presence:
    """Whether some images contain some nouns; three arrays of equal length."""

    image: np.ndarray
    """int64, index of the image."""
    noun: np.ndarray
    """int64, index of the noun."""
    holds: np.ndarray
    """bool."""

    def where(self, mask: np.ndarray) -> Presence:
        """Return some of the labels."""
        return Presence(self.image[mask], self.noun[mask], self.holds[mask])

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class NounProbes:
    """Linear probes of nouns, whose largest decision over the tokens is positive where the noun is in the image."""

    weights: np.ndarray
    """float64 ``[k, nouns]``."""
    intercepts: np.ndarray
    """float64 ``[nouns]``."""
    accuracy: float
    """Balanced accuracy on images, or nouns, that were left out; NaN if a class is missing there."""

    def decide(self, tokens: ImageTokens) -> np.ndarray:
        """Return decisions ``[images, T, nouns]``; minus infinity at padding."""
        decisions = tokens.values.numpy() @ self.weights.astype(np.float32) + self.intercepts.astype(np.float32)
        return np.where(tokens.mask.numpy()[..., None], decisions, -np.inf)


def fit_nouns(
    tokens: ImageTokens,
    labels: Presence,
    n_nouns: int,
    validation: np.ndarray,
    embeddings: np.ndarray | None = None,
    *,
    decay: float = DECAY,
) -> NounProbes:
    """Fit one probe per noun, or one probe that all nouns share.

    Parameters
    ----------
    tokens
        Activations at the image tokens.
    labels
        Training labels; a noun without labels gets the probe 0, unless it is shared.
    n_nouns
        Number of nouns.
    validation
        bool ``[images]``: images that measure the accuracy of a fit to the others; the result is fitted to all images.
    embeddings
        ``[nouns, E]`` for a shared probe. Its accuracy is that on nouns that were left out, at validation images.
    decay
        Factor of the squared norm of the weights.
    """
    mean, scale = _moments(tokens)
    x = (tokens.values - mean) / scale
    features = torch.eye(n_nouns) if embeddings is None else torch.tensor(_coordinates(embeddings), dtype=torch.float32)
    held_out = validation[labels.image]
    scores, truth = [], []
    for fold in range(1 if embeddings is None else UNSEEN_FOLDS):
        unseen = np.ones(len(labels), bool) if embeddings is None else labels.noun % UNSEEN_FOLDS == fold
        train = labels.where(~held_out & ~unseen if embeddings is not None else ~held_out)
        test = labels.where(held_out & unseen)
        if not len(train) or not len(test):
            continue
        w, b = _fit(x, tokens.mask, train, features, decay)
        threshold = _threshold(_largest(x, tokens.mask, w, b, train), train.holds)
        scores.append(_largest(x, tokens.mask, w, b, test) - threshold)
        truth.append(test.holds)
    accuracy = _balanced_accuracy(np.concatenate(scores), np.concatenate(truth)) if scores else float("nan")
    w, b = _fit(x, tokens.mask, labels, features, decay)
    threshold = _threshold(_largest(x, tokens.mask, w, b, labels), labels.holds)
    weights = w.double().numpy() / float(scale)
    return NounProbes(weights, b.double().numpy() - threshold - mean.double().numpy() @ weights, accuracy)


def _moments(tokens: ImageTokens) -> tuple[Tensor, Tensor]:
    """Return the mean token ``[k]``, and the root mean square of the deviations over all tokens and dimensions."""
    x = tokens.values[tokens.mask]
    mean = x.mean(0)
    return mean, (x - mean).square().mean().sqrt().clamp_min(1e-12)


def _coordinates(embeddings: np.ndarray) -> np.ndarray:
    """Return embeddings relative to their mean, in principal axes, with mean length 1: equal inner products, fewer numbers."""
    centered = embeddings - embeddings.mean(0)
    u, size, _ = np.linalg.svd(centered, full_matrices=False)
    coordinates = u * size
    return coordinates / max(float(np.linalg.norm(coordinates, axis=1).mean()), 1e-12)


def _fit(x: Tensor, mask: Tensor, labels: Presence, features: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Return weights ``[k, nouns]`` and intercepts ``[nouns]`` of standardized tokens, by Adam from 0."""
    images, row = np.unique(labels.image, return_inverse=True)
    x, mask = x[images], mask[images]
    at, noun = torch.tensor(row), torch.tensor(labels.noun)
    truth = torch.tensor(labels.holds, dtype=torch.float32)
    weight = torch.tensor(_balance(labels), dtype=torch.float32)
    length = mask.sum(1).log()[:, None]
    w = torch.zeros(x.shape[2], features.shape[1], requires_grad=True)
    b = torch.zeros(features.shape[1], requires_grad=True)
    shared = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([w, b, shared], lr=_RATE)
    with torch.enable_grad():
        for _ in range(_STEPS):
            s = (x @ (w @ features.T)).masked_fill(~mask[..., None], -torch.inf)
            bag = s.logsumexp(1) - length + features @ b + shared
            loss = torch.nn.functional.binary_cross_entropy_with_logits(bag[at, noun], truth, weight)
            optimizer.zero_grad()
            (loss + decay * w.square().sum()).backward()
            optimizer.step()
    return (w @ features.T).detach(), (features @ b + shared).detach()


def _balance(labels: Presence) -> np.ndarray:
    """Return weights with mean 1 and equal sums of both classes of each noun that has both; others count half."""
    pairs = labels.noun * 2 + labels.holds
    count = np.bincount(pairs, minlength=2 * int(labels.noun.max()) + 2)
    total = count[labels.noun * 2] + count[labels.noun * 2 + 1]
    weight = 0.5 * total / count[pairs]
    weight = np.where(count[pairs] == total, 0.5, weight)
    return weight / weight.mean()


def _largest(x: Tensor, mask: Tensor, w: Tensor, b: Tensor, labels: Presence) -> np.ndarray:
    """Return for each label the largest score over the tokens of its image."""
    images, row = np.unique(labels.image, return_inverse=True)
    s = (x[images] @ w + b).masked_fill(~mask[images][..., None], -torch.inf)
    return s.amax(1).double().numpy()[row, labels.noun]


def _threshold(scores: np.ndarray, holds: np.ndarray) -> float:
    """Return the score between two neighbors with the largest balanced accuracy; 0 if a class is missing."""
    if holds.all() or not holds.any():
        return 0.0
    order = np.argsort(scores)
    sorted_holds = holds[order]
    lost = np.cumsum(sorted_holds) / holds.sum()
    rejected = np.cumsum(~sorted_holds) / (~holds).sum()
    best = int((rejected - lost)[:-1].argmax())
    return float(scores[order[best]] + scores[order[best + 1]]) / 2


def _balanced_accuracy(scores: np.ndarray, holds: np.ndarray) -> float:
    if holds.all() or not holds.any():
        return float("nan")
    return float(((scores[holds] > 0).mean() + (scores[~holds] <= 0).mean()) / 2)
