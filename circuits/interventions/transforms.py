"""Changes of the selected part of a tensor: small functions of ``[..., d]``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from circuits.interventions.options import Norm
from groundscope.core.errors import PatchError

Change = Callable[[Tensor], Tensor]
"""``[..., d]`` -> ``[..., d]``."""
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Replace:
    """Replace x by `value`: a patch, or a mean ablation if `value` is a mean over other runs.

    Examples
    --------
    >>> import torch
    >>> from circuits import Replace
    >>> Replace(torch.tensor([1.0, 2.0]))(torch.zeros(3, 2)).tolist()
    [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]
    """

    value: Tensor
    """Anything that broadcasts to ``[rows, positions, d]``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the changed ``[..., d]``."""
        return self.value.to(x).expand_as(x)


@dataclass(frozen=True, eq=False)
class Add:
    """Replace x by ``x + value``, rescaled as `norm` says.

    ``free``
        ``x + value``.
    ``kept``
        ``|x| unit(x + value)``: VISTA (Li et al. 2025, arXiv 2502.03628).
    ``relative``
        ``|x| unit(x / |x| + value)``, so that the length of `value` is relative to that of x: VTI (Liu et al. 2024, arXiv
        2410.15778).
    ``away``
        ``|x| unit(x / |x| + (1 + max(0, cos(x, -value))) value)``: up to twice as strong if x points away from `value`;
        the rule in the run scripts of VISTA's release (github.com/LzVv123456/VISTA).

    Examples
    --------
    >>> import torch
    >>> from circuits import Add
    >>> Add(torch.tensor([3.0, 0.0]), norm="kept")(torch.tensor([[0.0, 4.0]])).norm().item()
    4.0
    """

    value: Tensor
    """``[d]``, or anything that broadcasts to ``[rows, positions, d]``."""
    norm: Norm = "free"

    def __call__(self, x: Tensor) -> Tensor:
        """Return the changed ``[..., d]``; raise `PatchError` if a value per token meets another number of tokens."""
        if self.value.dim() == 2 and x.dim() == 3 and self.value.shape[0] not in (1, x.shape[1]):
            msg = f"value has {self.value.shape[0]} tokens, but the site has {x.shape[1]}; pass one vector, or one per token"
            raise PatchError(msg)
        if self.norm == "free":
            return x + self.value.to(x)
        # In float32: the squared norm of a long residual stream overflows in float16.
        wide = x.float()
        length = wide.norm(dim=-1, keepdim=True)
        start = wide if self.norm == "kept" else wide / length.clamp_min(_TINY)
        push = self.value.to(wide)
        if self.norm == "away":
            size = push.norm(dim=-1, keepdim=True).clamp_min(_TINY)
            push = push * (1 + (-(start * push).sum(-1, keepdim=True) / size).clamp_min(0))
        moved = start + push
        return (moved * (length / moved.norm(dim=-1, keepdim=True).clamp_min(_TINY))).to(x)

    def scaled(self, factor: float | Tensor) -> Self:
        """Return the same change, `factor` times as strong: a number, or ``[..., 1]`` with one for each token."""
        return replace(self, value=factor * (self.value.to(factor) if isinstance(factor, Tensor) else self.value))


@dataclass(frozen=True)
class Zero:
    """Replace x by 0.

    Examples
    --------
    >>> import torch
    >>> from circuits import Zero
    >>> Zero()(torch.ones(2)).tolist()
    [0.0, 0.0]
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Return the changed ``[..., d]``."""
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False)
class Amplify:
    """Replace x by ``x + factor * (x - mean) reads^T writes``: amplify this input's deviation from the mean.

    Without `reads` the result is ``mean + (1 + factor) (x - mean)``; a factor of -1 gives the mean. With `reads`, only the
    deviation within the subspace spanned by its rows changes: a factor of -1 removes it.

    Examples
    --------
    >>> import torch
    >>> from circuits import Amplify
    >>> Amplify(mean=torch.tensor([1.0, 1.0]), factor=0.5)(torch.tensor([3.0, 1.0])).tolist()
    [4.0, 1.0]
    """

    mean: Tensor
    """``[d]``: the site's value on neutral images, or the midpoint between the classes."""
    factor: float | Tensor
    """A number, or ``[..., 1]`` with one for each token."""
    reads: Tensor | None = None
    """Orthonormal rows ``[k, d]``."""
    writes: Tensor | None = None
    """``[k, d]``: output rows of the deviation; `reads` by default, other rows for a control of the same size."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the changed ``[..., d]``."""
        deviation = x - self.mean.to(x)
        if self.reads is not None:
            writes = self.reads if self.writes is None else self.writes
            deviation = deviation @ self.reads.to(x).T @ writes.to(x)
        elif self.writes is not None:
            deviation = deviation @ self.writes.to(x)
        return x + _as(self.factor, x) * deviation

    def scaled(self, factor: float | Tensor) -> Self:
        """Return the same change, `factor` times as strong: a number, or ``[..., 1]`` with one for each token."""
        return replace(self, factor=factor * self.factor)


@dataclass(frozen=True, eq=False)
class Project:
    """Remove the positive component of x along `value`: ``x - weight * max(<x, t>, 0) / <t, t> * t``.

    ProjectAway (Jiang et al. 2024, arXiv 2410.02762): a negative component does not change.

    Examples
    --------
    >>> import torch
    >>> from circuits import Project
    >>> Project(torch.tensor([2.0, 0.0]))(torch.tensor([[3.0, 1.0], [-3.0, 1.0]])).tolist()
    [[0.0, 1.0], [-3.0, 1.0]]
    """

    value: Tensor
    """``[d]``: t, of any length."""
    weight: float | Tensor = 1.0
    """A number, or ``[..., 1]`` with one for each token."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the changed ``[..., d]``."""
        t = self.value.to(x)
        share = (x @ t).clamp_min(0) / (t @ t)
        return x - _as(self.weight, x) * share[..., None] * t

    def scaled(self, factor: float | Tensor) -> Self:
        """Return the same change, `factor` times as strong: a number, or ``[..., 1]`` with one for each token."""
        return replace(self, weight=factor * self.weight)


def _as(factor: float | Tensor, x: Tensor) -> float | Tensor:
    return factor.to(x) if isinstance(factor, Tensor) else factor
