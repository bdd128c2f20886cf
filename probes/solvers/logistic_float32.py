"""Many logistic regressions on the same rows: solved in float32, certified in float64, and completed there if needed.

Problems with the same rows share standardization and principal axes: all concepts and values of C of one fold form one batch.
`fit_logistic` is the reference implementation, and the fallback for fits without a certificate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from groundscope.core.errors import ProbeError
from probes.solvers.allocator import keep_freed_memory
from probes.solvers.constant_columns import column_scales
from probes.solvers.duality_gap import certify
from probes.solvers.lbfgs import minimize
from probes.solvers.logistic_reference import LinearFit, fit_logistic
from probes.solvers.rotated_features import Space, space_of, square_sums

ELEMENTS = {"cpu": 250_000, "cuda": 40_000_000}
"""Maximum problems x rows per batch by device type; the iterations hold about ten such arrays."""
_CERTIFY_BATCH = 64
"""Number of problems certified at a time."""
_MARGIN = 0.3
"""The iterations stop at this share of the tolerance, as a margin for rounding errors."""


@dataclass(frozen=True)
class RowBlock:
    """The features of the rows that a batch of probes is fitted to, standardized on them."""

    standard: Tensor
    """float64 [n, D]; a constant column is 0."""
    mean: np.ndarray
    """float64 [D]."""
    deviation: np.ndarray
    """float64 [D]; 0 where constant."""
    near: RowBlock | None = None
    """A block with most of the same rows, whose principal axes approximate those of this block."""

    @classmethod
    def of(cls, features: np.ndarray, device: str = "cpu", near: RowBlock | None = None) -> RowBlock:
        """Standardize features [n, D] of any real dtype; they must be finite.

        Raises
        ------
        ProbeError
            If the device's memory cannot hold them, or a column varies too little for its mean (`column_scales`).
        """
        copied = torch.from_numpy(np.array(features, dtype=np.float64, order="C"))  # modified below
        try:
            x = copied.to(device)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(device, copied.shape) from error
        mean = x.mean(dim=0)
        x -= mean
        # The mean of large values has a rounding error: subtract the remaining mean too.
        remainder = x.mean(dim=0)
        x -= remainder
        mean += remainder
        deviation = torch.sqrt(square_sums(x) / len(x))
        deviation = torch.from_numpy(column_scales(mean.cpu().numpy(), deviation.cpu().numpy(), len(x))).to(device)
        x *= torch.where(deviation > 0, 1 / deviation, torch.zeros_like(deviation))
        return cls(x, mean.cpu().numpy(), deviation.cpu().numpy(), near)

    @cached_property
    def space(self) -> Space:
        """The float32 space in which problems are solved."""
        return space_of(self.standard.float(), None if self.near is None else self.near.space)

    @cached_property
    def exact(self) -> Space:
        """The float64 space, for problems that do not reach the tolerance in float32."""
        return space_of(self.standard)


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Return row weights that balance the classes (scikit-learn's ``class_weight="balanced"``): [Q, n] -> [Q, n]."""
    y = np.asarray(labels, dtype=np.float64)
    n, positive = y.shape[1], y.sum(axis=1, keepdims=True)
    return np.where(y == 1, n / (2 * np.maximum(positive, 1)), n / (2 * np.maximum(n - positive, 1)))


