"""Forward passes of the decoder without an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from groundscope.core.errors import ModelError, SiteError
from lvlm.access.decoder_module import decoder_of
from lvlm.encoding.encode import runs_without_image
from lvlm.model import Lvlm
from lvlm.sites import Site


@torch.no_grad()
def read_text_only(
    model: Lvlm,
    inputs: Mapping[str, Tensor],
    sites: Sequence[Site],
    *,
    take: Callable[[Site, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run one forward pass on text only and return activations of decoder sites by name.

    Of a model whose forward pass needs an image (BLIP-2, InstructBLIP, Kosmos-2), the decoder runs alone. Without an image,
    layers with cross-attention only (Llama-3.2-Vision) are skipped: their residual stream is that of the layer before.

    Parameters
    ----------
    model
        The model.
    inputs
        ``input_ids`` and ``attention_mask``, ``[rows, positions]``.
    sites
        Sites of the decoder.
    take
        As for `Lvlm.read`.

    Raises
    ------
    ModelError
        For a model whose encoder reads the prompt.
    SiteError
        For a site that the model lacks or a forward pass without an image does not reach.
    """
    if model.encoder_decoder:
        msg = (
            f"{model.name}: an encoder reads the prompt, so the decoder has no activations of a text; use another model"
        )
        raise ModelError(msg)
    sources = {site: _unskipped(model, site) for site in sites}
    distinct = list(dict.fromkeys(sources.values()))
    alone = not runs_without_image(model)
    values = _run_decoder(model, inputs, distinct, take) if alone else model.read(inputs, distinct, take=take)
    return {str(site): values[str(source)] for site, source in sources.items()}


def _unskipped(model: Lvlm, site: Site) -> Site:
    """Return the site with the same value in a forward pass that skips layers with cross-attention only.

    Raises
    ------
    ModelError
        For a site other than the residual stream in such a layer.
    """
    skipped = [model.head_site(layer).cross for layer in range(model.n_layers)]
    if site.stack != "decoder" or not 0 <= site.layer < model.n_layers or not skipped[site.layer]:
        return site
    if site.component not in ("resid_pre", "resid_mid", "resid_post"):
        msg = (
            f"site '{site}': without an image {model.name} skips its layers of cross-attention, so the site has no value; "
            "choose a layer with self-attention"
        )
        raise ModelError(msg)
    below = [layer for layer in range(site.layer) if not skipped[layer]]
    if below:
        return Site("decoder", below[-1], "resid_post")
    return Site("decoder", skipped.index(False), "resid_pre")


def _run_decoder(
    model: Lvlm, inputs: Mapping[str, Tensor], sites: Sequence[Site], take: Callable[[Site, Tensor], Tensor] | None
) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    part = take if take is not None else lambda _, x: x.clone()
    with ExitStack() as stack:
        for site in sites:
            point = model.locate(site)
            stack.callback(point.watch(lambda x, site=site: values.update({str(site): part(site, x)})).remove)
        decoder_of(model)(**{name: x.to(model.device) for name, x in inputs.items()}, use_cache=False)
    missing = [str(site) for site in sites if str(site) not in values]
    if missing:
        msg = f"site '{missing[0]}' is in {model.name}, but a forward pass without an image does not reach it"
        raise SiteError(msg)
    return values
