"""The map from decoder residuals to logits: applied to any residuals, and limited to the last positions of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lvlm.active_interventions import mark_observer
from lvlm.family.specification import resolve
from lvlm.interfaces import Model


def unembed(model: Model, residual: Tensor, *, scaled: bool, softcap: float | None) -> Tensor:
    """Apply the final norm and the unembedding to decoder residuals ``[..., D]`` -> ``[..., V]``.

    Parameters
    ----------
    model
        The model.
    residual
        Values of the residual stream after the last layer, or before it for a logit lens.
    scaled
        Whether the model divides normalized residuals by the square root of their width.
    softcap
        Largest absolute value of a logit, approached by a hyperbolic tangent; None for no limit.
    """
    if model.spec.final_norm:
        residual = resolve(model.hf, model.spec.final_norm, model.spec)(residual)
    if scaled:
        residual = residual * residual.shape[-1] ** -0.5
    logits = resolve(model.hf, model.spec.unembedding or "", model.spec)(residual)
    bias = getattr(model.hf, "final_logits_bias", None)
    logits = logits if bias is None else logits + bias
    return torch.tanh(logits / softcap) * softcap if softcap else logits


@contextmanager
def last_logits(model: Model, keep: int = 1) -> Iterator[dict[str, Any]]:
    """Compute logits at the last `keep` positions only while the context is open; yield the model's arguments for it.

    Logits at all positions are the largest tensor of a forward pass. ``logits_to_keep`` is used if the model accepts it;
    otherwise the unembedding receives the last positions only.
    """
    if "logits_to_keep" in model.accepts:
        yield {"logits_to_keep": keep}
        return

    @mark_observer
    def select_last(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0] if args else None
        return (x[:, -keep:], *args[1:]) if isinstance(x, Tensor) and x.dim() == 3 and x.shape[1] > keep else None

    handle = resolve(model.hf, model.spec.unembedding or "", model.spec).register_forward_pre_hook(select_last)
    try:
        yield {}
    finally:
        handle.remove()
