"""A proof, in float64 and from the features themselves, of how far a logistic fit is from its optimum."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.solvers.coordinates import multiply

_EXACT = 40.0
"""Beyond this softplus is its argument in float64."""


def certify(
    features: Tensor, labels: Tensor, costs: Tensor, weights: Tensor, intercepts: Tensor
) -> tuple[Tensor, Tensor]:
    """Bound ``F - min F`` of ``F = 0.5 ||w||^2 + sum_i c_i log(1 + exp(-y_i m_i))`` whatever way w was found.

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
    The objective [P], and the bound over it [P]; infinite where the intercept is so far off that this proves nothing.

    Notes
    -----
    Any p in [0, 1] with ``sum_i c_i (p_i - y_i) = 0``, y in 0 and 1, is dual feasible, and the duality gap is then
    ``0.5 ||w + X'(c (p - y))||^2 + sum_i c_i KL(p_i || s_i)`` with ``s_i = sigma(m_i)`` (Fenchel and Young). Here p is s
    moved along its own derivative, ``p = s - t s (1 - s)``, with the one t that makes it feasible; it stays in [0, 1] for
    ``|t| <= 1``. KL is bounded by chi-square, which is ``t^2 s (1 - s)``. With ``t = 0`` it is the strong-convexity bound
    ``||grad||^2 / 2``.
    """
    margins = multiply(weights, features.T)
    margins += intercepts[:, None]
    s = torch.sigmoid(margins)
    pull = (s - labels).mul_(costs)
    bend = s.addcmul_(s, s, value=-1).mul_(costs)
    total = bend.sum(dim=1)
    t = pull.sum(dim=1) / total
    pull.addcmul_(bend, t[:, None], value=-1)
    rest = multiply(pull, features)
    rest += weights
    # log(1 + exp(m)) - y m, whichever the class.
    loss = torch.nn.functional.softplus(margins, threshold=_EXACT).addcmul_(margins, labels, value=-1)
    objective = 0.5 * torch.linalg.vecdot(weights, weights) + torch.linalg.vecdot(loss, costs)
    bound = 0.5 * torch.linalg.vecdot(rest, rest) + t * t * total
    return objective, torch.where(t.abs() <= 1, bound / objective, torch.inf)
