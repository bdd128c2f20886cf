"""Which tokens of the decoder's sequence stand for an image, from the inputs of a forward alone.

A prompt that this package encodes has a `lvlm.token_map.TokenMap`; a forward or a generation that a user calls has nothing
but its inputs. Both take the image's tokens from here, so that a token selection means the same tokens when activations
are read and when they are changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from groundscope.core.errors import DataError, ModelError

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def image_in_sequence(model: Lvlm) -> bool:
    """Whether the image is a part of the decoder's own sequence, and not read by an encoder or by cross-attention."""
    return not model.encoder_decoder and model.view.mark is not None


def check_image_in_sequence(model: Lvlm, purpose: str) -> None:
    """Raise `ModelError` where the decoder's own sequence holds no image tokens; `purpose` begins the message."""
    if image_in_sequence(model):
        return
    how = "an encoder reads the image" if model.encoder_decoder else "cross-attention layers read the image"
    msg = (
        f"{purpose} need image tokens in the decoder's sequence, and {model.name} ({model.spec.model_type}) has none: {how}; "
        "use 'all', 'last', 'suffix' or 'generated'"
    )
    raise ModelError(msg)


def image_tokens(model: Lvlm, inputs: Mapping[str, Any]) -> Tensor:
    """Return which tokens stand for an image, bool ``[rows, positions]``.

    What an image brings with it besides (brackets, row ends, tile names, a class token) is not marked.

    Parameters
    ----------
    model
        The model.
    inputs
        As the model's forward takes them: ``input_ids [rows, positions]``, and where the family needs them ``image_sizes``
        or ``image_embeds_position_mask``.

    Raises
    ------
    ModelError
        Where the decoder's sequence holds no image tokens: an encoder or cross-attention reads the image.
    DataError
        Where an input is missing, or the image tokens do not fit the images' sizes.
    """
    check_image_in_sequence(model, "image tokens")
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        msg = f"the image tokens of {model.name} are found by input_ids [rows, positions]: pass them to its forward or generate"
        raise DataError(msg)
    mark = model.view.mark
    return torch.zeros_like(ids, dtype=torch.bool) if mark is None else mark(model, inputs)


def after_image(image: Tensor) -> Tensor:
    """Return which tokens follow the last image token of their row, bool ``[rows, positions]``; all in a row without one."""
    return image.flip(1).cumsum(1).flip(1) == 0
