"""Forwards of the decoder without an image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from groundscope.core.errors import ModelError, SiteError
from lvlm.sites import Site

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def decoder_of(model: Lvlm) -> nn.Module:
    """Return the module that runs the decoder's layers."""
    first = model.layers("decoder")[0]
    path = next(name for name, module in model.hf.named_modules() if module is first).split(".")[:-2]
    return model.hf.get_submodule(".".join(path))


@torch.no_grad()
def read_text_only(
    model: Lvlm,
    inputs: Mapping[str, Tensor],
    sites: Sequence[Site],
    *,
    take: Callable[[Site, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run one forward on words alone and return the tensors of some decoder sites by name.

    A model whose own forward needs a picture (BLIP-2, InstructBLIP, Kosmos-2) is run from its decoder on. Layers of
    cross-attention alone (Llama-3.2-Vision) are skipped without an image: there the residual stream is that before them.

    Parameters
    ----------
    model
        The model.
    inputs
        ``input_ids`` and ``attention_mask``, ``[rows, positions]``.
    sites
        Of the decoder.
    take
        What is kept of each tensor, as for `Lvlm.read`; by default all of it.

    Raises
    ------
    ModelError
        For a model whose decoder does not read the prompt.
    SiteError
        For a site that the model lacks or a forward without an image does not reach.
    """
    if model.encoder_decoder:
        msg = f"{model.name}: an encoder reads its prompt, so that a text alone leaves nothing in the decoder"
        raise ModelError(msg)
    where = {site: _unskipped(model, site) for site in sites}
    pixels = inspect.signature(model.hf.forward).parameters.get("pixel_values")
    needed = pixels is not None and pixels.default is pixels.empty and pixels.kind is not pixels.VAR_KEYWORD
    if model.view.text_only and not needed:
        seen = model.read(inputs, list(dict.fromkeys(where.values())), take=take)
    else:
        seen = _from_decoder(model, inputs, list(dict.fromkeys(where.values())), take)
    return {str(site): seen[str(place)] for site, place in where.items()}


def _unskipped(model: Lvlm, site: Site) -> Site:
    """Return where a residual stream is read without an image, which skips layers of cross-attention alone.

    Raises
    ------
    ModelError
        For what such a layer itself computes.
    """
    skipped = [model.head_site(layer).cross for layer in range(model.n_layers)]
    if site.stack != "decoder" or not 0 <= site.layer < model.n_layers or not skipped[site.layer]:
        return site
    if site.component not in ("resid_pre", "resid_mid", "resid_post"):
        msg = (
            f"site '{site}': without an image {model.name} skips its layers of cross-attention, so nothing is computed there; "
            "choose a layer with self-attention"
        )
        raise ModelError(msg)
    below = [layer for layer in range(site.layer) if not skipped[layer]]
    if below:
        return Site("decoder", below[-1], "resid_post")
    return Site("decoder", skipped.index(False), "resid_pre")


def _from_decoder(
    model: Lvlm, inputs: Mapping[str, Tensor], sites: Sequence[Site], take: Callable[[Site, Tensor], Tensor] | None
) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    keep = take if take is not None else lambda _, x: x.clone()
    with ExitStack() as stack:
        for site in sites:
            place = model.locate(site)
            stack.callback(place.watch(lambda x, site=site: seen.update({str(site): keep(site, x)})).remove)
        decoder_of(model)(**{name: x.to(model.device) for name, x in inputs.items()}, use_cache=False)
    missing = [str(site) for site in sites if str(site) not in seen]
    if missing:
        msg = f"site '{missing[0]}' is in {model.name}, but a forward without an image does not reach it"
        raise SiteError(msg)
    return seen
