"""Gradients taken back through many heads' projections and the norm in front of them, at little more than a product's cost.

A norm's derivative is, for all norms in use, a scale and one or two terms of rank one. Automatic differentiation runs
over every head's gradient a dozen times for it; written out it takes two. What is written out is used where it is what
automatic differentiation finds, which is tried on each layer's own values; elsewhere that is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lvlm.family.specification import TOLERANCE


@dataclass(frozen=True, eq=False)
class Reader:
    """How a layer's heads read the stream, ready to take gradients back."""

    norm: nn.Module | None
    weights: Mapping[str, Tensor]
    """Part of each query head in each projection, ``[H, d, D]``, the norm's scale included where it is written out."""
    eps: float | None
    """Of the norm, where its derivative is written out."""
    centered: bool
    """Whether the norm takes the mean away, as LayerNorm does and RMSNorm does not."""

    def back(self, slopes: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return gradients at what each head reads, for its queries, then keys, then values.

        Parameters
        ----------
        slopes
            Gradients at queries, keys and values by letter, ``[P, t, H, d]`` each.
        x
            The stream in front of the norm, ``[P, t, D]``.

        Returns
        -------
        Tensor
            ``[3 H, P, t, D]``.
        """
        inverse = None
        if self.eps is not None:
            x = x - x.mean(-1, keepdim=True) if self.centered else x
            inverse = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()  # [P, t, 1]
        parts = []
        for letter, slope in slopes.items():
            scaled = slope if inverse is None else slope * inverse[..., None]
            parts.append(torch.einsum("pthd,hdw->hptw", scaled, self.weights[letter]))
        found = torch.cat(parts)
        if self.norm is None:
            return found
        if inverse is None:
            return through(self.norm, x, found)
        if self.centered:
            found -= found.mean(-1, keepdim=True)
        along = torch.einsum("kptw,ptw->kpt", found, x * inverse.square() / x.shape[-1])
        return found.addcmul_(x[None], along[..., None], value=-1)


def reader_of(norm: nn.Module | None, weights: Mapping[str, Tensor], x: Tensor) -> Reader:
    """Return how a layer's heads read; `x` is what its norm is given in some run, ``[P, T, D]``."""
    plain = Reader(norm, weights, None, centered=False)
    if norm is None:
        return plain
    eps = next(
        (e for name in ("variance_epsilon", "eps", "epsilon") if isinstance(e := getattr(norm, name, None), float)),
        None,
    )
    scale = getattr(norm, "weight", None)
    if eps is None or not isinstance(scale, Tensor) or scale.shape != x.shape[-1:]:
        return plain
    some = x[:, :: max(1, x.shape[1] // 4)]
    draw = torch.Generator().manual_seed(0)
    heads = next(iter(weights.values()))
    given = {c: torch.randn(*some.shape[:2], *heads.shape[:2], generator=draw).to(some) for c in weights}
    whole = plain.back(given, some)
    for centered in (False, True):
        for factor in (scale.detach(), 1 + scale.detach()):
            one = Reader(norm, {c: w * factor.to(w) for c, w in weights.items()}, eps, centered)
            error = float((one.back(given, some) - whole).abs().max() / whole.abs().max())
            if error <= 2 * TOLERANCE[x.dtype]:
                return one
    return plain


def through(norm: nn.Module, x: Tensor, slopes: Tensor) -> Tensor:
    """Take gradients behind a norm ``[K, P, t, D]`` back to the stream in front of it, ``[P, t, D]``."""
    with torch.enable_grad():
        entering = x[None].expand_as(slopes).detach().requires_grad_()
        (back,) = torch.autograd.grad(norm(entering), entering, slopes)
    return back
