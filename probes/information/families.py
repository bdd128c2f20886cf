"""Predictive families: the readers with which information is measured, an open registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from groundscope.core.errors import ProbeError
from groundscope.core.registry import Registry
from probes.information.linear import fit_linear
from probes.information.nonlinear import CHOICES, fit_nonlinear
from probes.information.problem import Predictor, Problem

LINEAR_PENALTIES = (1.0, 0.1, 0.01, 0.001, 0.0001)
"""Penalties of the mean log-loss; features have the mean squared norm k."""

Fit = Callable[[Sequence[Problem], Sequence[Sequence[Any]]], Sequence[Sequence[Predictor]]]
"""Maps problems, and for each problem its choices, to a predictor for each problem and choice."""


@dataclass(frozen=True)
class PredictiveFamily:
    """A family of readers: an entry of `probes.predictive_families`.

    Information is measured relative to a family (Xu et al. 2020, arXiv 2002.10689). It must include the reader that ignores
    the features; `groundscope` adds it to the choices of every family.

    Examples
    --------
    A family with one penalty:

    >>> import probes
    >>> from dataclasses import replace
    >>> strict = replace(probes.predictive_families["linear"], choices=(1.0,))
    >>> probes.predictive_families.register("linear_strict", strict)
    >>> "linear_strict" in probes.predictive_families
    True
    >>> probes.predictive_families.unregister("linear_strict")
    """

    fit: Fit
    """Fits all problems; a predictor maps features [m, k] to log-probabilities [m, K] in nats."""
    choices: tuple[Any, ...]
    """Penalties, or other settings, among which the inner folds choose."""
    base: str = ""
    """Family whose selected reader is `Problem.base`, and one of the choices; by default the class shares."""
    description: str = ""
    """Description for the provenance."""


def _problem_of(family: PredictiveFamily) -> str | None:
    return None if family.choices else "it has no choices; give at least one penalty"


predictive_families: Registry[PredictiveFamily] = Registry(
    "predictive family",
    {
        "linear": PredictiveFamily(
            fit_linear, LINEAR_PENALTIES, description="multinomial logistic regression, L2 penalty"
        ),
        "nonlinear": PredictiveFamily(
            fit_nonlinear, CHOICES, base="linear", description="logits of the linear family plus those of an MLP"
        ),
    },
    group="groundscope.predictive_families",
    check=_problem_of,
    error=ProbeError,
)
"""The families by name; `register` adds one."""
