"""Limited-memory BFGS over a batch of logistic regressions that share their features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from probes.solvers.coordinates import Space

MEMORY = 8
"""Pairs of steps and gradient changes kept."""
_DROP = 0.85
"""Problems that are done leave the batch once no larger share than this is left."""
_REFRESH = 4
"""Every so many iterations the curvature and the objective are computed anew."""
_SLOPE = 0.5
"""A step is taken where the slope at its end is at most this share of the one at its start, the other way."""


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
        [P, n] in the space's dtype: 0 or 1, and C times the row's weight. Each problem has both classes. Their memory is
        used further, so they are lost.
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
    margins, moved, rows = (torch.empty_like(labels) for _ in range(3))
    if start is None:
        v, curvature, value = _constant(space, labels, costs)
        margins.copy_(v[:, -1:].expand_as(margins))
    else:
        v = start.clone()
        space.margins(v, margins)
        curvature, value = _curvature(margins, costs, rows), _value(margins, labels, costs, v, space)
    result = v.clone()
    place = torch.arange(len(v), device=v.device)
    # What is done stays as it was then, though it moves on with the batch: steps in the rounding of its gradient would in
    # the end lead anywhere.
    finished = torch.zeros(len(v), dtype=torch.bool, device=v.device)
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
        before, slope = space.dot(step, gradient), space.dot(step, new_gradient)
        # A convex function is at the end at most the slope there above its start: less than this is nothing to search for.
        allowed = torch.maximum(-_SLOPE * before, 0.1 * tolerance * value)
        far = torch.nonzero(~(slope <= allowed) & ~finished)[:, 0]
        if len(far):
            _shorten(
                space, far, (v, step, new, new_gradient), (margins, moved, labels, costs), (-before, slope, allowed)
            )
            step = new - v
            before, slope = space.dot(step, gradient), space.dot(step, new_gradient)
        # The trapezoid along the step is near enough to tell what is done; what is proven is computed elsewhere.
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
        if len(keep) > _DROP * len(place):  # copying costs more than a further iteration of a few
            continue
        place, v, gradient, curvature, value = (t[keep] for t in (place, v, gradient, curvature, value))
        finished = finished[keep]
        pairs.keep(keep)
        # Into what is free: fresh memory would cost as much as an iteration.
        labels, moved = _moved(labels, keep, moved)
        costs, rows = _moved(costs, keep, rows)
        margins, moved = _moved(margins, keep, moved)
        moved, rows = moved[: len(keep)], rows[: len(keep)]
    result[place[~finished]] = v[~finished]
    return result


def _moved(table: Tensor, keep: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Copy the rows to keep into free memory; returns them there, and the memory they leave free."""
    there = free[: len(keep)]
    torch.index_select(table, 0, keep, out=there)
    return there, table


def _constant(space: Space, labels: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """No weights and the best intercept [P, size], with the total curvature of the losses [P] and the objective [P]."""
    v = costs.new_zeros(len(labels), space.size)
    total = costs.sum(dim=1)
    share = torch.linalg.vecdot(costs, labels) / total
    v[:, -1] = torch.logit(share)
    # The objective there is the entropy of the classes.
    return v, total * share * (1 - share), -total * (torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))


def _derivatives(margins: Tensor, labels: Tensor, costs: Tensor, out: Tensor) -> None:
    torch.sigmoid(margins, out=out)
    out.sub_(labels).mul_(costs)


def _curvature(margins: Tensor, costs: Tensor, scratch: Tensor) -> Tensor:
    """Total curvature of the losses [P]."""
    p = torch.sigmoid(margins, out=scratch)
    bend = torch.linalg.vecdot(p.addcmul_(p, p, value=-1), costs)
    return torch.maximum(bend, torch.finfo(bend.dtype).eps * costs.sum(dim=1))


