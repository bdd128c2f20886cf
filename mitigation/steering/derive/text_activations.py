"""Run the decoder on text without an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from groundscope.core.errors import DataError
from lvlm.text_only import read_text_only

if TYPE_CHECKING:
    from lvlm.model import Lvlm
    from lvlm.sites import Site


def token_ids(model: Lvlm, text: str, *, special: bool) -> list[int]:
    """Return the tokens of a text without images; raises `DataError` for no tokens or an unknown token."""
    tokenizer = model.processor.tokenizer
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not ids or model.content_id in ids or tokenizer.unk_token_id in ids:
        msg = (
            f"'{text}' has no tokens, an unknown token or an image token for {model.name}; use words in its vocabulary"
        )
        raise DataError(msg)
    return ids


def read_text(model: Lvlm, text: str, sites: Sequence[Site]) -> dict[Site, np.ndarray]:
    """Run the decoder on a text without an image and return the activations at its last token, float64 ``[d]`` by site.

    Raises
    ------
    ModelError
        For a model whose decoder does not read the prompt.
    DataError
        If the text has no tokens.
    """
    tokenizer = model.processor.tokenizer
    # As for prompts with images: the template may already contain the first token.
    special = model.spec.special_tokens and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    ids = torch.tensor([token_ids(model, text, special=special)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    activations = read_text_only(model, inputs, sites, take=lambda _, x: x[0, -1])
    return {site: activations[str(site)].double().cpu().numpy() for site in sites}
