"""A store read as TransformerLens' ActivationCache, so that its tools work on activations that were traced long ago."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from groundscope.core.errors import ModelError, SiteError

if TYPE_CHECKING:
    from activation_store.reading.rows import Rows
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
"""TransformerLens' name of each component, inside its block."""


def activation_cache(store: ActivationStore, model: Any, tokens: str = "last", examples: Rows | None = None) -> Any:
    """Return the decoder's activations at one token selection as an `ActivationCache`.

    Its positions axis has length 1: the selected token, or the mean over a role's tokens, for which what is not linear in
    the residual stream (norms, above all) is that of the mean. The scales of norms, which TransformerLens keeps beside
    activations, are computed from the residual stream.

    Parameters
    ----------
    store
        Where they are.
    model
        What `lvlm.transformer_lens.as_transformer_lens` returned for the model that was traced: the tools take its weights.
    tokens
        The token selection, ``last``.
    examples
        Rows, as in `ActivationStore.read`; all by default.

    Returns
    -------
    ActivationCache
        ``blocks.<l>.hook_resid_post`` float32 ``[n, 1, D]``, ``blocks.<l>.attn.hook_z`` ``[n, 1, heads, head_dim]``, and
        so on for what was traced; ``hook_embed`` is the first layer's ``resid_pre``, the image's tokens in place.

    Raises
    ------
    SiteError
        Where no site of the decoder was traced at that selection.
    ModelError
        Where the bridge is of a model with other layers or another width.
    """
    from transformer_lens import ActivationCache

    found = [a for a in store.arrays if a.stack == "decoder" and a.component in HOOKS and a.tokens == tokens]
    if not found:
        there = ", ".join(sorted({f"{a.component} at {a.tokens}" for a in store.arrays if a.stack == "decoder"}))
        msg = f"no decoder site at '{tokens}' in {store.path}: there are {there or 'none'}"
        raise SiteError(msg)
    layers = model.cfg.n_layers
    highest = max(n for a in found for n in a.layers)
    widths = {a.width for a in found if a.n_heads is None}
    if highest >= layers or widths - {model.cfg.d_model}:
        msg = (
            f"the bridge has {layers} layers of width {model.cfg.d_model}, the store layer {highest} and widths "
            f"{sorted(widths)}: it is of another model"
        )
        raise ModelError(msg)
    kept: dict[str, Tensor] = {}
    for array in found:
        for layer in array.layers:
            x = torch.from_numpy(store.read(f"decoder.L{layer}.{array.component}", tokens, examples=examples))[:, None]
            if array.n_heads is not None:
                x = x.unflatten(-1, (array.n_heads, -1))  # [n, 1, H, head_dim]
            kept[f"blocks.{layer}.{HOOKS[array.component]}"] = x
    kept.update(_scales(kept, layers, float(model.cfg.eps), model.cfg.normalization_type))
    if "blocks.0.hook_resid_pre" in kept:
        kept["hook_embed"] = kept["blocks.0.hook_resid_pre"]
    return ActivationCache(kept, model)


def _scales(kept: dict[str, Tensor], layers: int, eps: float, kind: str | None) -> dict[str, Tensor]:
    """Return what each norm divides by, where the residual stream before it is known."""
    before = {f"blocks.{n}.ln1.hook_scale": f"blocks.{n}.hook_resid_pre" for n in range(layers)}
    before |= {f"blocks.{n}.ln2.hook_scale": f"blocks.{n}.hook_resid_mid" for n in range(layers)}
    before["ln_final.hook_scale"] = f"blocks.{layers - 1}.hook_resid_post"
    found = {}
    for name, source in before.items():
        if source in kept:
            x = kept[source]
            x = x - x.mean(-1, keepdim=True) if (kind or "").startswith("LN") else x
            found[name] = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()  # [n, 1, 1]
    return found
