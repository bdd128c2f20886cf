"""Limited-memory BFGS over a batch of logistic regressions that share their features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

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
    work = [torch.empty_like(labels) for _ in range(3)]
    margins, moved, rows = work
    if start is None:
        v, curvature, value = _constant(space, labels, costs)
        margins.copy_(v[:, -1:].expand_as(margins))
    else:
        v = start.clone()
        space.margins(v, margins)
        curvature, value = _curvature(margins, costs), _value(margins, labels, costs, v, space)
    result = v.clone()
    place = torch.arange(len(v), device=v.device)
    _derivatives(margins, labels, costs, rows)
    gradient = space.gradient(v, rows)
    pairs = _Pairs.none(v)
    for iteration in range(max_iterations):
        step = pairs.direction(space, gradient, curvature)
        space.margins(step, moved)
        margins += moved
        _derivatives(margins, labels, costs, rows)
        new = v + step
        new_gradient = space.gradient(new, rows)
        down, slope = -space.dot(step, gradient), space.dot(step, new_gradient)
        far = torch.nonzero(~(slope <= 0.5 * down))[:, 0]
        if len(far):
            _shorten(space, far, (v, step, new, new_gradient), (margins, moved, labels, costs), (down, slope))
            step = new - v
        # The trapezoid along the step is near enough to tell what is done; what is proven is computed elsewhere.
        value = value + 0.5 * (space.dot(step, gradient) + space.dot(step, new_gradient))
        pairs.add(space, step, new_gradient - gradient)
        v, gradient = new, new_gradient
        if iteration < 2 or iteration % _REFRESH == 0:
            curvature = _curvature(margins, costs)
        if iteration == 1 or (iteration and iteration % _REFRESH == 0):
            value = _value(margins, labels, costs, v, space)
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
        pairs.keep(keep)
        kept = margins[keep]
        margins, moved, rows = (t[: len(keep)] for t in work)
        margins.copy_(kept)
    result[place] = v
    return result


def _constant(space: Space, labels: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """No weights and the best intercept [P, size], with the total curvature of the losses [P] and the objective [P]."""
    v = costs.new_zeros(len(labels), space.size)
    total = costs.sum(dim=1)
    share = torch.einsum("pn,pn->p", costs, labels) / total
    v[:, -1] = torch.logit(share)
    # The objective there is the entropy of the classes.
    return v, total * share * (1 - share), -total * (torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))


def _derivatives(margins: Tensor, labels: Tensor, costs: Tensor, out: Tensor) -> None:
    torch.sigmoid(margins, out=out)
    out.sub_(labels).mul_(costs)


def _curvature(margins: Tensor, costs: Tensor) -> Tensor:
    """Total curvature of the losses [P]."""
    p = torch.sigmoid(margins)
    bend = torch.einsum("pn,pn->p", p.addcmul_(p, p, value=-1), costs)
    return torch.maximum(bend, torch.finfo(bend.dtype).eps * costs.sum(dim=1))


def _value(margins: Tensor, labels: Tensor, costs: Tensor, v: Tensor, space: Space) -> Tensor:
    """Return the objective [P]."""
    # log(1 + exp(m)) - y m, whichever the class.
    loss = torch.nn.functional.softplus(margins).addcmul_(margins, labels, value=-1)
    return 0.5 * (space.dot(v, v) - v[:, -1] ** 2) + torch.einsum("pn,pn->p", loss, costs)


@dataclass
class _Pairs:
    """The last steps and changes of the gradient, each pair scaled so that their inner product is 1.

    The product with the inverse Hessian they imply is taken in the compact form of Byrd, Nocedal and Schnabel (1994,
    theorem 2.2): a few batched products however many pairs there are.
    """

    steps: Tensor
    """[P, MEMORY, size]."""
    changes: Tensor
    """The same, of the gradient."""
    table: Tensor
    """[P, MEMORY, MEMORY]: inner products of steps (row) and changes (column)."""
    order: list[int]
    """Places of the pairs there are, the oldest first."""

    @classmethod
    def none(cls, like: Tensor) -> Self:
        """Begin without any, for problems of vectors [P, size]."""
        count, size = like.shape
        shape = (count, MEMORY, size)
        return cls(like.new_empty(shape), like.new_empty(shape), like.new_empty(count, MEMORY, MEMORY), [])

    def add(self, space: Space, step: Tensor, change: Tensor) -> None:
        """Keep a pair, in the place of the oldest where there is no room."""
        full = len(self.order) == MEMORY
        place = self.order.pop(0) if full else len(self.order)
        self.order.append(place)
        curve = space.dot(step, change)
        # Where rounding hides the curvature the pair is void: a pair of zeros leaves the product as it is.
        scale = torch.where(curve > torch.finfo(curve.dtype).tiny, curve.rsqrt(), 0.0)[:, None]
        torch.mul(step, scale, out=self.steps[:, place])
        torch.mul(change, scale, out=self.changes[:, place])
        n = len(self.order)
        self.table[:, :n, place] = space.dots(self.steps[:, :n], self.changes[:, place])

    def keep(self, rows: Tensor) -> None:
        """Forget the other problems."""
        self.steps, self.changes, self.table = self.steps[rows], self.changes[rows], self.table[rows]

    def direction(self, space: Space, gradient: Tensor, curvature: Tensor) -> Tensor:
        """Return the step [P, size], around the space's preconditioner."""
        n = len(self.order)
        if not n:
            return space.precondition(gradient, curvature).neg_()
        steps, changes = self.steps[:, :n], self.changes[:, :n]
        ordered = torch.tensor(self.order, device=gradient.device)
        table = self.table[:, ordered[:, None], ordered]
        inner = space.dots(steps, gradient)[:, ordered, None]
        first = torch.linalg.solve_triangular(table, inner, upper=True, unitriangular=True)
        q = _less(gradient, self._placed(first, ordered), changes)
        q = space.precondition(q, curvature)
        if space.rescaled:
            last = self.changes[:, self.order[-1]]
            bend = space.dot(space.precondition(last, curvature), last)
            q *= torch.where(bend > 0, 1 / bend.clamp_min(torch.finfo(bend.dtype).tiny), 1.0)[:, None]
        rest = space.dots(changes, q)[:, ordered, None] - first
        second = torch.linalg.solve_triangular(table.mT, rest, upper=False, unitriangular=True)
        return _less(q, self._placed(second, ordered), steps).neg_()

    @staticmethod
    def _placed(values: Tensor, ordered: Tensor) -> Tensor:
        """Put values [P, n, 1] back from order of age to the places of the pairs, [P, 1, n]."""
        out = torch.empty_like(values[:, :, 0])
        out[:, ordered] = values[:, :, 0]
        return out[:, None]


def _less(v: Tensor, shares: Tensor, stack: Tensor) -> Tensor:
    """Subtract from v [P, size] the sum over i of shares [P, 1, i] times stack [P, i, size]."""
    return torch.baddbmm(v[:, None], shares, stack, alpha=-1)[:, 0]


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
