"""Rows of a forward pass that a method may change: the last token of the prompt, and generated tokens.

A cached decoding step has one such row for each answer; an uncached pass over a prompt and its answer has one for the
prompt's last token and one for each generated token. Earlier rows of the prompt are never among them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lvlm.model import Lvlm


def first_live_query(model: Lvlm, length: int) -> int:
    """Return the index, among the `length` positions of the current forward pass, of the first row that may change.

    In passes outside of `lvlm.decoding` it is the last position or, if `Lvlm.answer_from` is set, the position before that.
    """
    layout = model.row_layout
    if layout is not None:
        return max(0, layout.prompt - 1 - (layout.valid.shape[1] - length))
    return length - 1 if model.answer_from is None else max(0, min(model.answer_from, length) - 1)


def live_queries(model: Lvlm, length: int) -> Tensor:
    """Return which positions of the current forward pass may change, bool ``[length]``."""
    return torch.arange(length) >= first_live_query(model, length)
