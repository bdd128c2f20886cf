"""The methods of fitting a probe: the entries of `METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from probes.solvers import closed_form
from probes.solvers.logistic_float32 import RowBlock, balanced_weights, fit_rows
from probes.solvers.logistic_reference import LinearFit

SUBSAMPLES = 20
"""Number of probes of a Gaussian concept subspace."""
SUBSAMPLE_SHARE = 0.5
"""Share of the groups that each is fitted to."""


@dataclass(frozen=True)
class Rows:
    """The training rows of a probe."""

    block: RowBlock
    groups: np.ndarray
    """[n]."""
    tolerance: float
    start: tuple[np.ndarray, np.ndarray] | None = None
    """Initial coefficients [Q x R, D] and intercepts [Q x R] of the iterations."""


Fit = Callable[[Rows, np.ndarray, np.ndarray], LinearFit]
"""Maps rows, labels [Q, n] and penalties [Q, R] to Q x R fits, penalties fastest."""


@dataclass(frozen=True)
class Method:
    """A method of fitting a probe, and the criterion that selects its penalty."""

    fit: Fit
    loss: Literal["log", "squared"] | None
    """Cross-validation criterion of the penalty: log-loss with balanced classes, or squared error on -1/+1 labels; None
    without a penalty."""
    log_odds: bool
    """Whether margins are log-odds; otherwise they are scaled to log-odds by a slope fitted on left-out rows."""
    final: Fit | None = None
    """Fit of all training rows with the selected penalty, if it differs from `fit`."""
    description: str = ""
    """Description for the provenance."""


def _logistic(rows: Rows, labels: np.ndarray, penalty: np.ndarray) -> LinearFit:
    return fit_rows(rows.block, labels, penalty, balanced_weights(labels), tolerance=rows.tolerance, start=rows.start)


def _ridge(rows: Rows, labels: np.ndarray, penalty: np.ndarray) -> LinearFit:
    return _to_fit(rows, *closed_form.ridge(_spectrum(rows), labels, penalty))


def _discriminant(rows: Rows, labels: np.ndarray, penalty: np.ndarray) -> LinearFit:
    return _to_fit(rows, *closed_form.discriminant(_spectrum(rows), labels, penalty))


def _mean_difference(rows: Rows, labels: np.ndarray, penalty: np.ndarray) -> LinearFit:
    block = rows.block
    raw = block.standard.cpu().numpy() * block.deviation
    weights, intercepts = closed_form.mean_difference(raw, labels)
    weights, intercepts = (np.repeat(a, penalty.shape[1], axis=0) for a in (weights, intercepts))
    zeros = np.zeros(len(weights))
    spread = np.broadcast_to(np.ones_like(block.mean), weights.shape)
    return LinearFit(weights, intercepts - weights @ block.mean, zeros, zeros, spread)


def _subspace(rows: Rows, labels: np.ndarray, penalty: np.ndarray) -> LinearFit:
    """Fit the mean of the unit directions of probes on subsamples; threshold midway between the class means."""
    block = rows.block
    standard = block.standard.cpu().numpy()
    samples = [
        concept_directions(standard, y, rows.groups, float(c), tolerance=rows.tolerance)
        for y, values in zip(labels, penalty, strict=True)
        for c in values
    ]
    weights = np.stack([directions.mean(axis=0) for directions in samples])
    repeated = np.repeat(labels, penalty.shape[1], axis=0)
    high, low, _ = closed_form.class_sums(standard, repeated)
    return closed_form.unstandardize(weights, closed_form.midway(weights, high, low), block.mean, block.deviation)


def concept_directions(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    penalty: float,
    *,
    count: int = SUBSAMPLES,
    share: float = SUBSAMPLE_SHARE,
    seed: int = 0,
    tolerance: float = 1e-8,
) -> np.ndarray:
    """Return unit weights [count, D] of logistic probes, each fitted on a random share of the groups.

    The sample of the Gaussian concept subspace (Zhao et al. 2024, arXiv 2410.00153): features [n, D], labels [n].
    """
    rng = np.random.default_rng(seed)
    names, of_row = np.unique(groups, return_inverse=True)
    has = np.zeros((len(names), 2), dtype=bool)
    np.logical_or.at(has, (of_row, labels.astype(int)), True)
    directions = []
    for _ in range(count):
        order = rng.permutation(len(names))
        sample = order[: max(2, round(share * len(names)))]
        # Both classes are needed: if one is missing, the first group that has it is added.
        for value in (0, 1):
            if not has[sample, value].any():
                sample = np.append(sample, order[has[order, value]][0])
        chosen = np.isin(of_row, sample)
        block = RowBlock.of(features[chosen])
        y = labels[None, chosen]
        fit = fit_rows(block, y, np.array([[penalty]]), balanced_weights(y), tolerance=tolerance)
        length = np.linalg.norm(fit.coefficients[0])
        directions.append(fit.coefficients[0] / length if length > 0 else fit.coefficients[0])
    return np.stack(directions)


def _spectrum(rows: Rows) -> closed_form.Spectrum:
    return closed_form.Spectrum(rows.block.standard.cpu().numpy())


def _to_fit(rows: Rows, weights: np.ndarray, intercepts: np.ndarray) -> LinearFit:
    flat = weights.reshape(-1, weights.shape[-1])
    return closed_form.unstandardize(flat, intercepts.reshape(-1), rows.block.mean, rows.block.deviation)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "logistic": Method(_logistic, "log", log_odds=True, description="logistic, L2, classes balanced"),
        "ridge": Method(_ridge, "squared", log_odds=False, description="ridge, threshold midway between class means"),
        "lda": Method(_discriminant, "log", log_odds=True, description="linear discriminant, ridge, equal priors"),
        "mean_difference": Method(_mean_difference, None, log_odds=False, description="mean difference"),
        "subspace": Method(
            _logistic,
            "log",
            log_odds=False,
            final=_subspace,
            description="mean direction of a Gaussian concept subspace",
        ),
    }
)
"""Methods by name."""
