"""The linear family: logistic regression, binary or multinomial, with an L2 penalty."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from probes.information.problem import Predictor, Problem, log_softmax
from probes.solvers.closed_form import Spectrum
from probes.solvers.multinomial import MultinomialFit, fit_multinomial

TOLERANCE = 1e-9
"""Proven relative gap of each fit: far below what changes a log-loss in the fourth digit."""


def fit_linear(problems: Sequence[Problem], choices: Sequence[Sequence[float]]) -> list[list[Predictor]]:
    """Fit every problem at each of its penalties; with two classes this is binary logistic regression.

    Minimizes ``mean_i -log p(z_i | x_i) + penalty / 2 ||W||^2`` over weights ``W`` [K, k] and free intercepts, with
    ``p = softmax(W x + b)``: rows have equal weight, because class shares are part of the information.
    """
    return [_fit_one(problem, penalties) for problem, penalties in zip(problems, choices, strict=True)]


def _fit_one(problem: Problem, penalties: Sequence[float]) -> list[Predictor]:
    spectrum = Spectrum(problem.features)
    fits: dict[float, MultinomialFit] = {}
    start = None
    for penalty in sorted(set(penalties), reverse=True):  # the next solution is near the last
        C = 1 / (penalty * len(problem.classes))
        start = fit_multinomial(
            spectrum, problem.classes, problem.count, C, tolerance=TOLERANCE, start=start, balanced=False
        )
        fits[penalty] = start
    return [partial(_predict, fits[penalty].coefficients, fits[penalty].intercepts) for penalty in penalties]


def _predict(weights: np.ndarray, intercepts: np.ndarray, features: np.ndarray) -> np.ndarray:
    return log_softmax(features @ weights.T + intercepts)
