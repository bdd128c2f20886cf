"""Load a store into TransformerLens' ActivationCache, so that its tools work on stored activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from groundscope.core.errors import ModelError, SiteError

if TYPE_CHECKING:
    from activation_store.reading.rows import RowSelection
    from activation_store.reading.store import ActivationStore

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
}
"""TransformerLens' hook name of each component within its block."""


def activation_cache(
    store: ActivationStore, model: Any, tokens: str = "last", examples: RowSelection | None = None
) -> Any:
    """Return the decoder's activations at one token selection as an `ActivationCache`.

    The position axis has length 1: the selected token, or the mean over a role's tokens; nonlinear functions of the residual
    stream (above all norms) are then those of the mean. The scales of norms, which TransformerLens also caches, are
    computed from the residual stream.

    Parameters
    ----------
    store
        The store to read.
    model
        The result of `lvlm.transformer_lens.as_transformer_lens` for the traced model: the tools use its weights.
    tokens
        The token selection, ``last``.
    examples
        Rows, as in `ActivationStore.read`; all by default.

    Returns
    -------
    ActivationCache
        ``blocks.<l>.hook_resid_post`` float32 ``[n, 1, D]``, ``blocks.<l>.attn.hook_z`` ``[n, 1, heads, head_dim]``, and
        so on for all traced components; ``hook_embed`` is the first layer's ``resid_pre``, image tokens included.

    Raises
    ------
    SiteError
        If no decoder site was traced at that selection.
    ModelError
        If the bridge belongs to a model with other layers or another width.
    """
    from transformer_lens import ActivationCache

    arrays = [a for a in store.arrays if a.stack == "decoder" and a.component in HOOKS and a.tokens == tokens]
    if not arrays:
        traced = ", ".join(sorted({f"{a.component} at {a.tokens}" for a in store.arrays if a.stack == "decoder"}))
        msg = f"no decoder site at '{tokens}' in {store.path}; choose from: {traced or '(no decoder site)'}"
        raise SiteError(msg)
    partial = next((a for a in arrays if a.heads), None)
    if partial is not None:
        msg = (
            f"'{partial.name}' has heads {', '.join(map(str, partial.heads))} only, but TransformerLens' cache holds all heads; "
            "trace all heads, or leave this site out"
        )
        raise SiteError(msg)
    layers = model.cfg.n_layers
    highest = max(n for a in arrays for n in a.layers)
    widths = {a.width for a in arrays if a.n_heads is None}
    if highest >= layers or widths - {model.cfg.d_model}:
        msg = (
            f"the bridge has {layers} layers of width {model.cfg.d_model}, the store layer {highest} and widths "
            f"{sorted(widths)}: use the bridge of the traced model"
        )
        raise ModelError(msg)
    activations: dict[str, Tensor] = {}
    for array in arrays:
        for layer in array.layers:
            x = torch.from_numpy(store.read(f"decoder.L{layer}.{array.component}", tokens, examples=examples))[:, None]
            if array.n_heads is not None:
                x = x.unflatten(-1, (array.n_heads, -1))  # [n, 1, H, head_dim]
            activations[f"blocks.{layer}.{HOOKS[array.component]}"] = x
    activations.update(_scales(activations, layers, float(model.cfg.eps), model.cfg.normalization_type))
    if "blocks.0.hook_resid_pre" in activations:
        activations["hook_embed"] = activations["blocks.0.hook_resid_pre"]
    return ActivationCache(activations, model)


def _scales(activations: dict[str, Tensor], layers: int, eps: float, kind: str | None) -> dict[str, Tensor]:
    """Return the scale of each norm whose input residual stream is cached."""
    inputs = {f"blocks.{n}.ln1.hook_scale": f"blocks.{n}.hook_resid_pre" for n in range(layers)}
    inputs |= {f"blocks.{n}.ln2.hook_scale": f"blocks.{n}.hook_resid_mid" for n in range(layers)}
    inputs["ln_final.hook_scale"] = f"blocks.{layers - 1}.hook_resid_post"
    scales = {}
    for name, source in inputs.items():
        if source in activations:
            x = activations[source]
            x = x - x.mean(-1, keepdim=True) if (kind or "").startswith("LN") else x
            scales[name] = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()  # [n, 1, 1]
    return scales
