"""Many logistic regressions on the same rows: solved in float32, certified in float64, finished there if need be.

What shares its rows shares its standardisation and its principal axes: all concepts and penalties of one fold are one
batch. `fit_logistic` is the reference this is held to, and what a fit without a certificate falls back to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from groundscope.core.errors import ProbeError
from probes.solvers.columns import column_scales
from probes.solvers.coordinates import Space, space_of, square_sums
from probes.solvers.duality_gap import certify
from probes.solvers.lbfgs import minimise
from probes.solvers.logistic_reference import LogisticFit, fit_logistic
from probes.solvers.threads import keep_freed_memory

ELEMENTS = {"cpu": 250_000, "cuda": 40_000_000}
"""Problems x rows held at once on each kind of device; the iterations keep about ten such arrays."""
_TOGETHER = 64
"""Problems certified together."""
_MARGIN = 0.3
"""The iterations stop at this share of the tolerance, which leaves room for their rounding."""


@dataclass(frozen=True)
class RowBlock:
    """The features of the rows that a batch of probes is fitted to, standardised on them."""

    standard: Tensor
    """float64 [n, D]; a constant column is 0."""
    mean: np.ndarray
    """float64 [D]."""
    deviation: np.ndarray
    """float64 [D]; 0 where constant."""
    near: RowBlock | None = None
    """One with most of its rows, whose principal axes are near enough to its own."""

    @classmethod
    def of(cls, features: np.ndarray, device: str = "cpu", near: RowBlock | None = None) -> RowBlock:
        """Standardise features [n, D] of any real dtype; they must be finite.

        Raises
        ------
        ProbeError
            Where the device's memory does not hold them, or a column varies too little for its mean (`column_scales`).
        """
        copied = torch.from_numpy(np.array(features, dtype=np.float64, order="C"))  # it is changed below
        try:
            x = copied.to(device)
        except torch.OutOfMemoryError as error:
            raise _no_room(device, copied.shape) from error
        mean = x.mean(dim=0)
        x -= mean
        # Of large values the mean itself is rounded: what is left of it is taken away too.
        rest = x.mean(dim=0)
        x -= rest
        mean += rest
        deviation = torch.sqrt(square_sums(x) / len(x))
        deviation = torch.from_numpy(column_scales(mean.cpu().numpy(), deviation.cpu().numpy(), len(x))).to(device)
        x *= torch.where(deviation > 0, 1 / deviation, torch.zeros_like(deviation))
        return cls(x, mean.cpu().numpy(), deviation.cpu().numpy(), near)

    @cached_property
    def space(self) -> Space:
        """Where its problems are solved, float32."""
        return space_of(self.standard.float(), None if self.near is None else self.near.space)

    @cached_property
    def exact(self) -> Space:
        """The same in float64, for what float32 cannot bring to the tolerance."""
        return space_of(self.standard)


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Weight rows so that both classes count the same (scikit-learn's ``class_weight="balanced"``): [Q, n] -> [Q, n]."""
    y = np.asarray(labels, dtype=np.float64)
    n, positive = y.shape[1], y.sum(axis=1, keepdims=True)
    return np.where(y == 1, n / (2 * np.maximum(positive, 1)), n / (2 * np.maximum(n - positive, 1)))


