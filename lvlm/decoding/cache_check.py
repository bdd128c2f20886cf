"""Check a model's key-value cache with two prompts of different length about one image; the tolerance is the rounding error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from lvlm.decoding.rule import Prompts

if TYPE_CHECKING:
    from lvlm.model import Lvlm

_SIZE = (112, 84)
"""Width and height of the image in pixels; families with dynamic resolution turn it into few tokens."""
_QUESTIONS = ("Is there a dog?", "What is in the image? Is there a dog?")


def check_prompts(model: Lvlm, questions: Sequence[str] = _QUESTIONS) -> tuple[Prompts, ...]:
    """Return prompts about an image of random pixels, each a separate group."""
    pixels = np.random.default_rng(0).integers(0, 256, (*_SIZE[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    groups = []
    for row, question in enumerate(questions):
        inputs, _ = model.encode_prompt(model.prompt(question), [image])
        groups.append(Prompts((row,), model.on_device(inputs)))
    return tuple(groups)


def rounding_of(model: Lvlm) -> float:
    """Return the largest difference of log-probabilities that rounding explains."""
    return min(0.25, 1e4 * torch.finfo(model.dtype).eps)
