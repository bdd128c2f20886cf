"""One forward pass and its gradients: values at sites, and the derivative of the answer's metric by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits.interventions.hooks import edit
from groundscope.core.errors import ModelError
from lvlm.model import Lvlm
from lvlm.sites import Site

ATTENTIONS = ("eager", "sdpa")
"""Differentiable attention implementations, by transformers' names."""

Metric = Callable[[Tensor], Tensor]
"""From logits at the last position ``[B, V]`` to one number per row, differentiable."""


@dataclass(frozen=True, eq=False)
class Slopes:
    """Values and gradients of one run of B examples."""

    values: Mapping[Site, Tensor]
    """``[B, T, d]`` by site."""
    gradients: Mapping[Site, Tensor]
    """Derivative of the metric by each site, ``[K, B, T, d]``: K is 1, or the number of layers with GradDrop.
    Empty unless requested."""
    metric: Tensor
    """``[B]``."""
    embeddings: Tensor
    """Input of the first decoder layer, ``[B, T, D]``."""


def slopes(
    model: Lvlm,
    inputs: Mapping[str, Tensor],
    sites: Sequence[Site],
    metric: Metric,
    *,
    embeddings: Tensor | None = None,
    drop: bool = False,
    differentiate: bool = True,
) -> Slopes:
    """Run a forward pass and differentiate a metric of its logits by the values at some sites of the decoder.

    Parameters
    ----------
    model
        In evaluation mode; the gradients of its parameters do not change.
    inputs
        Inputs of B examples.
    sites
        Sites of the decoder.
    metric
        Differentiated function; rows must not depend on each other.
    embeddings
        Replacement for the input of the first decoder layer.
    drop
        Return for each layer the gradient without the path through that layer's outputs (GradDrop:
        Kramár et al. 2024, arXiv 2403.00745, section 3.2); one backward pass per layer.
    differentiate
        Whether to compute gradients in addition to values.

    Raises
    ------
    ModelError
        If no gradient reaches a site: its attention cannot be differentiated, or the site does not affect the logits.
    """
    values: dict[Site, Tensor] = {}
    first: list[Tensor] = []
    dropped: list[int] = [-1]
    layers = range(model.n_layers)
    with torch.set_grad_enabled(differentiate), ExitStack() as hooks:

        def enter(x: Tensor) -> Tensor:
            start = x if embeddings is None else embeddings
            first.append(start.detach().clone().requires_grad_(differentiate))  # stop gradients before the decoder
            return first[-1]

        hooks.callback(model.place("decoder", 0, "resid_pre").edit(enter).remove)
        for site in sites:

            def keep(x: Tensor, site: Site = site) -> Tensor:
                values[site] = x.view_as(x)  # a separate graph node: only later operations read it
                return values[site]

            hooks.callback(edit(model, site, keep).remove)
        for layer in layers if drop else ():

            def write(x: Tensor, layer: int = layer) -> Tensor:
                x.register_hook(lambda g, layer=layer: torch.zeros_like(g) if dropped[0] == layer else g)
                return x

            for component in ("attn_out", "mlp_out"):
                hooks.callback(model.place("decoder", layer, component).edit(write).remove)
        score = metric(model.forward(inputs)[:, -1])
        gradients: list[tuple[Tensor, ...]] = []
        for layer in (layers if drop else (-1,)) if differentiate else ():
            dropped[0] = layer
            last = layer == (model.n_layers - 1 if drop else -1)
            try:
                gradients.append(
                    torch.autograd.grad(
                        score.sum(), [values[s] for s in sites], retain_graph=not last, materialize_grads=drop
                    )
                )
            except (RuntimeError, KeyError) as error:
                msg = (
                    f"{model.name}: no gradient reaches {sites[0]} or similar sites: {error}; load the model with "
                    "attn_implementation='eager' or 'sdpa', and choose sites that affect its logits"
                )
                raise ModelError(msg) from error
    stacked = {site: torch.stack([g[i] for g in gradients]) for i, site in enumerate(sites) if gradients}
    detached = {site: x.detach() for site, x in values.items()}
    return Slopes(detached, stacked, score.detach(), first[-1].detach())


def check_differentiable(model: Lvlm) -> None:
    """Raise `ModelError` if the decoder's attention implementation is not known to be differentiable."""
    named = {str(c._attn_implementation) for c in configurations(model).values()}
    other = sorted(named - set(ATTENTIONS) - {"None"})
    if other:
        msg = (
            f"{model.name} uses attention implementation '{other[0]}', which is not known to be differentiable; load it "
            f"with attn_implementation={' or '.join(repr(a) for a in reversed(ATTENTIONS))}"
        )
        raise ModelError(msg)


def configurations(model: Lvlm) -> dict[int, Any]:
    """Return the configurations that set the decoder's attention implementation, by ``id``."""
    root = model.hf.get_submodule(model.spec.decoder.layers.rpartition(".")[0])
    candidates: list[Any] = [m.config for m in root.modules() if hasattr(m, "config")]
    return {id(c): c for c in candidates if hasattr(c, "_attn_implementation")}