def fit_rows(
    block: RowBlock,
    labels: np.ndarray,
    penalty: np.ndarray,
    weights: np.ndarray,
    *,
    tolerance: float = 1e-8,
    start: tuple[np.ndarray, np.ndarray] | None = None,
) -> LogisticFit:
    """Fit L2-regularised logistic regressions to all rows of a block, standardised.

    Parameters
    ----------
    block
        Of n rows.
    labels
        [Q, n], 0 or 1, both in each row.
    penalty
        C, [Q, R]: each row of labels is fitted with R penalties.
    weights
        [Q, n], positive: of the rows.
    tolerance
        Largest proven relative gap to the minimum.
    start
        Coefficients [Q x R, D] and intercepts [Q x R] to begin at: what was found on nearly the same rows. Whatever they
        are, what is proven is the same.

    Returns
    -------
    `LogisticFit` of Q x R problems, penalties fastest, in the units of the features as given.

    Raises
    ------
    ProbeError
        Where a fit cannot be brought to the tolerance in float64 either, or a device's memory holds not even one problem.

    Notes
    -----
    Memory: the block's float64 copy, its float32 one twice (rotated, transposed), for more features than rows a Gram
    matrix [n, n], and about ten arrays of `ELEMENTS` float32 values.
    """
    keep_freed_memory()
    device = block.standard.device
    y, w, strength = (torch.from_numpy(np.array(a, np.float64)).to(device) for a in (labels, weights, penalty.ravel()))
    of_problem = torch.arange(len(y), device=device).repeat_interleave(len(strength) // len(y))
    try:
        begin = None if start is None else _begin(block, *start)
    except torch.OutOfMemoryError:
        begin = None  # where a beginning has no room the smaller parts below may have one
    found = [_solve(block, y, w, strength, of_problem, part, tolerance, begin) for part in _parts(block, len(strength))]
    theta, intercept, objective, gap = (torch.cat([f[i] for f in found]).cpu().numpy() for i in range(4))
    failed = np.flatnonzero(~(gap <= tolerance))
    if failed.size:
        rows = of_problem.cpu().numpy()[failed]
        again = fit_logistic(
            block.standard.cpu().numpy(),
            labels[rows],
            strength.cpu().numpy()[failed],
            weights[rows],
            standardize=False,
            tolerance=tolerance,
        )
        theta[failed], intercept[failed] = again.coefficients, again.intercepts
        objective[failed], gap[failed] = again.objective, again.gap
    scale = block.deviation
    coefficients = theta * np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    spread = np.broadcast_to(scale, coefficients.shape)
    return LogisticFit(coefficients, intercept - coefficients @ block.mean, objective, gap, spread)


def _no_room(device: str | torch.device, shape: Sequence[int]) -> ProbeError:
    return ProbeError(
        f"device '{device}' has no memory for a single probe on {tuple(shape)} features: fit on the cpu, or on fewer examples"
    )


def _begin(block: RowBlock, coefficients: np.ndarray, intercepts: np.ndarray) -> Tensor | None:
    theta = torch.from_numpy(np.asarray(coefficients * block.deviation, np.float32)).to(block.standard.device)
    intercept = torch.from_numpy(np.asarray(intercepts + coefficients @ block.mean, np.float32)).to(theta.device)
    return block.space.vectors(theta, intercept)


def _parts(block: RowBlock, count: int) -> Iterator[Tensor]:
    device = block.standard.device
    step = max(1, ELEMENTS[device.type] // len(block.standard))
    # As many equal parts as are needed, not full ones and a rest.
    n_parts = -(-count // step)
    yield from torch.arange(count, device=device).tensor_split(n_parts)


def _proven(
    block: RowBlock,
    labels: Tensor,
    weights: Tensor,
    rows: Tensor,
    strength: Tensor,
    v: Tensor,
    space: Space,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [P, D], intercepts, objectives and proven gaps [P] of vectors [P, size]."""
    theta = space.weights(v).double()
    proofs = [
        certify(block.standard, labels[r], weights[r] * c[:, None], w, b)
        for r, c, w, b in zip(
            rows.split(_TOGETHER),
            strength.split(_TOGETHER),
            theta.split(_TOGETHER),
            v[:, -1].double().split(_TOGETHER),
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
    """Solve and certify some problems; where a device's memory is short, in halves."""
    try:
        rows = of_problem[part]
        # Gathered in float32, and in float64 a few at a time: copies that leave the cache cost as much as an iteration.
        costs = weights.float()[rows].mul_(strength[part, None].float())
        at = None if begin is None else begin[part]
        v = minimise(block.space, labels.float()[rows], costs, _MARGIN * tolerance, start=at)
        found = _proven(block, labels, weights, rows, strength[part], v, block.space)
        failed = torch.nonzero(~(found[3] <= tolerance))[:, 0]
        if len(failed):
            # What float32 cannot tell from the optimum is near it: a few iterations in float64 from there.
            start = block.exact.vectors(found[0][failed], found[1][failed])
            start = block.exact.refreshed(v[failed].double()) if start is None else start
            exact = weights[rows[failed]] * strength[part[failed], None]
            better = minimise(block.exact, labels[rows[failed]], exact, _MARGIN * tolerance, start=start)
            proofs = _proven(block, labels, weights, rows[failed], strength[part[failed]], better, block.exact)
            for whole, new in zip(found, proofs, strict=True):
                whole[failed] = new
        return found
    except torch.OutOfMemoryError as error:
        if len(part) == 1:
            raise _no_room(block.standard.device, block.standard.shape) from error
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
