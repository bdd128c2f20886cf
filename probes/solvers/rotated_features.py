"""Coordinates for a batch of logistic regressions, in which their shared curvature is nearly diagonal.

An L2 penalty is invariant under a rotation of the features, and the optimal weights are a combination of the rows (the
representer theorem), so both spaces below solve the exact problem, not an approximation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SUBSPACE_SHARE = 20
"""A `Kernel` of n rows preconditions n // SUBSPACE_SHARE principal directions individually."""


class Space(Protocol):
    """The operations of the iterations; vectors are [P, size], of any inner layout, with the intercept last."""

    @property
    def size(self) -> int:
        """Length of a vector."""
        ...

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return inner products [P]."""
        ...

    def dots(self, stack: Tensor, v: Tensor) -> Tensor:
        """Return inner products [P, k] of stacked vectors [P, k, size] with v [P, size]."""
        ...

    def margins(self, v: Tensor, out: Tensor) -> Tensor:
        """Return margins [P, n] of vectors [P, size], including the intercept."""
        ...

    def gradient(self, v: Tensor, rows: Tensor) -> Tensor:
        """Return the gradient [P, size], given the losses' derivatives by margin, rows [P, n]."""
        ...

    def precondition(self, v: Tensor, curvature: Tensor) -> Tensor:
        """Multiply by an approximate inverse Hessian, for losses of total curvature [P]."""
        ...

    def quadratic_form(self, v: Tensor, curvature: Tensor) -> Tensor | None:
        """Return the inner products [P] of vectors with their preconditioned form; None if its scale needs no correction."""
        ...

    def weights(self, v: Tensor) -> Tensor:
        """Return weights [P, D] of the standardized features."""
        ...

    def vectors(self, weights: Tensor, intercepts: Tensor) -> Tensor | None:
        """Return vectors [P, size] of weights [P, D] and intercepts [P]; None if that costs more than a cold start."""
        ...

    def refresh(self, v: Tensor) -> Tensor:
        """Return vectors [P, size] with consistent parts, without the rounding errors that iterations accumulate."""
        ...


@dataclass(frozen=True)
class Rotated:
    """The principal axes of standardized features [n, D] with D <= n; a vector is [weights on axes | intercept]."""

    table: Tensor
    """[n, D + 1]: the rows on the principal axes, and a column of ones."""
    axes: Tensor
    """[D, D], one axis per column."""
    spectrum: Tensor
    """[D + 1]: mean square of each column of the table."""
    size: int

    @classmethod
    def of(cls, features: Tensor, axes: Tensor | None = None) -> Rotated:
        """Rotate features [n, D] to their principal axes, or to similar axes [D, D] if given."""
        n = len(features)
        rotation: Tensor = torch.linalg.eigh(features.T @ features)[1] if axes is None else axes
        table = features.new_ones(n, features.shape[1] + 1)
        multiply(features, rotation, out=table[:, :-1])
        return cls(table, rotation, square_sums(table) / n, table.shape[1])

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """See `Space`."""
        return torch.linalg.vecdot(a, b)

    def dots(self, stack: Tensor, v: Tensor) -> Tensor:
        """See `Space`."""
        return torch.bmm(v[:, None], stack.mT)[:, 0]

    def margins(self, v: Tensor, out: Tensor) -> Tensor:
        """See `Space`."""
        return multiply(v, self.table.T, out=out)

    def gradient(self, v: Tensor, rows: Tensor) -> Tensor:
        """See `Space`."""
        g = multiply(rows, self.table)
        g[:, :-1] += v[:, :-1]
        return g

    def precondition(self, v: Tensor, curvature: Tensor) -> Tensor:
        """Divide by the diagonal of the Hessian; exact for equal row weights (see `Space`)."""
        inverse = curvature[:, None] * self.spectrum
        inverse[:, :-1] += 1
        return v / inverse

    def quadratic_form(self, v: Tensor, curvature: Tensor) -> None:
        """See `Space`."""
        del v, curvature

    def weights(self, v: Tensor) -> Tensor:
        """See `Space`."""
        return multiply(v[:, :-1], self.axes.T)

    def vectors(self, weights: Tensor, intercepts: Tensor) -> Tensor | None:
        """See `Space`."""
        return torch.cat([weights @ self.axes, intercepts[:, None]], dim=1)

    def refresh(self, v: Tensor) -> Tensor:
        """See `Space`."""
        return v


