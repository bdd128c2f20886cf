"""Where a batch of logistic regressions is solved: coordinates in which their shared curvature is nearly diagonal.

An L2 penalty does not change under a rotation of the features, nor when the weights are written as a combination of the
rows (the representer theorem), so both spaces below solve the problem as given, not an approximation of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SUBSPACE_SHARE = 20
"""Of n rows, n // this many principal directions are preconditioned one by one in a `Kernel`."""


class Space(Protocol):
    """What the iterations need: vectors are [P, size], of any inner layout, the intercept last."""

    @property
    def size(self) -> int:
        """Length of a vector."""
        ...

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products [P]."""
        ...

    def dots(self, stack: Tensor, v: Tensor) -> Tensor:
        """Inner products [P, k] of stacked vectors [P, k, size] with v [P, size]."""
        ...

    def margins(self, v: Tensor, out: Tensor) -> Tensor:
        """Margins [P, n] of vectors [P, size], intercept included."""
        ...

    def gradient(self, v: Tensor, rows: Tensor) -> Tensor:
        """Gradient [P, size] where the losses' derivatives by margin are rows [P, n]."""
        ...

    def precondition(self, v: Tensor, curvature: Tensor) -> Tensor:
        """Multiply by about the inverse Hessian, for losses of total curvature [P]."""
        ...

    def bend(self, v: Tensor, curvature: Tensor) -> Tensor | None:
        """Inner products [P] of vectors with what `precondition` makes of them; None where its size needs no correction."""
        ...

    def weights(self, v: Tensor) -> Tensor:
        """Weights [P, D] of the standardised features."""
        ...

    def vectors(self, weights: Tensor, intercepts: Tensor) -> Tensor | None:
        """Vectors [P, size] of weights [P, D] and intercepts [P]; None where that is dearer than to begin anew."""
        ...

    def refreshed(self, v: Tensor) -> Tensor:
        """Vectors [P, size] whose parts agree with each other: iterations let rounding gather between them."""
        ...


@dataclass(frozen=True)
class Rotated:
    """The principal axes of standardised features [n, D] with D up to n; a vector is [weights on axes | intercept]."""

    table: Tensor
    """[n, D + 1]: the rows on the principal axes, and a column of ones."""
    axes: Tensor
    """[D, D], an axis a column."""
    spectrum: Tensor
    """[D + 1]: mean square of each column of the table."""
    size: int

    @classmethod
    def of(cls, features: Tensor, axes: Tensor | None = None) -> Rotated:
        """Rotate features [n, D], to axes [D, D] that are nearly theirs where such are at hand."""
        n = len(features)
        turn: Tensor = torch.linalg.eigh(features.T @ features)[1] if axes is None else axes
        table = features.new_ones(n, features.shape[1] + 1)
        multiply(features, turn, out=table[:, :-1])
        return cls(table, turn, square_sums(table) / n, table.shape[1])

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
        """See `Space`: were all rows weighted alike, the Hessian would be diagonal here."""
        inverse = curvature[:, None] * self.spectrum
        inverse[:, :-1] += 1
        return v / inverse

    def bend(self, v: Tensor, curvature: Tensor) -> None:
        """See `Space`."""
        del v, curvature

    def weights(self, v: Tensor) -> Tensor:
        """See `Space`."""
        return multiply(v[:, :-1], self.axes.T)

    def vectors(self, weights: Tensor, intercepts: Tensor) -> Tensor | None:
        """See `Space`."""
        return torch.cat([weights @ self.axes, intercepts[:, None]], dim=1)

    def refreshed(self, v: Tensor) -> Tensor:
        """See `Space`."""
        return v


@dataclass(frozen=True)
class Kernel:
    """Weights as combinations ``X' a`` of the rows, for more features than rows: [a | K a | intercept], ``K = X X'``.

    Keeping ``K a`` beside ``a`` makes margins and inner products free; one product with K a step is all that is paid.
    """

    features: Tensor
    """[n, D], standardised."""
    gram: Tensor
    """[n, n]."""
    top: Tensor
    """[n, r]: orthonormal, about the leading eigenvectors of the Gram matrix."""
    image: Tensor
    """[n, 2 r]: the same and their product with the Gram matrix, side by side."""
    values: Tensor
    """[r]: their eigenvalues."""
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
        """See `Space`: the gradient in the geometry of the penalty, where it is ``a`` plus the derivatives themselves."""
        g = torch.empty_like(v)
        n = self.n_rows
        torch.add(rows, v[:, :n], out=g[:, :n])
        multiply(rows, self.gram, out=g[:, n:-1])
        g[:, n:-1] += v[:, n:-1]
        torch.sum(rows, dim=1, out=g[:, -1])
        return g

    def precondition(self, v: Tensor, curvature: Tensor) -> Tensor:
        """See `Space`: exact for equal weights on the leading directions, one number for the others."""
        rest, leading = self._inverse(curvature)
        inner = (v[:, : self.n_rows] @ self.top) * leading
        rank = len(self.values)
        out = v * rest
        out[:, : self.n_rows].addmm_(inner, self.image[:, :rank].T)
        out[:, self.n_rows : -1].addmm_(inner, self.image[:, rank:].T)
        out[:, -1] = v[:, -1] / curvature
        return out

    def bend(self, v: Tensor, curvature: Tensor) -> Tensor:
        """See `Space`: one number for all but the leading directions is a guess, put right by the last step's curvature."""
        rest, leading = self._inverse(curvature)
        rows, image = v[:, : self.n_rows], v[:, self.n_rows : -1]
        along = torch.linalg.vecdot((rows @ self.top) * leading, image @ self.top)
        return rest[:, 0] * torch.linalg.vecdot(rows, image) + along + v[:, -1] ** 2 / curvature

    def _inverse(self, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """Return what all directions are multiplied by [P, 1], and what the leading ones are besides [P, r]."""
        mean = curvature[:, None] / self.n_rows
        rest = 1 / (1 + mean * self.tail)
        return rest, 1 / (1 + mean * self.values) - rest

    def weights(self, v: Tensor) -> Tensor:
        """See `Space`."""
        return v[:, : self.n_rows] @ self.features

    def vectors(self, weights: Tensor, intercepts: Tensor) -> Tensor | None:
        """See `Space`: what combination of the rows given weights are would take a system of equations to find."""
        del weights, intercepts
        return None

    def refreshed(self, v: Tensor) -> Tensor:
        """See `Space`: the product with the Gram matrix is taken anew."""
        rows = v[:, : self.n_rows]
        return torch.cat([rows, rows @ self.gram, v[:, -1:]], dim=1)


def space_of(features: Tensor, near: Space | None = None) -> Space:
    """Choose the smaller space for standardised features [n, D]; `near` is one of nearly the same rows."""
    if features.shape[1] > len(features):
        return Kernel.of(features)
    return Rotated.of(features, near.axes if isinstance(near, Rotated) else None)


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the matrix product; on the CPU by numpy, which is faster at those of a batch and sees a Gram matrix."""
    if a.device.type != "cpu":
        return torch.mm(a, b, out=out)
    if out is None:
        return torch.from_numpy(np.matmul(a.numpy(), b.numpy()))
    np.matmul(a.numpy(), b.numpy(), out=out.numpy())
    return out


def square_sums(table: Tensor) -> Tensor:
    """Return the sum of squares of each column of [n, D]."""
    if table.device.type != "cpu":
        return torch.linalg.vecdot(table, table, dim=0)
    return torch.from_numpy(np.einsum("nd,nd->d", table.numpy(), table.numpy()))
