"""One forward and its gradients: what is at some sites, and how the answer would change with it."""

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
"""Ways of computing attention whose derivatives PyTorch knows, by transformers' names."""

Metric = Callable[[Tensor], Tensor]
"""From logits at the last position ``[B, V]`` to one number a row, differentiable."""


@dataclass(frozen=True, eq=False)
class Slopes:
    """Values and gradients of one run of B examples."""

    values: Mapping[Site, Tensor]
    """``[B, T, d]`` by site."""
    gradients: Mapping[Site, Tensor]
    """Derivative of the metric by each, ``[K, B, T, d]``: K is 1, or the number of layers where each is left out once.
    Empty where none was asked for."""
    metric: Tensor
    """``[B]``."""
    embeddings: Tensor
    """What the first decoder layer was given, ``[B, T, D]``."""


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
    """Run a forward and differentiate a metric of its logits by what is at some sites of the decoder.

    Parameters
    ----------
    model
        In evaluation mode; its parameters' own gradients are left as they are.
    inputs
        Of B examples.
    sites
        In the decoder.
    metric
        What is differentiated; rows must not depend on each other.
    embeddings
        Put in the place of what the first decoder layer is given.
    drop
        Return for each layer the gradient with nothing flowing back through what that layer writes (GradDrop:
        Kramár et al. 2024, arXiv 2403.00745, section 3.2); one backward pass a layer.
    differentiate
        Whether gradients are wanted at all, beside the values.

    Raises
    ------
    ModelError
        Where no gradient reaches a site: the attention in use cannot be differentiated, or the site is not on the way.
    """
    values: dict[Site, Tensor] = {}
    first: list[Tensor] = []
    dropped: list[int] = [-1]
    layers = range(model.n_layers)
    with torch.set_grad_enabled(differentiate), ExitStack() as hooks:

        def enter(x: Tensor) -> Tensor:
            start = x if embeddings is None else embeddings
            first.append(
                start.detach().clone().requires_grad_(differentiate)
            )  # nothing before the decoder is differentiated
            return first[-1]

        hooks.callback(model.place("decoder", 0, "resid_pre").edit(enter).remove)
        for site in sites:

            def keep(x: Tensor, site: Site = site) -> Tensor:
                values[site] = x.view_as(
                    x
                )  # a node of its own: what reads the site reads it, what made the site does not
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
                    f"{model.name}: no gradient reaches {sites[0]} and the like: {error}; load the model with "
                    "attn_implementation='eager' or 'sdpa', and ask for sites that its forward reaches"
                )
                raise ModelError(msg) from error
    stacked = {site: torch.stack([g[i] for g in gradients]) for i, site in enumerate(sites) if gradients}
    held = {site: x.detach() for site, x in values.items()}
    return Slopes(held, stacked, score.detach(), first[-1].detach())


def check_differentiable(model: Lvlm) -> None:
    """Raise `ModelError` where the decoder's attention is computed in a way that is not known to have derivatives."""
    named = {str(c._attn_implementation) for c in configurations(model).values()}
    other = sorted(named - set(ATTENTIONS) - {"None"})
    if other:
        msg = (
            f"{model.name} computes attention by '{other[0]}', whose derivatives are not known to be there: load it with "
            f"attn_implementation={' or '.join(repr(a) for a in reversed(ATTENTIONS))}"
        )
        raise ModelError(msg)


def configurations(model: Lvlm) -> dict[int, Any]:
    """Return the configurations that decide how the decoder computes attention, by identity."""
    root = model.hf.get_submodule(model.spec.decoder.layers.rpartition(".")[0])
    found: list[Any] = [m.config for m in root.modules() if hasattr(m, "config")]
    return {id(c): c for c in found if hasattr(c, "_attn_implementation")}
