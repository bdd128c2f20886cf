"""Vector-Jacobian products through the projections of many heads and the norm before them, at low cost.

The derivative of LayerNorm and RMSNorm is a scale plus one or two terms of rank one. Automatic differentiation makes
about a dozen passes over every head's gradient; the closed form makes two. The closed form is used if it agrees with
automatic differentiation on each layer's own values; otherwise automatic differentiation is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lvlm.access.weights import weight
from lvlm.family.specification import TOLERANCE


@dataclass(frozen=True, eq=False)
class StreamReader:
    """How a layer's heads read the residual stream: projections and norm, for the backward pass."""

    norm: nn.Module | None
    weights: Mapping[str, Tensor]
    """Slice of each projection per query head, ``[H, d, D]``, times the norm's scale if the closed form is used."""
    eps: float | None
    """Epsilon of the norm if the closed form is used, else None."""
    centered: bool
    """Whether the norm subtracts the mean: True for LayerNorm, False for RMSNorm."""

    def back(self, slopes: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return gradients at each head's inputs: queries, then keys, then values.

        Parameters
        ----------
        slopes
            Gradients at queries, keys and values by letter, ``[P, t, H, d]`` each.
        x
            The residual stream before the norm, ``[P, t, D]``.

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
        gradients = torch.cat(parts)
        if self.norm is None:
            return gradients
        if inverse is None:
            return through(self.norm, x, gradients)
        if self.centered:
            gradients -= gradients.mean(-1, keepdim=True)
        along = torch.einsum("kptw,ptw->kpt", gradients, x * inverse.square() / x.shape[-1])
        return gradients.addcmul_(x[None], along[..., None], value=-1)


def reader_of(norm: nn.Module | None, weights: Mapping[str, Tensor], x: Tensor) -> StreamReader:
    """Return how a layer's heads read the stream; `x` is the norm's input in some run, ``[P, T, D]``."""
    plain = StreamReader(norm, weights, None, centered=False)
    if norm is None:
        return plain
    eps = next(
        (e for name in ("variance_epsilon", "eps", "epsilon") if isinstance(e := getattr(norm, name, None), float)),
        None,
    )
    scale = weight(norm)  # may be offloaded until the norm runs
    if eps is None or scale is None or scale.shape != x.shape[-1:]:
        return plain
    sample = x[:, :: max(1, x.shape[1] // 4)]
    draw = torch.Generator().manual_seed(0)
    heads = next(iter(weights.values()))
    slopes = {c: torch.randn(*sample.shape[:2], *heads.shape[:2], generator=draw).to(sample) for c in weights}
    whole = plain.back(slopes, sample)
    for centered in (False, True):
        for factor in (scale.detach(), 1 + scale.detach()):
            candidate = StreamReader(norm, {c: w * factor.to(w) for c, w in weights.items()}, eps, centered)
            error = float((candidate.back(slopes, sample) - whole).abs().max() / whole.abs().max())
            if error <= 2 * TOLERANCE[x.dtype]:
                return candidate
    return plain


def through(norm: nn.Module, x: Tensor, slopes: Tensor) -> Tensor:
    """Return gradients before a norm from gradients after it, ``[K, P, t, D]``; `x` is its input, ``[P, t, D]``."""
    with torch.enable_grad():
        entering = x[None].expand_as(slopes).detach().requires_grad_()
        (back,) = torch.autograd.grad(norm(entering), entering, slopes)
    return back
