"""ProjectAway: remove a word's direction from the image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from groundscope.core.errors import PatchError
from lvlm.sites import Site
from mitigation.steering.changes import ProjectChange, VectorChange
from mitigation.steering.derive.base import Variant, check_variant
from mitigation.steering.derive.text_activations import read_text, token_ids
from mitigation.steering.places import Key
from mitigation.steering.vector import SteeringVector

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def project_away(
    model: Lvlm,
    phrase: str,
    *,
    layers: Sequence[int],
    text_layer: int | None = None,
    positions: str = "image:all",
    strength: float = 1.0,
    variant: Variant = "paper",
) -> SteeringVector:
    """Return ``h <- h - w * max(<h, t>, 0) / <t, t> * t`` at the image tokens: remove an object from the image's representation.

    Jiang et al. 2024 (arXiv 2410.02762): t is the decoder's activation at the last token of the phrase, run without an image.

    Parameters
    ----------
    model
        The model to steer.
    phrase
        Name of the absent object, such as ``apple``. Remove several objects with nested contexts.
    layers
        Layers whose residual stream is changed.
    text_layer
        Layer whose residual stream gives t; by default the first of `layers`.
    positions
        Token positions that the vector acts on.
    strength
        w.
    variant
        ``paper``, or ``release`` (github.com/nickjiang2378/vl-interp): t is the mean of the phrase's input embeddings.

    Raises
    ------
    PatchError
        For no layers, or a phrase whose t is 0 or not finite.
    SiteError
        For a layer that the model lacks.
    DataError
        For a phrase that the tokenizer does not know.

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.derive.project_away(gs.load_lvlm("tiny"), "apple", layers=[1, 2])
    SteeringVector(project at L1, L2; image:all, strength 1, for 'tiny')
    """
    check_variant(variant)
    if not layers:
        msg = "no layers to act on; give the layers whose image tokens are changed"
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
        msg = f"the decoder's activation for '{phrase}' is 0 or not finite, so the direction is undefined"
        raise PatchError(msg)
    changes: dict[Key, VectorChange] = {layer: ProjectChange(t / length) for layer in layers}
    provenance = {
        "method": f"ProjectAway ({variant})",
        "phrase": phrase,
        "text_layer": text_layer,
        "weights": model.weights_hash,
    }
    return SteeringVector(changes, positions, strength, model.name, model.config_hash, provenance)
