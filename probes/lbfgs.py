"""Limited-memory BFGS over a batch of logistic regressions that share their features."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.spaces import Space

MEMORY = 8
"""Pairs of steps and gradient changes kept."""
_DROP = 0.85
"""Problems that are done leave the batch once no larger share than this is left."""
_REFRESH = 4
"""Every so many iterations the curvature and the objective are computed anew."""


def minimise(
    space: Space,
    labels: Tensor,
    costs: Tensor,
    tolerance: float,
    max_iterations: int = 100,
    start: Tensor | None = None,
) -> Tensor:
    """Minimise ``0.5 ||w||^2 + sum_i c_i log(1 + exp(-y_i m_i))`` for each problem.

    Parameters
    ----------
    space
        Holds the features of n rows.
    labels, costs
        [P, n] in the space's dtype: 0 or 1, and C times the row's weight. Each problem has both classes.
    tolerance
        Relative gap to stop at, estimated in the working precision; what is proven is for the caller to compute.
    max_iterations
        After which a problem is returned as it stands.
    start
        [P, size]: where to begin; by default no weights and the best intercept.

    Returns
    -------
    Solutions [P, size].

    Notes
    -----
    Margins are linear in the step, so the search along it needs no product with the features. A step is taken where the
    slope along it has not grown to more than half of what it was downwards, which for a convex function bounds the
    objective; else the secant's zero of the slope is tried (Nocedal and Wright 2006, chapters 3 and 7). Problems that
    are done leave the batch.
    """
    result = start.clone() if start is not None else _constant(space, labels, costs)
    v = result.clone()
    place = torch.arange(len(v), device=v.device)
    work = [torch.empty_like(labels) for _ in range(3)]
    margins, moved, rows = work
    if start is None:
        margins.copy_(v[:, -1:].expand_as(margins))
    else:
        space.margins(v, margins)
    _derivatives(margins, labels, costs, rows)
    gradient = space.gradient(v, rows)
    curvature, value = _curvature(margins, labels, costs, v, space)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for iteration in range(max_iterations):
        step = _direction(space, gradient, curvature, pairs)
        space.margins(step, moved)
        margins += moved
        _derivatives(margins, labels, costs, rows)
        new = v + step
        new_gradient = space.gradient(new, rows)
        down = -space.dot(step, gradient)
        slope = space.dot(step, new_gradient)
        far = torch.nonzero(~(slope <= 0.5 * down))[:, 0]
        if len(far):
            _shorten(space, far, (v, step, new, new_gradient), (margins, moved, labels, costs), (down, slope))
        change, bend = new - v, new_gradient - gradient
        curve = space.dot(change, bend)
        # Where rounding hides the curvature the pair is void: rho 0 leaves the product as it is.
        rho = torch.where(curve > 0, 1 / curve.clamp_min(torch.finfo(curve.dtype).tiny), torch.zeros_like(curve))
        pairs.append((change, bend, rho))
        del pairs[:-MEMORY]
        v, gradient = new, new_gradient
        if iteration < 2 or iteration % _REFRESH == 0:
            curvature, value = _curvature(margins, labels, costs, v, space)
        gap = 0.5 * (space.dot(gradient, gradient) - gradient[:, -1] ** 2) + gradient[:, -1] ** 2 / curvature
        done = gap <= tolerance * value
        keep = torch.nonzero(~done)[:, 0]
        if len(keep) > _DROP * len(place):  # copying costs more than a further iteration of a few
            continue
        result[place[done]] = v[done]
        if not len(keep):
            return result
        place, v, gradient, curvature, value = (t[keep] for t in (place, v, gradient, curvature, value))
        labels, costs = labels[keep], costs[keep]
        pairs = [(s[keep], y[keep], r[keep]) for s, y, r in pairs]
        kept = margins[keep]
        margins, moved, rows = (t[: len(keep)] for t in work)
        margins.copy_(kept)
    result[place] = v
    return result


def _constant(space: Space, labels: Tensor, costs: Tensor) -> Tensor:
    v = costs.new_zeros(len(labels), space.size)
    positive = (costs * labels).sum(dim=1)
    v[:, -1] = torch.log(positive) - torch.log(costs.sum(dim=1) - positive)
    return v


def _derivatives(margins: Tensor, labels: Tensor, costs: Tensor, out: Tensor) -> None:
    torch.sigmoid(margins, out=out)
    out.sub_(labels).mul_(costs)


def _curvature(margins: Tensor, labels: Tensor, costs: Tensor, v: Tensor, space: Space) -> tuple[Tensor, Tensor]:
    """Total curvature of the losses [P] and the objective [P]."""
    p = torch.sigmoid(margins)
    bend = torch.einsum("pn,pn->p", p.addcmul_(p, p, value=-1), costs)
    floor = torch.finfo(bend.dtype).eps * costs.sum(dim=1)
    # log(1 + exp(m)) - y m, whichever the class.
    p = torch.nn.functional.softplus(margins)
    loss = torch.einsum("pn,pn->p", p.addcmul_(margins, labels, value=-1), costs)
    return torch.maximum(bend, floor), 0.5 * (space.dot(v, v) - v[:, -1] ** 2) + loss


def _direction(space: Space, gradient: Tensor, curvature: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Two-loop recursion (Nocedal and Wright 2006, algorithm 7.4) around the space's preconditioner."""
    q = gradient.clone()
    shares = []
    for change, bend, rho in reversed(pairs):
        share = rho * space.dot(q, change)
        q -= share[:, None] * bend
        shares.append(share)
    q = space.precondition(q, curvature)
    if pairs and space.rescaled:
        change, bend, rho = pairs[-1]
        scaled = space.dot(space.precondition(bend, curvature), bend)
        scale = torch.where(rho > 0, 1 / (rho * scaled).clamp_min(torch.finfo(q.dtype).tiny), torch.ones_like(rho))
        q *= scale[:, None]
    for (change, bend, rho), share in zip(pairs, reversed(shares), strict=True):
        q += (share - rho * space.dot(q, bend))[:, None] * change
    return q.neg_()


def _shorten(
    space: Space,
    far: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor, Tensor],
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    slopes: tuple[Tensor, Tensor],
) -> None:
    """Shorten the steps of some problems until the slope at their end is small enough; writes new point and margins."""
    v, step, new, new_gradient = vectors
    margins, moved, labels, costs = rows
    down, slope = slopes[0][far], slopes[1][far]
    v, step, labels, costs, moved = v[far], step[far], labels[far], costs[far], moved[far]
    base = margins[far] - moved
    size = torch.ones_like(down)
    there, point, gradient = base + moved, v + step, new_gradient[far]
    for _ in range(20):
        share = torch.nan_to_num(down / (down + slope), nan=0.1).clamp(0.1, 0.9)
        wide = ~(slope <= 0.5 * down)
        size = torch.where(wide, size * share, size)
        there = base + size[:, None] * moved
        derivatives = torch.empty_like(there)
        _derivatives(there, labels, costs, derivatives)
        point = v + size[:, None] * step
        gradient = space.gradient(point, derivatives)
        slope = space.dot(step, gradient)
        if bool((slope <= 0.5 * down).all()):
            break
    margins[far], new[far], new_gradient[far] = there, point, gradient
