"""A decoder that reads words alone, without an image."""

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
    """Return the tokens of a text without images; raises `DataError` where there are none, or one is unknown."""
    tokenizer = model.processor.tokenizer
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not ids or model.content_id in ids or tokenizer.unk_token_id in ids:
        msg = f"'{text}' has no tokens of {model.name}, unknown ones, or stands for an image: give words it knows"
        raise DataError(msg)
    return ids


def read_text(model: Lvlm, text: str, sites: Sequence[Site]) -> dict[Site, np.ndarray]:
    """Run the decoder on a text alone and return what is at its last token, float64 ``[d]`` by site.

    Raises
    ------
    ModelError
        For a model whose decoder does not read the prompt.
    DataError
        Where the text has no tokens.
    """
    tokenizer = model.processor.tokenizer
    # The same rule as for prompts with images: a template may have written the first token already.
    special = model.spec.special_tokens and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    ids = torch.tensor([token_ids(model, text, special=special)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen = read_text_only(model, inputs, sites, take=lambda _, x: x[0, -1])
    return {site: seen[str(site)].double().cpu().numpy() for site in sites}
