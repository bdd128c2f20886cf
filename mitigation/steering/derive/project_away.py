"""ProjectAway: what the image's tokens have of a word is taken out of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from groundscope.core.errors import PatchError
from lvlm.sites import Site
from mitigation.steering.derive.base import Variant, check_variant
from mitigation.steering.derive.text_only import read_text, token_ids
from mitigation.steering.placement import Entry, Key
from mitigation.steering.vector import Positions, SteeringVector

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def project_away(
    model: Lvlm,
    phrase: str,
    *,
    layers: Sequence[int],
    text_layer: int | None = None,
    positions: Positions = "image",
    strength: float = 1.0,
    variant: Variant = "paper",
) -> SteeringVector:
    """Return ``h <- h - w * max(<h, t>, 0) / <t, t> * t`` at the image's tokens: the model forgets that it saw a thing.

    Jiang et al. 2024 (arXiv 2410.02762): t is what the decoder holds at the last token of the phrase, read alone.

    Parameters
    ----------
    model
        The model to steer.
    phrase
        Of the thing that is not there, as in ``apple``. Several are taken out by nested contexts.
    layers
        Whose residual stream is edited.
    text_layer
        Whose residual stream t is taken from; by default the first of `layers`.
    positions
        Where it acts.
    strength
        w.
    variant
        ``paper``, or ``release`` (github.com/nickjiang2378/vl-interp): t is the mean of the phrase's input embeddings.

    Raises
    ------
    PatchError
        For no layers, or a phrase that leaves nothing.
    SiteError
        For a layer that the model lacks.
    DataError
        For a phrase that the tokenizer does not know.
    """
    check_variant(variant)
    if not layers:
        msg = "no layers to act on: name those whose image tokens are edited"
        raise PatchError(msg)
    for layer in layers:
        model.locate(Site("decoder", layer, "resid_post"))
    if variant == "paper":
        site = Site("decoder", layers[0] if text_layer is None else text_layer, "resid_post")
        model.locate(site)
        t = read_text(model, phrase, [site])[site]
    else:
        ids = torch.tensor(token_ids(model, phrase, special=False), device=model.device)
        with torch.no_grad():
            t = model.hf.get_input_embeddings()(ids).double().mean(dim=0).cpu().numpy()
    length = float(np.linalg.norm(t))
    if not (np.isfinite(length) and length > 0):
        msg = f"'{phrase}' leaves nothing in the decoder: there is no direction"
        raise PatchError(msg)
    entries: dict[Key, Entry] = {layer: Entry(t / length) for layer in layers}
    about = {
        "method": f"ProjectAway ({variant})",
        "phrase": phrase,
        "text_layer": text_layer,
        "weights": model.weights_hash,
    }
    return SteeringVector(entries, "project", positions, strength, model.name, model.config_hash, about)
