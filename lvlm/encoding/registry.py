"""How an image becomes tokens, by name: a family's spec names one of these. A new way is one function and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lvlm.encoding.encoded_image import Frame, Look
from lvlm.encoding.extra_inputs import image_mask, question_for_queries, who_sees_which_tile
from lvlm.encoding.fixed_size import florence, kosmos, resampled, whole
from lvlm.encoding.image_token_masks import by_id, by_position_mask, without_class_token, without_row_ends
from lvlm.encoding.llama4 import llama4
from lvlm.encoding.mllama import mllama
from lvlm.encoding.packed import packed, rows
from lvlm.encoding.tiled import anyres, crops, split

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from lvlm.model import Lvlm

__all__ = ["VIEWS", "Frame", "Look", "View"]


@dataclass(frozen=True)
class View:
    """One way in which an image becomes tokens."""

    look: Callable[[Lvlm, Image.Image], Look]
    axis: int = 0
    """Axis along which the pictures of several images of one prompt are joined."""
    finish: Callable[[Lvlm, list[int], Sequence[Look], str], dict[str, Tensor]] | None = None
    """Makes what else the model wants, from the prompt's tokens, its images and its text."""
    apart: bool = True
    """Whether a batch of prompts with one image each reaches the vision tower as equal parts along the first axis, a part a
    row, that it sees one by one and gives in the same order: what `lvlm.access.shared_vision_run` needs."""
    pads: bool = False
    """Whether the model takes pictures of unlike shape in one prompt, filled up with zeros, and passes over the filling."""
    text_only: bool = True
    """Whether the model's own forward runs without a picture."""
    mark: Callable[[Lvlm, Mapping[str, Any]], Tensor] | None = by_id
    """From a forward's inputs to the tokens that stand for an image, bool ``[rows, positions]``; None where the image is
    not in the decoder's sequence. `lvlm.image_tokens` is what calls it."""


VIEWS: Mapping[str, View] = MappingProxyType(
    {
        "whole": View(whole, mark=without_class_token),
        "resampled": View(resampled, finish=question_for_queries),
        "kosmos": View(kosmos, finish=image_mask, mark=by_position_mask, text_only=False),
        "florence": View(florence, mark=None),
        "anyres": View(anyres, pads=True, mark=without_row_ends),
        "split": View(split, axis=1),
        "crops": View(crops),
        "packed": View(packed),
        "rows": View(rows, pads=True, apart=False),  # its tower gives one sequence for all rows
        "llama4": View(llama4),
        "mllama": View(mllama, axis=1, finish=who_sees_which_tile, mark=None),
    }
)
