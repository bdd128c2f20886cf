"""Probes as scikit-learn estimators: ``fit(X, y)``, ``decision_function``, ``predict``, ``coef_``.

All but `MultinomialProbe` are binary. They standardize inside `fit`, balance the classes, and return weights in the units
of X. They use the same solvers as the probes of a grid, and can be used without one.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, cast

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from probes.protocol.estimators import BUILT_IN, SUBSAMPLE_SHARE, SUBSAMPLES, TrainingRows, concept_directions
from probes.solvers.closed_form import Spectrum, unstandardize
from probes.solvers.logistic_float32 import RowBlock
from probes.solvers.logistic_reference import LinearFit
from probes.solvers.multinomial import fit_multinomial


class _Probe(ClassifierMixin, BaseEstimator):
    """Common base class of the probes."""

    _method: ClassVar[str]

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to features [n, D] and labels [n] of two classes; the second in sorted order is the positive class."""
        features, labels = self._start(X, y)
        fit = self._fit(features, labels, np.arange(len(labels)))
        self.coef_, self.intercept_ = fit.coefficients.copy(), fit.intercepts.copy()
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Return margins float64 [n]; positive means the second class."""
        check_is_fitted(self)
        features = validate_data(self, X, reset=False, dtype=np.float64)
        return features @ self.coef_[0] + self.intercept_[0]

    def predict(self, X: Any) -> np.ndarray:
        """Return classes [n]."""
        check_is_fitted(self)
        return self.classes_[(self.decision_function(X) > 0).astype(int)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def _start(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        checked: Any = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        features, values = checked
        check_classification_targets(values)
        kind = type_of_target(values, input_name="y", raise_unknown=True)
        if kind != "binary" and not self.__sklearn_tags__().classifier_tags.multi_class:
            msg = f"Only binary classification is supported. The type of the target is {kind}."
            raise ValueError(msg)
        self.classes_, labels = np.unique(values, return_inverse=True)
        if len(self.classes_) < 2:
            msg = f"{type(self).__name__} needs two classes; the data holds one class only: {self.classes_[0]!r}"
            raise ValueError(msg)
        return features, labels.astype(np.float64)

    def _fit(self, features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> LinearFit:
        rows = TrainingRows(RowBlock.of(features), groups, float(getattr(self, "tol", 1e-8)))
        C = np.array([[float(getattr(self, "C", 1.0))]])
        return cast("LinearFit", BUILT_IN[self._method].fit(rows, labels[None], C))


class LogisticProbe(_Probe):
    """L2-regularized logistic regression on standardized features, with balanced classes.

    Equals ``make_pipeline(StandardScaler(), LogisticRegression(C=C, class_weight="balanced"))`` at its optimum;
    ``gap_`` is a proven upper bound on the relative distance of its objective from the minimum.

    Parameters
    ----------
    C
        Inverse penalty.
    tol
        Maximum proven relative gap.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import LogisticProbe
    >>> x = np.array([[0.0, 1.0], [1.0, 0.0], [4.0, 1.0], [5.0, 0.0]])
    >>> probe = LogisticProbe(C=0.1).fit(x, ["no", "no", "yes", "yes"])
    >>> probe.predict([[0.0, 0.0], [6.0, 0.0]])
    array(['no', 'yes'], dtype='<U3')
    >>> probe.gap_ < 1e-8
    True
    """

    _method = "logistic"

    def __init__(self, C: float = 1.0, *, tol: float = 1e-8) -> None:
        self.C = C
        self.tol = tol

    def _fit(self, features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> LinearFit:
        fit = super()._fit(features, labels, groups)
        self.gap_ = float(fit.gap[0])
        return fit

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return probabilities [n, 2] under equal class priors."""
        check_is_fitted(self)
        positive = 0.5 * (1 + np.tanh(0.5 * self.decision_function(X)))
        return np.column_stack([1 - positive, positive])


