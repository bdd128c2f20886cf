"""Limited-memory BFGS for a batch of logistic regressions with shared features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from probes.solvers.rotated_features import Space

MEMORY = 8
"""Number of stored pairs of steps and gradient changes."""
_DROP = 0.85
"""Converged problems are removed from the batch when at most this share remains."""
_REFRESH = 4
"""Number of iterations between exact evaluations of curvature and objective."""
_SLOPE = 0.5
"""A step is accepted if the slope at its end is at most this share of the negative slope at its start."""


def minimize(
    space: Space,
    labels: Tensor,
    costs: Tensor,
    tolerance: float,
    max_iterations: int = 100,
    start: Tensor | None = None,
) -> Tensor:
    """Minimize ``0.5 ||w||^2 + sum_i c_i log(1 + exp(-y_i m_i))`` for each problem.

    Parameters
    ----------
    space
        Holds the features of n rows.
    labels, costs
        [P, n] in the space's dtype: 0 or 1, and C times the row's weight. Each problem has both classes. Their memory is
        reused, so that their values are overwritten.
    tolerance
        Relative gap to stop at, estimated in the working precision; the caller computes the proven gap.
    max_iterations
        Maximum number of iterations; unconverged problems are returned at their last point.
    start
        [P, size]: initial point; by default zero weights and the best intercept.

    Returns
    -------
    Solutions [P, size].

    Notes
    -----
    Margins are linear in the step, so the line search needs no product with the features. A step is accepted if the slope
    at its end is at most half of the initial descent, which for a convex function bounds the objective; otherwise the zero
    of the slope is estimated with the secant method (Nocedal and Wright 2006, chapters 3 and 7). Converged problems are
    removed from the batch.
    """
    margins, moved, rows = (torch.empty_like(labels) for _ in range(3))
    if start is None:
        v, curvature, value = _start_at_constant(space, labels, costs)
        margins.copy_(v[:, -1:].expand_as(margins))
    else:
        v = start.clone()
        space.margins(v, margins)
        curvature, value = _curvature(margins, costs, rows), _value(margins, labels, costs, v, space)
    result = v.clone()
    place = torch.arange(len(v), device=v.device)
    # The result of a converged problem is fixed while it stays in the batch: further steps would only follow rounding
    # errors of its gradient.
    finished = torch.zeros(len(v), dtype=torch.bool, device=v.device)
    _derivatives(margins, labels, costs, rows)
    gradient = space.gradient(v, rows)
    pairs = _Pairs.empty(v)
    for iteration in range(max_iterations):
        step = pairs.direction(space, gradient, curvature)
        space.margins(step, moved)
        margins += moved
        _derivatives(margins, labels, costs, rows)
        new = v + step
        new_gradient = space.gradient(new, rows)
        before, slope = space.dot(step, gradient), space.dot(step, new_gradient)
        # For a convex function, the slope at the end bounds the increase: no line search below this bound.
        allowed = torch.maximum(-_SLOPE * before, 0.1 * tolerance * value)
        far = torch.nonzero(~(slope <= allowed) & ~finished)[:, 0]
        if len(far):
            _shorten(
                space, far, (v, step, new, new_gradient), (margins, moved, labels, costs), (-before, slope, allowed)
            )
            step = new - v
            before, slope = space.dot(step, gradient), space.dot(step, new_gradient)
        # The trapezoidal rule along the step is accurate enough to detect convergence; the proven gap is computed elsewhere.
        value = value + 0.5 * (before + slope)
        pairs.add(space, step, new_gradient, gradient, (before, slope))
        v, gradient = new, new_gradient
        if iteration < 2 or iteration % _REFRESH == 0:
            curvature = _curvature(margins, costs, rows)
        if iteration == 1 or (iteration and iteration % _REFRESH == 0):
            value = _value(margins, labels, costs, v, space)
        gap = 0.5 * (space.dot(gradient, gradient) - gradient[:, -1] ** 2) + gradient[:, -1] ** 2 / curvature
        done = torch.nonzero((gap <= tolerance * value) & ~finished)[:, 0]
        result[place[done]] = v[done]
        finished[done] = True
        keep = torch.nonzero(~finished)[:, 0]
        if not len(keep):
            return result
        if len(keep) > _DROP * len(place):  # copying costs more than another iteration of a few problems
            continue
        place, v, gradient, curvature, value = (t[keep] for t in (place, v, gradient, curvature, value))
        finished = finished[keep]
        pairs.keep(keep)
        # Reuse free memory: a new allocation would cost as much as an iteration.
        labels, moved = _compact(labels, keep, moved)
        costs, rows = _compact(costs, keep, rows)
        margins, moved = _compact(margins, keep, moved)
        moved, rows = moved[: len(keep)], rows[: len(keep)]
    result[place[~finished]] = v[~finished]
    return result


def _compact(table: Tensor, keep: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Copy the rows to keep into free memory; return the copy, and the old table as free memory."""
    copied = free[: len(keep)]
    torch.index_select(table, 0, keep, out=copied)
    return copied, table


