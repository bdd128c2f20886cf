"""Which tokens may be chosen: adaptive plausibility, and the contrast of two distributions under it."""

from __future__ import annotations

import math

from torch import Tensor


def plausible(logits: Tensor, beta: float) -> Tensor:
    """Return which tokens have a probability of at least `beta` times the largest, bool like `logits` ``[..., V]``.

    Adaptive plausibility constraint of Li et al. 2023 (arXiv 2210.15097); `beta` 0 keeps all tokens.

    Examples
    --------
    >>> import torch
    >>> from mitigation.training_free.plausibility import plausible
    >>> plausible(torch.tensor([0.0, -1.0, -3.0]), 0.1).tolist()
    [True, True, False]
    """
    if beta == 0:
        return logits == logits
    return logits >= math.log(beta) + logits.amax(-1, keepdim=True)


def contrast(logits: Tensor, other: Tensor, alpha: float, beta: float) -> Tensor:
    """Return ``(1 + alpha) logits - alpha other`` for tokens that `logits` make plausible, minus infinity for others."""
    return ((1 + alpha) * logits - alpha * other).masked_fill(~plausible(logits, beta), -math.inf)
