"""Damped Newton iterations for a batch of logistic regressions with a shared centered feature matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from groundscope.core.errors import ProbeError
from probes.solvers.constant_columns import column_scales

DIRECT_WIDTH = 40
"""Maximum number of features for which the Hessians are formed (one matrix product for all problems) and solved directly."""

NEAR = 1e-7
"""Minimum ratio of a column's deviation over a problem's rows to that over all rows, for one design to be accurate."""


@dataclass(frozen=True)
class Design:
    """Features centered and divided by their standard deviation over all rows, in float64."""

    matrix: np.ndarray
    """float64 [N, D]; a constant column is 0."""
    mean: np.ndarray
    """float64 [D]."""
    deviation: np.ndarray
    """float64 [D]; 0 for constant columns."""

    @classmethod
    def of(cls, features: np.ndarray) -> Design:
        """Prepare features [N, D] of any real dtype; raise `ProbeError` unless they are two-dimensional and finite."""
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or 0 in x.shape:
            msg = f"features must be a table of rows and columns with at least one of each, got shape {x.shape}"
            raise ProbeError(msg)
        if not np.isfinite(x).all():
            row, column = np.argwhere(~np.isfinite(x))[0]
            msg = f"features hold {x[row, column]} at row {row}, column {column}; every value must be finite"
            raise ProbeError(msg)
        mean = x.mean(axis=0)
        centered = x - mean
        deviation = column_scales(mean, np.sqrt(np.mean(centered**2, axis=0)), len(x))
        matrix = np.divide(centered, deviation, out=np.zeros_like(centered), where=deviation > 0)
        return cls(matrix, mean, deviation)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.matrix.shape[0]

    @property
    def width(self) -> int:
        """Number of features."""
        return self.matrix.shape[1]

    def scales(self, used: np.ndarray) -> np.ndarray:
        """Return the deviation of each feature over each problem's rows: bool [P, N] -> float64 [P, D], 0 if constant.

        Raise `ProbeError` if a column varies too little relative to its mean, or to its deviation over all rows.
        """
        cache: dict[bytes, np.ndarray] = {}
        rows = []
        for mask in used:
            key = mask.tobytes()
            if key not in cache:
                part = self.matrix[mask]
                # Magnitudes of the original column and of its standardized values; both contribute rounding errors.
                size = np.abs(self.mean) + self.deviation * np.abs(part.mean(axis=0))
                spread = part.std(axis=0)
                cache[key] = column_scales(size, spread * self.deviation, len(part))
                unresolved = np.flatnonzero((cache[key] > 0) & (spread < NEAR))
                if len(unresolved):
                    msg = (
                        f"feature column {unresolved[0]} varies {1 / spread[unresolved[0]]:.2g} times as much over all rows as "
                        f"over those of a problem, which float64 cannot resolve in one batch; fit each problem separately"
                    )
                    raise ProbeError(msg)
            rows.append(cache[key])
        return np.stack(rows)

    @cached_property
    def triangle(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column numbers of the upper triangle of a Hessian, intercept last."""
        return np.triu_indices(self.width + 1)

    @cached_property
    def products(self) -> np.ndarray:
        """Products of all pairs of columns, including a column of ones: float64 [N, (D+1)(D+2)/2]."""
        extended = np.column_stack([self.matrix, np.ones(self.n_rows)])
        i, j = self.triangle
        return extended[:, i] * extended[:, j]


@dataclass(frozen=True)
class Batch:
    """Problems ``min 0.5 ||theta||^2 + sum_i c_i log(1 + exp(-y_i m_i))`` with ``m = X (ratio * theta) + b``."""

    design: Design
    signs: np.ndarray
    """-1 or +1 [P, N]."""
    costs: np.ndarray
    """C times the row weight [P, N]."""
    ratio: np.ndarray
    """Column scaling of each problem [P, D]; 0 excludes a column."""

    def take(self, index: np.ndarray) -> Batch:
        """Return the problems with these indices."""
        return Batch(self.design, self.signs[index], self.costs[index], self.ratio[index])

    def margins(self, theta: np.ndarray, intercept: np.ndarray) -> np.ndarray:
        """Return margins [P, N] of parameters [P, D] and [P]."""
        return (theta * self.ratio) @ self.design.matrix.T + intercept[:, None]

    def adjoint(self, rows: np.ndarray) -> np.ndarray:
        """Apply the transpose of the linear part of `margins`: [P, N] -> [P, D]."""
        return (rows @ self.design.matrix) * self.ratio