def _value(margins: Tensor, labels: Tensor, costs: Tensor, v: Tensor, space: Space) -> Tensor:
    """Return the objective [P]."""
    # log(1 + exp(m)) - y m, whichever the class.
    loss = torch.nn.functional.softplus(margins).addcmul_(margins, labels, value=-1)
    return 0.5 * (space.dot(v, v) - v[:, -1] ** 2) + torch.linalg.vecdot(loss, costs)


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
    inverse: Tensor
    """[P, MEMORY, MEMORY]: of the table of inner products of each step with the changes that are not older."""
    along: Tensor
    """[P, MEMORY]: inner products of the steps with the gradient."""
    count: int = 0
    newest: int = -1

    @classmethod
    def none(cls, like: Tensor) -> Self:
        """Begin without any, for problems of vectors [P, size]."""
        count, size = like.shape
        shape = (count, MEMORY, size)
        inverse, along = like.new_zeros(count, MEMORY, MEMORY), like.new_zeros(count, MEMORY)
        return cls(like.new_empty(shape), like.new_empty(shape), inverse, along)

    def add(self, space: Space, step: Tensor, gradient: Tensor, before: Tensor, slopes: tuple[Tensor, Tensor]) -> None:
        """Keep a pair, in the place of the oldest where there is no room.

        `gradient` is the one at the end of the step, `before` that at its start, and `slopes` are theirs along it.
        """
        curve = slopes[1] - slopes[0]
        # Where rounding hides the curvature the pair is void: a pair of zeros leaves the product as it is.
        scale = torch.where(curve > torch.finfo(curve.dtype).tiny, curve.rsqrt(), 0.0)
        place = self.newest = (self.newest + 1) % MEMORY
        if n := self.count:
            along = space.dots(self.steps[:, :n], gradient)
            inner = (along - self.along[:, :n]) * scale[:, None]
            self.along[:, :n] = along
            # Without the oldest, whose column has only its diagonal, the inverse is what is left of it; a new last column
            # of a triangular matrix adds one to the inverse.
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
        """Forget the other problems."""
        n = self.count
        for name in ("steps", "changes"):
            old = getattr(self, name)
            new = old.new_empty(len(rows), *old.shape[1:])
            torch.index_select(old[:, :n], 0, rows, out=new[:, :n])
            setattr(self, name, new)
        self.inverse, self.along = self.inverse[rows], self.along[rows]

    def direction(self, space: Space, gradient: Tensor, curvature: Tensor) -> Tensor:
        """Return the step [P, size], around the space's preconditioner."""
        n = self.count
        if not n:
            return space.precondition(gradient, curvature).neg_()
        steps, changes, inverse = self.steps[:, :n], self.changes[:, :n], self.inverse[:, :n, :n]
        first = torch.bmm(self.along[:, None, :n], inverse.mT)  # [P, 1, n]
        q = torch.baddbmm(gradient[:, None], first, changes, alpha=-1)[:, 0]
        q = space.precondition(q, curvature)
        bend = space.bend(self.changes[:, self.newest], curvature)
        if bend is not None:
            q *= torch.where(bend > 0, 1 / bend.clamp_min(torch.finfo(bend.dtype).tiny), 1.0)[:, None]
        second = torch.bmm(space.dots(changes, q)[:, None] - first, inverse)
        return torch.baddbmm(q[:, None], second, steps, beta=-1)[:, 0]


def _shorten(
    space: Space,
    far: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor, Tensor],
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    slopes: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Shorten the steps of some problems until the slope at their end is small enough; writes new point and margins."""
    v, step, new, new_gradient = vectors
    margins, moved, labels, costs = rows
    down, slope, allowed = (s[far] for s in slopes)
    v, step, labels, costs, moved = v[far], step[far], labels[far], costs[far], moved[far]
    base = margins[far] - moved
    size = torch.ones_like(down)
    there, point, gradient = base + moved, v + step, new_gradient[far]
    for _ in range(20):
        share = torch.nan_to_num(down / (down + slope), nan=0.1).clamp(0.1, 0.9)
        wide = ~(slope <= allowed)
        size = torch.where(wide, size * share, size)
        there = base + size[:, None] * moved
        derivatives = torch.empty_like(there)
        _derivatives(there, labels, costs, derivatives)
        point = v + size[:, None] * step
        gradient = space.gradient(point, derivatives)
        slope = space.dot(step, gradient)
        if bool((slope <= allowed).all()):
            break
    margins[far], new[far], new_gradient[far] = there, point, gradient