def _start_at_constant(space: Space, labels: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return zero weights and the best intercept [P, size], the total curvature of the losses [P] and the objective [P]."""
    v = costs.new_zeros(len(labels), space.size)
    total = costs.sum(dim=1)
    share = torch.linalg.vecdot(costs, labels) / total
    v[:, -1] = torch.logit(share)
    # The objective at this point is the entropy of the classes.
    return v, total * share * (1 - share), -total * (torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))


def _derivatives(margins: Tensor, labels: Tensor, costs: Tensor, out: Tensor) -> None:
    torch.sigmoid(margins, out=out)
    out.sub_(labels).mul_(costs)


def _curvature(margins: Tensor, costs: Tensor, scratch: Tensor) -> Tensor:
    """Return the total curvature of the losses [P]."""
    p = torch.sigmoid(margins, out=scratch)
    total = torch.linalg.vecdot(p.addcmul_(p, p, value=-1), costs)
    return torch.maximum(total, torch.finfo(total.dtype).eps * costs.sum(dim=1))


def _value(margins: Tensor, labels: Tensor, costs: Tensor, v: Tensor, space: Space) -> Tensor:
    """Return the objective [P]."""
    # log(1 + exp(m)) - y m, for both classes.
    loss = torch.nn.functional.softplus(margins).addcmul_(margins, labels, value=-1)
    return 0.5 * (space.dot(v, v) - v[:, -1] ** 2) + torch.linalg.vecdot(loss, costs)


@dataclass
class _Pairs:
    """The last steps and gradient changes, each pair scaled to inner product 1.

    The product with the implied inverse Hessian uses the compact form of Byrd, Nocedal and Schnabel (1994, theorem 2.2): a
    few batched products for any number of pairs.
    """

    steps: Tensor
    """[P, MEMORY, size]."""
    changes: Tensor
    """[P, MEMORY, size]: gradient changes."""
    inverse: Tensor
    """[P, MEMORY, MEMORY]: inverse of the triangular table of inner products of each step with the changes not older."""
    along: Tensor
    """[P, MEMORY]: inner products of the steps with the gradient."""
    count: int = 0
    newest: int = -1

    @classmethod
    def empty(cls, like: Tensor) -> Self:
        """Create storage without pairs, for problems with vectors [P, size]."""
        count, size = like.shape
        shape = (count, MEMORY, size)
        inverse, along = like.new_zeros(count, MEMORY, MEMORY), like.new_zeros(count, MEMORY)
        return cls(like.new_empty(shape), like.new_empty(shape), inverse, along)

    def add(self, space: Space, step: Tensor, gradient: Tensor, before: Tensor, slopes: tuple[Tensor, Tensor]) -> None:
        """Store a pair, which replaces the oldest if the memory is full.

        `gradient` is the gradient at the end of the step, `before` at its start, and `slopes` are their slopes along the
        step, start first.
        """
        curve = slopes[1] - slopes[0]
        # If rounding hides the curvature, a pair of zeros is stored, which does not change the product.
        scale = torch.where(curve > torch.finfo(curve.dtype).tiny, curve.rsqrt(), 0.0)
        place = self.newest = (self.newest + 1) % MEMORY
        if n := self.count:
            along = space.dots(self.steps[:, :n], gradient)
            inner = (along - self.along[:, :n]) * scale[:, None]
            self.along[:, :n] = along
            # Removing the oldest pair, whose column has only its diagonal, removes a row and a column of the inverse; a new
            # last column of a triangular matrix adds one column to the inverse.
            self.inverse[:, place] = 0
            self.inverse[:, :n, place] = 0
            self.inverse[:, :n, place] = -torch.bmm(self.inverse[:, :n, :n], inner[:, :, None])[:, :, 0]
        self.inverse[:, place, place] = 1
        torch.mul(step, scale[:, None], out=self.steps[:, place])
        torch.sub(gradient, before, out=self.changes[:, place])
        self.changes[:, place] *= scale[:, None]
        self.along[:, place] = scale * slopes[1]
        self.count = max(self.count, place + 1)

    def keep(self, rows: Tensor) -> None:
        """Remove all other problems."""
        n = self.count
        for name in ("steps", "changes"):
            old = getattr(self, name)
            new = old.new_empty(len(rows), *old.shape[1:])
            torch.index_select(old[:, :n], 0, rows, out=new[:, :n])
            setattr(self, name, new)
        self.inverse, self.along = self.inverse[rows], self.along[rows]

    def direction(self, space: Space, gradient: Tensor, curvature: Tensor) -> Tensor:
        """Return the step [P, size], based on the space's preconditioner."""
        n = self.count
        if not n:
            return space.precondition(gradient, curvature).neg_()
        steps, changes, inverse = self.steps[:, :n], self.changes[:, :n], self.inverse[:, :n, :n]
        first = torch.bmm(self.along[:, None, :n], inverse.mT)  # [P, 1, n]
        q = torch.baddbmm(gradient[:, None], first, changes, alpha=-1)[:, 0]
        q = space.precondition(q, curvature)
        form = space.quadratic_form(self.changes[:, self.newest], curvature)
        if form is not None:
            q *= torch.where(form > 0, 1 / form.clamp_min(torch.finfo(form.dtype).tiny), 1.0)[:, None]
        second = torch.bmm(space.dots(changes, q)[:, None] - first, inverse)
        return torch.baddbmm(q[:, None], second, steps, beta=-1)[:, 0]


def _shorten(
    space: Space,
    far: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor, Tensor],
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    slopes: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Shorten the steps of the problems `far` until the slope at their end is small enough; write new point and margins."""
    v, step, new, new_gradient = vectors
    margins, moved, labels, costs = rows
    down, slope, allowed = (s[far] for s in slopes)
    v, step, labels, costs, moved = v[far], step[far], labels[far], costs[far], moved[far]
    base = margins[far] - moved
    size = torch.ones_like(down)
    trial, point, gradient = base + moved, v + step, new_gradient[far]
    for _ in range(20):
        share = torch.nan_to_num(down / (down + slope), nan=0.1).clamp(0.1, 0.9)
        wide = ~(slope <= allowed)
        size = torch.where(wide, size * share, size)
        trial = base + size[:, None] * moved
        derivatives = torch.empty_like(trial)
        _derivatives(trial, labels, costs, derivatives)
        point = v + size[:, None] * step
        gradient = space.gradient(point, derivatives)
        slope = space.dot(step, gradient)
        if bool((slope <= allowed).all()):
            break
    margins[far], new[far], new_gradient[far] = trial, point, gradient