def fit_rows(
    block: RowBlock,
    labels: np.ndarray,
    C: np.ndarray,
    weights: np.ndarray,
    *,
    tolerance: float = 1e-8,
    start: tuple[np.ndarray, np.ndarray] | None = None,
) -> LinearFit:
    """Fit L2-regularized logistic regressions to all rows of a block, standardized.

    Parameters
    ----------
    block
        The features of n rows.
    labels
        [Q, n], 0 or 1; each row has both.
    C
        Inverse penalties [Q, R]: R values for each row of labels.
    weights
        [Q, n]: positive row weights.
    tolerance
        Maximum proven relative gap to the minimum.
    start
        Initial coefficients [Q x R, D] and intercepts [Q x R], for example solutions for nearly the same rows. The proven
        gap holds for any initial point.

    Returns
    -------
    `LinearFit` of Q x R problems, C fastest, in the original units of the features.

    Raises
    ------
    ProbeError
        If a fit does not reach the tolerance in float64 either, or the device has no memory for a single problem.

    Notes
    -----
    Memory: the block's float64 copy, two float32 copies (rotated, transposed), for more features than rows a Gram matrix
    [n, n], and about ten arrays of `ELEMENTS` float32 values.
    """
    keep_freed_memory()
    device = block.standard.device
    y, w, strength = (torch.from_numpy(np.array(a, np.float64)).to(device) for a in (labels, weights, C.ravel()))
    of_problem = torch.arange(len(y), device=device).repeat_interleave(len(strength) // len(y))
    try:
        begin = None if start is None else _initial_vectors(block, *start)
    except torch.OutOfMemoryError:
        begin = None  # without memory for initial points, the smaller parts below can still fit
    solutions = [
        _solve(block, y, w, strength, of_problem, part, tolerance, begin) for part in _parts(block, len(strength))
    ]
    theta, intercept, objective, gap = (torch.cat([s[i] for s in solutions]).cpu().numpy() for i in range(4))
    failed = np.flatnonzero(~(gap <= tolerance))
    if failed.size:
        rows = of_problem.cpu().numpy()[failed]
        reference = fit_logistic(
            block.standard.cpu().numpy(),
            labels[rows],
            strength.cpu().numpy()[failed],
            weights[rows],
            standardize=False,
            tolerance=tolerance,
        )
        theta[failed], intercept[failed] = reference.coefficients, reference.intercepts
        objective[failed], gap[failed] = reference.objective, reference.gap
    scale = block.deviation
    coefficients = theta * np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    spread = np.broadcast_to(scale, coefficients.shape)
    return LinearFit(coefficients, intercept - coefficients @ block.mean, objective, gap, spread)


def _out_of_memory(device: str | torch.device, shape: Sequence[int]) -> ProbeError:
    return ProbeError(
        f"device '{device}' has no memory for a single probe on {tuple(shape)} features; use device='cpu', or fewer examples"
    )


def _initial_vectors(block: RowBlock, coefficients: np.ndarray, intercepts: np.ndarray) -> Tensor | None:
    theta = torch.from_numpy(np.asarray(coefficients * block.deviation, np.float32)).to(block.standard.device)
    intercept = torch.from_numpy(np.asarray(intercepts + coefficients @ block.mean, np.float32)).to(theta.device)
    return block.space.vectors(theta, intercept)


def _parts(block: RowBlock, count: int) -> Iterator[Tensor]:
    device = block.standard.device
    step = max(1, ELEMENTS[device.type] // len(block.standard))
    # Parts of equal size, instead of full parts and a small remainder.
    n_parts = -(-count // step)
    yield from torch.arange(count, device=device).tensor_split(n_parts)


def _certify_solutions(
    block: RowBlock,
    labels: Tensor,
    weights: Tensor,
    rows: Tensor,
    strength: Tensor,
    v: Tensor,
    space: Space,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weights [P, D], intercepts, objectives and proven gaps [P] of vectors [P, size]."""
    theta = space.weights(v).double()
    proofs = [
        certify(block.standard, labels[r], weights[r] * c[:, None], w, b)
        for r, c, w, b in zip(
            rows.split(_CERTIFY_BATCH),
            strength.split(_CERTIFY_BATCH),
            theta.split(_CERTIFY_BATCH),
            v[:, -1].double().split(_CERTIFY_BATCH),
            strict=True,
        )
    ]
    objective, gap = (torch.cat(column) for column in zip(*proofs, strict=True))
    return theta, v[:, -1].double(), objective, gap


def _solve(
    block: RowBlock,
    labels: Tensor,
    weights: Tensor,
    strength: Tensor,
    of_problem: Tensor,
    part: Tensor,
    tolerance: float,
    begin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve and certify a part of the problems; if the device is out of memory, split the part in halves."""
    try:
        rows = of_problem[part]
        # Gather in float32, and in float64 in small batches: copies larger than the cache cost as much as an iteration.
        costs = weights.float()[rows].mul_(strength[part, None].float())
        at = None if begin is None else begin[part]
        v = minimize(block.space, labels.float()[rows], costs, _MARGIN * tolerance, start=at)
        solution = _certify_solutions(block, labels, weights, rows, strength[part], v, block.space)
        failed = torch.nonzero(~(solution[3] <= tolerance))[:, 0]
        if len(failed):
            # The float32 solution is close to the optimum: a few iterations in float64 from there.
            start = block.exact.vectors(solution[0][failed], solution[1][failed])
            start = block.exact.refresh(v[failed].double()) if start is None else start
            exact = weights[rows[failed]] * strength[part[failed], None]
            better = minimize(block.exact, labels[rows[failed]], exact, _MARGIN * tolerance, start=start)
            proofs = _certify_solutions(
                block, labels, weights, rows[failed], strength[part[failed]], better, block.exact
            )
            for values, new in zip(solution, proofs, strict=True):
                values[failed] = new
        return solution
    except torch.OutOfMemoryError as error:
        if len(part) == 1:
            raise _out_of_memory(block.standard.device, block.standard.shape) from error
    halves = [
        _solve(block, labels, weights, strength, of_problem, half, tolerance, begin) for half in part.tensor_split(2)
    ]
    first, second = halves
    return (
        torch.cat([first[0], second[0]]),
        torch.cat([first[1], second[1]]),
        torch.cat([first[2], second[2]]),
        torch.cat([first[3], second[3]]),
    )
