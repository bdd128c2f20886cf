"""Certify, in float64 and from the original features, the distance of a logistic fit from its optimum."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.solvers.rotated_features import multiply

_EXACT = 40.0
"""Above this argument, softplus equals its argument in float64."""


def certify(
    features: Tensor, labels: Tensor, costs: Tensor, weights: Tensor, intercepts: Tensor
) -> tuple[Tensor, Tensor]:
    """Bound ``F - min F`` of ``F = 0.5 ||w||^2 + sum_i c_i log(1 + exp(-y_i m_i))`` for any w.

    Parameters
    ----------
    features
        [n, D].
    labels, costs
        [P, n]: 0 or 1, and C times the row's weight.
    weights, intercepts
        [P, D] and [P]. All float64.

    Returns
    -------
    The objective [P], and the bound divided by it [P]; infinite if the intercept is too far from optimal for a bound.

    Notes
    -----
    Any p in [0, 1] with ``sum_i c_i (p_i - y_i) = 0``, y in 0 and 1, is dual feasible, and the duality gap is then
    ``0.5 ||w + X'(c (p - y))||^2 + sum_i c_i KL(p_i || s_i)`` with ``s_i = sigma(m_i)`` (Fenchel and Young). Here p is s
    moved along its derivative, ``p = s - t s (1 - s)``, with the t that makes it feasible; it stays in [0, 1] for
    ``|t| <= 1``. KL is bounded by chi-square, which is ``t^2 s (1 - s)``. With ``t = 0`` this is the strong-convexity bound
    ``||grad||^2 / 2``.
    """
    margins = multiply(weights, features.T)
    margins += intercepts[:, None]
    s = torch.sigmoid(margins)
    residual = (s - labels).mul_(costs)
    curvature = s.addcmul_(s, s, value=-1).mul_(costs)
    total = curvature.sum(dim=1)
    t = residual.sum(dim=1) / total
    residual.addcmul_(curvature, t[:, None], value=-1)
    dual_residual = multiply(residual, features)
    dual_residual += weights
    # log(1 + exp(m)) - y m, for both classes.
    loss = torch.nn.functional.softplus(margins, threshold=_EXACT).addcmul_(margins, labels, value=-1)
    objective = 0.5 * torch.linalg.vecdot(weights, weights) + torch.linalg.vecdot(loss, costs)
    bound = 0.5 * torch.linalg.vecdot(dual_residual, dual_residual) + t * t * total
    return objective, torch.where(t.abs() <= 1, bound / objective, torch.inf)
