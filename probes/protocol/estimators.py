"""How a probe is fitted: the open registry `estimators`, and the interface of its entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator, clone

from groundscope.core.errors import ProbeError
from groundscope.core.registry import Registry
from probes.solvers import closed_form
from probes.solvers.logistic_float32 import RowBlock, balanced_weights, fit_rows
from probes.solvers.logistic_reference import LinearFit

SUBSAMPLES = 20
"""Number of probes of a Gaussian concept subspace."""
SUBSAMPLE_SHARE = 0.5
"""Share of the groups that each is fitted to."""


@dataclass(frozen=True)
class TrainingRows:
    """The training rows of a probe."""

    block: RowBlock
    groups: np.ndarray
    """[n]: the group of each row."""
    tolerance: float
    """Maximum proven relative gap of an iterative fit."""
    start: tuple[np.ndarray, np.ndarray] | None = None
    """Initial coefficients [Q x R, D] and intercepts [Q x R] of the iterations."""


Fit = Callable[[TrainingRows, np.ndarray, np.ndarray], "LinearFit | ModelFit"]
"""Maps rows, labels [Q, n] and values of C [Q, R] to Q x R fits, C fastest."""


@dataclass(frozen=True)
class ModelFit:
    """Fitted scikit-learn classifiers that are not linear: they have margins, but no direction."""

    models: Sequence[Any]
    block: RowBlock
    """The rows that they were fitted to, whose standardization they need."""

    @property
    def coefficients(self) -> np.ndarray:
        """NaN [P, D]."""
        return np.full((len(self.models), len(self.block.mean)), np.nan)

    @property
    def intercepts(self) -> np.ndarray:
        """NaN [P]."""
        return np.full(len(self.models), np.nan)

    @property
    def gap(self) -> np.ndarray:
        """NaN [P]: the optimum is not certified."""
        return np.full(len(self.models), np.nan)

    def decision(self, features: np.ndarray) -> np.ndarray:
        """Return margins float64 [P, N] of features [N, D]; positive means class 1."""
        inverse = np.divide(
            1.0, self.block.deviation, out=np.zeros_like(self.block.mean), where=self.block.deviation > 0
        )
        standard = (np.asarray(features, dtype=np.float64) - self.block.mean) * inverse
        return np.stack([_margins(model, standard) for model in self.models])


def _margins(model: Any, standard: np.ndarray) -> np.ndarray:
    """Return the margins of a fitted classifier [n]: its decision function, log-odds, or else -1 and +1."""
    if not len(standard):
        return np.zeros(0)
    if hasattr(model, "decision_function"):
        return np.asarray(model.decision_function(standard), dtype=np.float64)
    if hasattr(model, "predict_proba"):
        p = np.clip(model.predict_proba(standard)[:, 1], 1e-6, 1 - 1e-6)
        return np.log(p / (1 - p))
    return np.where(np.asarray(model.predict(standard)) == 1, 1.0, -1.0)


@dataclass(frozen=True)
class Estimator:
    """A way to fit linear probes in a grid: an entry of `probes.estimators`.

    It fits all concepts and values of C of one layer or head in one call, on standardized features.

    Examples
    --------
    A closed form with its own name; `fit` returns weights in the units of the activations:

    >>> import probes
    >>> ridge = probes.estimators["ridge"]
    >>> ridge.loss, ridge.log_odds
    ('squared', False)
    >>> probes.estimators.register("my_ridge", ridge)
    >>> "my_ridge" in probes.estimators
    True
    >>> probes.estimators.unregister("my_ridge")
    """

    fit: Fit
    loss: Literal["log", "squared"] | None
    """Cross-validation criterion that selects C: log-loss with balanced classes, or squared error on -1/+1 labels; None for
    an estimator without C."""
    log_odds: bool
    """Whether margins are log-odds; otherwise they are scaled to log-odds by a slope fitted on left-out rows."""
    final: Fit | None = None
    """Fit of all training rows with the selected C, if it differs from `fit`."""
    description: str = ""
    """Description for the provenance."""


def _logistic(rows: TrainingRows, labels: np.ndarray, C: np.ndarray) -> LinearFit:
    return fit_rows(rows.block, labels, C, balanced_weights(labels), tolerance=rows.tolerance, start=rows.start)


def _ridge(rows: TrainingRows, labels: np.ndarray, C: np.ndarray) -> LinearFit:
    return _to_fit(rows, *closed_form.ridge(_spectrum(rows), labels, C))


def _discriminant(rows: TrainingRows, labels: np.ndarray, C: np.ndarray) -> LinearFit:
    return _to_fit(rows, *closed_form.discriminant(_spectrum(rows), labels, C))


def _mean_difference(rows: TrainingRows, labels: np.ndarray, C: np.ndarray) -> LinearFit:
    block = rows.block
    raw = block.standard.cpu().numpy() * block.deviation
    weights, intercepts = closed_form.mean_difference(raw, labels)
    weights, intercepts = (np.repeat(a, C.shape[1], axis=0) for a in (weights, intercepts))
    zeros = np.zeros(len(weights))
    spread = np.broadcast_to(np.ones_like(block.mean), weights.shape)
    return LinearFit(weights, intercepts - weights @ block.mean, zeros, zeros, spread)


def _subspace(rows: TrainingRows, labels: np.ndarray, C: np.ndarray) -> LinearFit:
    """Fit the mean of the unit directions of probes on subsamples; threshold midway between the class means."""
    block = rows.block
    standard = block.standard.cpu().numpy()
    samples = [
        concept_directions(standard, y, rows.groups, float(c), tolerance=rows.tolerance)
        for y, values in zip(labels, C, strict=True)
        for c in values
    ]
    weights = np.stack([directions.mean(axis=0) for directions in samples])
    repeated = np.repeat(labels, C.shape[1], axis=0)
    high, low, _ = closed_form.class_sums(standard, repeated)
    return closed_form.unstandardize(weights, closed_form.midway(weights, high, low), block.mean, block.deviation)


def concept_directions(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    C: float,
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
        fit = fit_rows(block, y, np.array([[C]]), balanced_weights(y), tolerance=tolerance)
        length = np.linalg.norm(fit.coefficients[0])
        directions.append(fit.coefficients[0] / length if length > 0 else fit.coefficients[0])
    return np.stack(directions)


def _spectrum(rows: TrainingRows) -> closed_form.Spectrum:
    return closed_form.Spectrum(rows.block.standard.cpu().numpy())


def _to_fit(rows: TrainingRows, weights: np.ndarray, intercepts: np.ndarray) -> LinearFit:
    flat = weights.reshape(-1, weights.shape[-1])
    return closed_form.unstandardize(flat, intercepts.reshape(-1), rows.block.mean, rows.block.deviation)


def sklearn_estimator(classifier: BaseEstimator) -> Estimator:
    """Return the `Estimator` of a scikit-learn classifier, used with its own parameters on standardized features.

    If it sets `coef_` [1, D] and `intercept_`, its probes have directions; otherwise only margins.
    """

    def fit(rows: TrainingRows, labels: np.ndarray, C: np.ndarray) -> LinearFit | ModelFit:
        standard = rows.block.standard.cpu().numpy().astype(np.float64)
        models: list[Any] = []
        for y in labels:
            model: Any = clone(classifier)
            model.fit(standard, y.astype(np.int64))
            models.append(getattr(model, "best_estimator_", model))
        if any(np.size(getattr(model, "coef_", ())) != standard.shape[1] for model in models):
            return ModelFit([model for model in models for _ in range(C.shape[1])], rows.block)
        weights = np.stack([np.ravel(model.coef_) for model in models]).astype(np.float64)
        intercepts = np.array([np.ravel(model.intercept_)[0] for model in models], dtype=np.float64)
        weights, intercepts = (np.repeat(a, C.shape[1], axis=0) for a in (weights, intercepts))
        result = _to_fit(rows, weights, intercepts)
        return replace(result, gap=np.full(len(weights), np.nan))

    return Estimator(fit, None, log_odds=False, description=repr(classifier))


BUILT_IN: Mapping[str, Estimator] = {
    "logistic": Estimator(_logistic, "log", log_odds=True, description="logistic, L2, classes balanced"),
    "ridge": Estimator(_ridge, "squared", log_odds=False, description="ridge, threshold midway between class means"),
    "lda": Estimator(_discriminant, "log", log_odds=True, description="linear discriminant, ridge, equal priors"),
    "mean_difference": Estimator(_mean_difference, None, log_odds=False, description="mean difference"),
    "subspace": Estimator(
        _logistic,
        "log",
        log_odds=False,
        final=_subspace,
        description="mean direction of a Gaussian concept subspace",
    ),
}


def _problem(entry: object) -> str | None:
    if isinstance(entry, Estimator) or (isinstance(entry, BaseEstimator) and hasattr(entry, "fit")):
        return None
    return f"{entry!r} is neither a probes.Estimator nor a scikit-learn estimator"


estimators: Registry[Estimator | BaseEstimator] = Registry(
    "estimator", BUILT_IN, group="groundscope.estimators", check=_problem, error=ProbeError
)
"""Estimators of `probes.fit_grid` by name; ``register(name, estimator)`` adds an `Estimator` or a scikit-learn estimator."""


def resolve(estimator: str | BaseEstimator | Estimator) -> tuple[Estimator, BaseEstimator | None]:
    """Return an estimator given by name or as an object, and the scikit-learn estimator if it is one.

    Raises
    ------
    ProbeError
        If the name is unknown, or the object is no estimator.
    """
    entry = estimators[estimator] if isinstance(estimator, str) else estimator
    if problem := _problem(entry):
        msg = f"unknown estimator: {problem}; choose from {', '.join(estimators)}, or give a scikit-learn estimator"
        raise ProbeError(msg)
    return (sklearn_estimator(entry), entry) if isinstance(entry, BaseEstimator) else (entry, None)
