"""Image tokens of the decoder's sequence, from the inputs of a forward pass alone.

A prompt that this package encodes has a `lvlm.token_map.TokenMap`; a forward pass or generation that a user calls has only its
inputs. Both take the image tokens from here, so a token selection means the same tokens in reading and in steering.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from groundscope.core.errors import DataError, ModelError
from lvlm.interfaces import Model


def image_in_sequence(model: Model) -> bool:
    """Whether the image is in the decoder's sequence, and not read by an encoder or by cross-attention."""
    return not model.encoder_decoder and model.image_encoding.image_token_mask is not None


def reads_both_ways(model: Model) -> bool:
    """Whether image tokens of the family, or whole prompts, attend to later tokens."""
    return model.spec.model_type in {"paligemma", "gemma3", "gemma3n", "gemma4", "shieldgemma2"}


def check_image_in_sequence(model: Model, purpose: str) -> None:
    """Raise `ModelError` if the decoder's sequence contains no image tokens; `purpose` begins the message."""
    if image_in_sequence(model):
        return
    reader = "an encoder reads the image" if model.encoder_decoder else "cross-attention layers read the image"
    msg = (
        f"{purpose} need image tokens in the decoder's sequence, and {model.name} ({model.spec.model_type}) has none: {reader}; "
        "use tokens that are not part of an image"
    )
    raise ModelError(msg)


def image_tokens(model: Model, inputs: Mapping[str, Any]) -> Tensor:
    """Return which tokens are image tokens, bool ``[rows, positions]``.

    Other tokens that come with an image (brackets, row ends, tile names, a class token) are excluded.

    Parameters
    ----------
    model
        The model.
    inputs
        Arguments of the model's forward method: ``input_ids [rows, positions]``, and for some families ``image_sizes`` or
        ``image_embeds_position_mask``.

    Raises
    ------
    ModelError
        If the decoder's sequence contains no image tokens: an encoder or cross-attention reads the image.
    DataError
        If an input is missing, or the image tokens do not fit the sizes of the images.
    """
    check_image_in_sequence(model, "image tokens")
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        msg = (
            f"input_ids [rows, positions] are needed to find the image tokens of {model.name}; pass them to its forward "
            "or generate"
        )
        raise DataError(msg)
    mask = model.image_encoding.image_token_mask
    return torch.zeros_like(ids, dtype=torch.bool) if mask is None else mask(model, inputs)


def tokens_after_image(image: Tensor) -> Tensor:
    """Return which tokens follow the last image token of their row, bool ``[rows, positions]``; all without an image."""
    return image.flip(1).cumsum(1).flip(1) == 0
