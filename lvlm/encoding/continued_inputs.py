"""Model inputs that continue past the prompt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lvlm.interfaces import Model

# Mask values of a token after the prompt; masks over tiles repeat their last value.
_AFTER_PROMPT = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 1, "image_embeds_position_mask": 0}


def append_tokens(model: Model, inputs: Mapping[str, Tensor], rows: list[list[int]]) -> dict[str, Tensor]:
    """Return inputs with tokens appended to each row of the decoder's sequence.

    Parameters
    ----------
    model
        The model that will read them.
    inputs
        Inputs of B rows.
    rows
        B lists of equal length with the ids to append.
    """
    name = "decoder_input_ids" if model.encoder_decoder else "input_ids"
    extra = len(rows[0])
    ids = inputs[name]
    continued = dict(inputs)
    continued[name] = torch.cat([ids, torch.tensor(rows, device=ids.device, dtype=ids.dtype)], dim=1)
    if model.encoder_decoder:
        return continued
    for other, value in _AFTER_PROMPT.items():
        if other in continued:
            old = continued[other]
            mark = value if other != "token_type_ids" or not model.spec.token_types else 0
            continued[other] = torch.cat([old, old.new_full((len(old), extra), mark)], dim=1)
    if "cross_attention_mask" in continued:
        mask = continued["cross_attention_mask"]
        continued["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, extra, -1, -1)], dim=1)
    return continued
