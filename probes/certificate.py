"""A proof, in float64 and from the features themselves, of how far a logistic fit is from its optimum."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-300
_EXACT = 40.0
"""Beyond this softplus is its argument in float64."""


def certify(
    features: Tensor, labels: Tensor, costs: Tensor, weights: Tensor, intercepts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
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
    intercepts [P] after a Newton step on the intercept alone, the objective there [P], and the bound over it [P].

    Notes
    -----
    With ``a_i = sigma(-y_i m_i)``, shrunk for one class by the factor s that makes both classes pull equally, a is dual
    feasible and the duality gap is ``0.5 ||w - X'(c a y)||^2`` plus ``sum_i c_i KL(a'_i || a_i)`` over the shrunk rows
    (Fenchel and Young's inequality is an equality elsewhere). With ``s = 1`` it is the strong-convexity bound
    ``||grad||^2 / 2``. KL is bounded by chi-square, here ``(1 - s)^2 a / (1 - a)``, and
    that by ``(1 - s)^2`` times the exponential of the worst margin.
    """
    margins = weights @ features.T
    margins += intercepts[:, None]
    rows, scratch = torch.empty_like(margins), torch.empty_like(margins)
    _pulls(margins, labels, costs, rows)
    torch.sigmoid(margins, out=scratch)
    scratch.addcmul_(scratch, scratch, value=-1)
    bend = torch.einsum("pn,pn->p", scratch, costs)
    step = torch.where(bend > 0, rows.sum(dim=1) / bend.clamp_min(_TINY), 0.0).clamp(-1, 1)
    margins -= step[:, None]
    _pulls(margins, labels, costs, rows)  # minus the pull for class 1, plus it for class 0
    up = -torch.einsum("pn,pn->p", rows, labels)
    down = rows.sum(dim=1) + up
    weaker = torch.minimum(up, down)
    keep_up, keep_down = (torch.where(s > 0, weaker / s.clamp_min(_TINY), 1.0) for s in (up, down))
    torch.mul(labels, (keep_up - keep_down)[:, None], out=scratch)
    scratch += keep_down[:, None]
    rows *= scratch
    rest = weights + rows @ features
    torch.mul(labels, -2, out=scratch)
    scratch += 1
    margins *= scratch  # minus the agreement
    worst = margins.amax(dim=1)
    loss = torch.einsum("pn,pn->p", torch.nn.functional.softplus(margins, threshold=_EXACT), costs)
    objective = 0.5 * (weights * weights).sum(dim=1) + loss
    lost = torch.maximum((1 - keep_up) ** 2, (1 - keep_down) ** 2)
    shrunk = torch.where(lost > 0, lost * torch.exp(worst), 0.0) * costs.sum(dim=1)
    return intercepts - step, objective, (0.5 * (rest * rest).sum(dim=1) + shrunk) / objective


def _pulls(margins: Tensor, labels: Tensor, costs: Tensor, out: Tensor) -> None:
    """Write the losses' derivatives by margin [P, n]."""
    torch.sigmoid(margins, out=out)
    out.sub_(labels).mul_(costs)