@dataclass(frozen=True)
class Kernel:
    """Weights as combinations ``X' a`` of the rows, for D > n; a vector is [a | K a | intercept] with ``K = X X'``.

    Storing ``K a`` with ``a`` makes margins and inner products cheap; the only cost is one product with K per step.
    """

    features: Tensor
    """[n, D], standardized."""
    gram: Tensor
    """[n, n]."""
    top: Tensor
    """[n, r]: orthonormal approximation of the leading eigenvectors of the Gram matrix."""
    image: Tensor
    """[n, 2 r]: `top` and its product with the Gram matrix, concatenated."""
    values: Tensor
    """[r]: eigenvalues of `top`."""
    tail: Tensor
    """Mean of the other eigenvalues."""
    size: int
    n_rows: int

    @classmethod
    def of(cls, features: Tensor) -> Kernel:
        """Prepare features [n, D].

        The leading eigenvectors come from two rounds of subspace iteration (Halko, Martinsson and Tropp 2011).
        """
        n = len(features)
        gram = multiply(features, features.T)
        rank = max(1, n // SUBSPACE_SHARE)
        generator = torch.Generator(device="cpu").manual_seed(0)
        block = torch.randn(n, rank, generator=generator, dtype=torch.float64).to(gram)
        for _ in range(2):
            block = torch.linalg.qr(gram @ block)[0]
        image = gram @ block
        values, mix = torch.linalg.eigh(block.T @ image)
        top, image = block @ mix, image @ mix
        tail = (gram.diagonal().sum() - values.sum()).clamp_min(0) / max(1, n - rank)
        return cls(features, gram, top, torch.cat([top, image], dim=1), values.clamp_min(0), tail, 2 * n + 1, n)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """See `Space`."""
        n = self.n_rows
        return torch.linalg.vecdot(a[:, :n], b[:, n:-1]) + a[:, -1] * b[:, -1]

    def dots(self, stack: Tensor, v: Tensor) -> Tensor:
        """See `Space`."""
        n = self.n_rows
        return torch.bmm(v[:, None, n:-1], stack[:, :, :n].mT)[:, 0] + stack[:, :, -1] * v[:, -1:]

    def margins(self, v: Tensor, out: Tensor) -> Tensor:
        """See `Space`."""
        return torch.add(v[:, self.n_rows : -1], v[:, -1:], out=out)

    def gradient(self, v: Tensor, rows: Tensor) -> Tensor:
        """See `Space`: the gradient in the inner product of the penalty, in which it is ``a`` plus the derivatives."""
        g = torch.empty_like(v)
        n = self.n_rows
        torch.add(rows, v[:, :n], out=g[:, :n])
        multiply(rows, self.gram, out=g[:, n:-1])
        g[:, n:-1] += v[:, n:-1]
        torch.sum(rows, dim=1, out=g[:, -1])
        return g

    def precondition(self, v: Tensor, curvature: Tensor) -> Tensor:
        """See `Space`: exact on the leading directions for equal row weights, one factor for the others."""
        common, leading = self._inverse(curvature)
        inner = (v[:, : self.n_rows] @ self.top) * leading
        rank = len(self.values)
        out = v * common
        out[:, : self.n_rows].addmm_(inner, self.image[:, :rank].T)
        out[:, self.n_rows : -1].addmm_(inner, self.image[:, rank:].T)
        out[:, -1] = v[:, -1] / curvature
        return out

    def quadratic_form(self, v: Tensor, curvature: Tensor) -> Tensor:
        """See `Space`: corrects the approximate common factor of all but the leading directions."""
        common, leading = self._inverse(curvature)
        rows, image = v[:, : self.n_rows], v[:, self.n_rows : -1]
        along = torch.linalg.vecdot((rows @ self.top) * leading, image @ self.top)
        return common[:, 0] * torch.linalg.vecdot(rows, image) + along + v[:, -1] ** 2 / curvature

    def _inverse(self, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """Return the common factor of all directions [P, 1], and the additional factor of the leading ones [P, r]."""
        mean = curvature[:, None] / self.n_rows
        common = 1 / (1 + mean * self.tail)
        return common, 1 / (1 + mean * self.values) - common

    def weights(self, v: Tensor) -> Tensor:
        """See `Space`."""
        return v[:, : self.n_rows] @ self.features

    def vectors(self, weights: Tensor, intercepts: Tensor) -> Tensor | None:
        """See `Space`: expressing weights as a combination of the rows would require solving a linear system."""
        del weights, intercepts
        return None

    def refresh(self, v: Tensor) -> Tensor:
        """See `Space`: recompute the product with the Gram matrix."""
        rows = v[:, : self.n_rows]
        return torch.cat([rows, rows @ self.gram, v[:, -1:]], dim=1)


def space_of(features: Tensor, near: Space | None = None) -> Space:
    """Return the smaller space for standardized features [n, D]; `near` is a space of nearly the same rows."""
    if features.shape[1] > len(features):
        return Kernel.of(features)
    return Rotated.of(features, near.axes if isinstance(near, Rotated) else None)


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the matrix product; on the CPU with numpy, which is faster for these shapes and detects a Gram matrix."""
    if a.device.type != "cpu":
        return torch.mm(a, b, out=out)
    # Kernels of OpenBLAS may compute with unused lanes, whose contents then raise the flag of an invalid operation although
    # the product is finite (numpy issues 13173, 24067). Features are finite, and the duality gap would be NaN otherwise.
    with np.errstate(invalid="ignore"):
        if out is None:
            return torch.from_numpy(np.matmul(a.numpy(), b.numpy()))
        np.matmul(a.numpy(), b.numpy(), out=out.numpy())
    return out


def square_sums(table: Tensor) -> Tensor:
    """Return the sum of squares of each column of [n, D]."""
    if table.device.type != "cpu":
        return torch.linalg.vecdot(table, table, dim=0)
    return torch.from_numpy(np.einsum("nd,nd->d", table.numpy(), table.numpy()))