class MultinomialProbe(_Probe):
    """L2-regularized multinomial (softmax) regression on standardized features, with two or more balanced classes.

    Equals ``make_pipeline(StandardScaler(), LogisticRegression(C=C, class_weight="balanced"))`` at its optimum for three
    or more classes; ``gap_`` is a proven upper bound on the relative distance of its objective from the minimum.
    ``coef_`` is [K, D], also for two classes.

    Parameters
    ----------
    C
        Inverse penalty.
    tol
        Maximum proven relative gap.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import MultinomialProbe
    >>> x = np.array([[0.0, 0.1], [0.1, 0.0], [4.0, 0.1], [4.1, 0.0], [0.0, 4.1], [0.1, 4.0]])
    >>> probe = MultinomialProbe().fit(x, ["red", "red", "green", "green", "blue", "blue"])
    >>> probe.predict([[5.0, 0.0], [0.0, 5.0]])
    array(['green', 'blue'], dtype='<U5')
    """

    def __init__(self, C: float = 1.0, *, tol: float = 1e-8) -> None:
        self.C = C
        self.tol = tol

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to features [n, D] and labels [n] of two or more classes; raise `ProbeError` if `tol` is not reached."""
        features, labels = self._start(X, y)
        block = RowBlock.of(features)
        standard_fit = fit_multinomial(
            Spectrum(block.standard.numpy()), labels.astype(int), len(self.classes_), self.C, tolerance=self.tol
        )
        fit = unstandardize(standard_fit.coefficients, standard_fit.intercepts, block.mean, block.deviation)
        self.coef_, self.intercept_, self.gap_ = fit.coefficients, fit.intercepts, standard_fit.gap
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Return margins float64 [n, K]; for two classes [n], the second class minus the first."""
        check_is_fitted(self)
        features = validate_data(self, X, reset=False, dtype=np.float64)
        margins = features @ self.coef_.T + self.intercept_
        return margins[:, 1] - margins[:, 0] if len(self.classes_) == 2 else margins

    def predict(self, X: Any) -> np.ndarray:
        """Return classes [n]."""
        margins = self.decision_function(X)
        return self.classes_[(margins > 0).astype(int) if margins.ndim == 1 else margins.argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return probabilities [n, K] under equal class priors."""
        margins = self.decision_function(X)
        if margins.ndim == 1:
            margins = np.column_stack([np.zeros(len(margins)), margins])
        p = np.exp(margins - margins.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = True
        return tags


class RidgeProbe(_Probe):
    """Ridge on -1/+1 labels and standardized features, ``||y - Xw||^2 + ||w||^2 / C``; threshold midway between classes.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import RidgeProbe
    >>> x = np.array([[0.0, 1.0], [1.0, 0.0], [4.0, 1.0], [5.0, 0.0]])
    >>> probe = RidgeProbe().fit(x, ["no", "no", "yes", "yes"])
    >>> probe.predict([[0.0, 0.0], [6.0, 0.0]])
    array(['no', 'yes'], dtype='<U3')
    """

    _method = "ridge"

    def __init__(self, C: float = 1.0) -> None:
        self.C = C


class LDAProbe(_Probe):
    """Fisher's linear discriminant with equal priors and ridge ``I / (C n)`` on the standardized within-class covariance.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import LDAProbe
    >>> x = np.array([[0.0, 1.0], [1.0, 0.0], [4.0, 1.0], [5.0, 0.0]])
    >>> probe = LDAProbe().fit(x, ["no", "no", "yes", "yes"])
    >>> probe.predict([[0.0, 0.0], [6.0, 0.0]])
    array(['no', 'yes'], dtype='<U3')
    """

    _method = "lda"

    def __init__(self, C: float = 1.0) -> None:
        self.C = C


class MeanDifferenceProbe(_Probe):
    """Difference of the class means (mass mean), in the units of X; threshold midway between them.

    Examples
    --------
    >>> import numpy as np
    >>> from probes import MeanDifferenceProbe
    >>> x = np.array([[0.0, 1.0], [1.0, 0.0], [4.0, 1.0], [5.0, 0.0]])
    >>> probe = MeanDifferenceProbe().fit(x, ["no", "no", "yes", "yes"])
    >>> probe.predict([[0.0, 0.0], [6.0, 0.0]])
    array(['no', 'yes'], dtype='<U3')
    """

    _method = "mean_difference"


class ConceptSubspaceProbe(_Probe):
    """Gaussian concept subspace (Zhao et al. 2024, arXiv 2410.00153): a distribution of directions.

    Logistic probes on random subsets of the rows (or groups) give unit directions in standardized features. Their mean is
    the decision direction; their mean and variance per feature define the Gaussian that `sample` draws from.

    Parameters
    ----------
    C
        Inverse penalty of the probes.
    n_probes, share
        Number of probes, and the share of groups for each.
    random_state
        Seed of the subsamples.

    Attributes
    ----------
    directions_
        float64 [n_probes, D], unit.
    mean_, variance_
        float64 [D].

    Examples
    --------
    >>> import numpy as np
    >>> from probes import ConceptSubspaceProbe
    >>> x = np.array([[0.0, 1.0], [1.0, 0.0], [4.0, 1.0], [5.0, 0.0]])
    >>> probe = ConceptSubspaceProbe(n_probes=3).fit(x, ["no", "no", "yes", "yes"])
    >>> probe.predict([[0.0, 0.0], [6.0, 0.0]])
    array(['no', 'yes'], dtype='<U3')
    >>> probe.sample(2).shape
    (2, 2)
    """

    _method = "subspace"

    def __init__(
        self, C: float = 1.0, *, n_probes: int = SUBSAMPLES, share: float = SUBSAMPLE_SHARE, random_state: int = 0
    ) -> None:
        self.C = C
        self.n_probes = n_probes
        self.share = share
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit to features [n, D] and labels [n] of two classes; whole `groups` [n] (default: rows) are drawn."""
        from probes.solvers import closed_form

        features, labels = self._start(X, y)
        names = np.arange(len(labels)) if groups is None else np.asarray(groups)
        block = RowBlock.of(features)
        standard = block.standard.numpy()
        self.directions_ = concept_directions(
            standard, labels, names, self.C, count=self.n_probes, share=self.share, seed=self.random_state
        )
        self.mean_, self.variance_ = self.directions_.mean(axis=0), self.directions_.var(axis=0)
        self.scale_ = block.deviation
        high, low, _ = closed_form.class_sums(standard, labels[None])
        weights = self.mean_[None]
        fit = closed_form.unstandardize(weights, closed_form.midway(weights, high, low), block.mean, block.deviation)
        self.coef_, self.intercept_ = fit.coefficients, fit.intercepts
        return self

    def sample(self, count: int, seed: int = 0) -> np.ndarray:
        """Draw unit directions float64 [count, D] of standardized features from the Gaussian."""
        check_is_fitted(self)
        rng = np.random.default_rng(seed)
        directions = self.mean_ + rng.normal(size=(count, len(self.mean_))) * np.sqrt(self.variance_)
        return directions / np.linalg.norm(directions, axis=1, keepdims=True)