def _loss_and_error(batch: Batch, margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted loss of each problem [P] and ``sigma(-y m)`` [P, N], from one exponential."""
    agreement = batch.signs * margins
    t = np.exp(-np.abs(agreement))
    loss = np.einsum("pn,pn->p", batch.costs, np.log1p(t) - np.minimum(agreement, 0.0))
    return loss, np.where(agreement >= 0, t, 1.0) / (1.0 + t)


def minimize(batch: Batch, tolerance: float, max_iterations: int) -> tuple[np.ndarray, ...]:
    """Solve a batch; return theta [P, D], intercept [P], objective [P] and proven relative gap [P]."""
    n_problems, width = batch.ratio.shape
    theta, objective, gap = np.zeros((n_problems, width)), np.full(n_problems, np.nan), np.full(n_problems, np.inf)
    positive = np.einsum("pn,pn->p", batch.costs, batch.signs > 0)
    intercept = np.log(positive) - np.log(batch.costs.sum(axis=1) - positive)
    newton = _direct_step if width <= DIRECT_WIDTH else _conjugate_step(batch)

    active = np.arange(n_problems)
    current = batch
    w, b = theta, intercept
    margins = batch.margins(w, b)
    loss, error = _loss_and_error(batch, margins)
    for _ in range(max_iterations):
        value = 0.5 * np.einsum("pd,pd->p", w, w) + loss
        residual = current.costs * error * current.signs  # minus the derivative by margin [P, N]
        gradient = np.column_stack([w - current.adjoint(residual), -residual.sum(axis=1)])
        step = newton(current, current.costs * error * (1.0 - error), gradient)
        decrease = -np.einsum("pd,pd->p", gradient, step)  # squared Newton decrement: twice the gap to second order
        moved = current.margins(step[:, :-1], step[:, -1])
        size, margins, loss, error = _search(current, w, step, margins, moved, value, loss, decrease)
        w, b = w + size[:, None] * step[:, :-1], b + size * step[:, -1]

        value = 0.5 * np.einsum("pd,pd->p", w, w) + loss
        ready = decrease <= 1e-3 * tolerance * value
        if not ready.any():
            continue
        bound = np.full(len(active), np.inf)
        at = np.flatnonzero(ready)
        bound[at] = _relative_gap(current.take(at), w[at], value[at], error[at])
        done = bound <= tolerance
        theta[active[done]], intercept[active[done]] = w[done], b[done]
        objective[active[done]], gap[active[done]] = value[done], bound[done]
        if done.all():
            return theta, intercept, objective, gap
        keep = np.flatnonzero(~done)
        active, current, w, b = active[keep], current.take(keep), w[keep], b[keep]
        margins, loss, error = margins[keep], loss[keep], error[keep]
    value = 0.5 * np.einsum("pd,pd->p", w, w) + loss
    theta[active], intercept[active], objective[active] = w, b, value
    gap[active] = _relative_gap(current, w, value, error)
    return theta, intercept, objective, gap


def _search(
    batch: Batch,
    theta: np.ndarray,
    step: np.ndarray,
    margins: np.ndarray,
    moved: np.ndarray,
    value: np.ndarray,
    loss: np.ndarray,
    decrease: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Halve each step until the objective decreases enough (Armijo); return sizes, and margins, loss and error there."""
    size = np.ones(len(theta))
    new_margins = margins + moved
    new_loss, new_error = _loss_and_error(batch, new_margins)
    # Below this the change of the objective is smaller than rounding errors; full Newton steps are then safe.
    trusted = decrease <= 1e-9 * value
    linear = np.einsum("pd,pd->p", theta, step[:, :-1])
    square = np.einsum("pd,pd->p", step[:, :-1], step[:, :-1])
    base = value - loss
    for _ in range(40):
        new_value = base + size * linear + 0.5 * size**2 * square + new_loss
        rejected = np.flatnonzero(~trusted & ~(new_value <= value - 1e-4 * size * decrease))
        if not rejected.size:
            break
        size[rejected] *= 0.5
        new_margins[rejected] = margins[rejected] + size[rejected, None] * moved[rejected]
        new_loss[rejected], new_error[rejected] = _loss_and_error(batch.take(rejected), new_margins[rejected])
    return size, new_margins, new_loss, new_error


def _relative_gap(batch: Batch, theta: np.ndarray, value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return the proven ``(F - min F) / F`` [P] from a dual point close to the current errors."""
    # Dual feasibility for the intercept requires equal sums of both classes: scaling down the larger keeps 0 <= a <= 1.
    residual = batch.costs * error
    positive = batch.signs > 0
    up, down = (residual * positive).sum(axis=1), (residual * ~positive).sum(axis=1)
    weaker = np.minimum(up, down)
    shrink_up = np.divide(weaker, up, out=np.zeros_like(up), where=up > 0)
    shrink_down = np.divide(weaker, down, out=np.zeros_like(down), where=down > 0)
    a = error * np.where(positive, shrink_up[:, None], shrink_down[:, None])
    dual_theta = batch.adjoint(batch.costs * a * batch.signs)
    # a log a + (1-a) log(1-a), with 0 log 0 = 0.
    entropy = a * np.log(np.where(a > 0, a, 1.0))
    complement = 1.0 - a
    entropy += complement * np.log1p(-np.where(complement > 0, a, 0.0))
    dual = -0.5 * np.einsum("pd,pd->p", dual_theta, dual_theta) - np.einsum("pn,pn->p", batch.costs, entropy)
    return np.maximum(value - dual, 0.0) / value


Step = Callable[[Batch, np.ndarray, np.ndarray], np.ndarray]


def _direct_step(batch: Batch, curvature: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Return the Newton step [P, D+1] from explicit Hessians: one product of curvatures [P, N] with column products."""
    width = batch.design.width
    i, j = batch.design.triangle
    hessian = np.empty((len(curvature), width + 1, width + 1))
    packed = curvature @ batch.design.products
    hessian[:, i, j] = packed
    hessian[:, j, i] = packed
    column = np.column_stack([batch.ratio, np.ones(len(curvature))])
    hessian *= column[:, :, None]
    hessian *= column[:, None, :]
    diagonal = np.arange(width)
    hessian[:, diagonal, diagonal] += 1.0
    hessian[:, width, width] += 1e-14 * (
        1.0 + hessian[:, width, width]
    )  # saturated rows give the intercept no curvature
    return -np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]


def _conjugate_step(batch: Batch) -> Step:
    """Return a solver of the Newton systems by conjugate gradients.

    With equal row weights the Hessian is ``I + c X'X``: diagonal in the principal axes of the features. This is the
    preconditioner, with c the mean curvature; it needs no axes for directions that the rows do not span.
    """
    matrix = batch.design.matrix * np.median(batch.ratio, axis=0)
    n_rows, width = matrix.shape
    if width <= n_rows:
        spectrum, axes = np.linalg.eigh(matrix.T @ matrix / n_rows)
    else:
        _, singular, rows = np.linalg.svd(matrix, full_matrices=False)
        spectrum, axes = singular**2 / n_rows, rows.T
    spectrum = np.maximum(spectrum, 0.0)

    def step(batch: Batch, curvature: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        total = curvature.sum(axis=1)
        shrink = 1.0 / (1.0 + total[:, None] * spectrum) - 1.0
        free = 1.0 / np.maximum(total, 1e-14)

        def precondition(v: np.ndarray) -> np.ndarray:
            inner = v[:, :-1]
            return np.column_stack([inner + ((inner @ axes) * shrink) @ axes.T, v[:, -1] * free])

        def hessian(v: np.ndarray) -> np.ndarray:
            rows = curvature * batch.margins(v[:, :-1], v[:, -1])
            return np.column_stack([v[:, :-1] + batch.adjoint(rows), rows.sum(axis=1)])

        solution = np.zeros_like(gradient)
        residual = -gradient
        z = precondition(residual)
        direction = z
        rho = np.einsum("pd,pd->p", residual, z)
        # Inexact Newton: a loose tolerance far from the optimum that tightens with the gradient, for superlinear convergence.
        target = np.minimum(1e-2, np.sqrt(rho / (1.0 + rho))) ** 2 * rho
        for _ in range(4 * (min(n_rows, width) + 10)):
            unconverged = rho > target
            if not unconverged.any():
                break
            image = hessian(direction)
            along = np.einsum("pd,pd->p", direction, image)
            alpha = np.where(unconverged & (along > 0), rho / np.where(along > 0, along, 1.0), 0.0)[:, None]
            solution = solution + alpha * direction
            residual = residual - alpha * image
            z = precondition(residual)
            new_rho = np.where(unconverged, np.einsum("pd,pd->p", residual, z), rho)
            direction = (
                z + np.where(unconverged & (rho > 0), new_rho / np.where(rho > 0, rho, 1.0), 0.0)[:, None] * direction
            )
            rho = new_rho
        return solution

    return step
