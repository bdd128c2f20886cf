"""Decide whether the questions about an image can share the run of their prefix, and measure it once for each model.

This module and `lvlm.prefix_groups`, for the rows of a batch, are the only places that decide where sharing is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from concepts.schema import Example
from lvlm.decoding.attention_edits import without_attention_edits
from lvlm.decoding.cache_check import rounding_of
from lvlm.decoding.prefix_run import Continuation, prefix_batches
from lvlm.encoding.continued_inputs import append_tokens
from lvlm.family.module_detection import text_config
from lvlm.image_tokens import image_in_sequence, reads_both_ways
from lvlm.images import MemoryImage
from lvlm.prefix_groups import PrefixGroups

if TYPE_CHECKING:
    from lvlm.encoding.encode import Encoding
    from lvlm.model import Lvlm

_SIZE = (112, 84)
"""Width and height of the images of the check in pixels."""
_QUESTIONS = ("Is there a dog?", "Is there a cat in the image? Is there a dog?")
"""Questions of different length, with the same beginning, of the check."""


def unshared_because(model: Lvlm) -> str:
    """Return why rows cannot share the run of their prefix in the present state of a model; empty if they can.

    Families are excluded if an encoder or cross-attention reads the image, if image tokens attend to later tokens, or if
    attention is limited to chunks. All others are measured once: prompts that continue a shared prefix must have the logits of
    full forward passes. A decoding method, an intervention that may act on the prefix (`ActiveIntervention.late` is False) and a
    hook of unknown effect exclude sharing while they are active. Observers are allowed: they receive the prefix and the other
    tokens separately.

    Examples
    --------
    >>> import groundscope as gs
    >>> from lvlm.prefix_sharing import unshared_because
    >>> model = gs.load_lvlm("tiny")
    >>> unshared_because(model)
    ''
    >>> with gs.intervened(model, [gs.Intervention(gs.Site.parse("decoder.L3.z"), gs.Zero(), "image:all")]):
    ...     unshared_because(model)
    "the intervention 'decoder.L3.z' may act on the prefix"
    """
    return _excluded_family(model) or _present_state(model) or _measured(model)


def _excluded_family(model: Lvlm) -> str:
    if model.encoder_decoder:
        return "an encoder reads the prompt"
    if not image_in_sequence(model):
        return "cross-attention layers read the image"
    if reads_both_ways(model):
        return "image tokens attend to later tokens"
    if "chunked_attention" in (getattr(text_config(model.hf.config), "layer_types", None) or ()):
        return "attention is limited to chunks"
    if "position_ids" not in model.accepts:
        return "the model takes no positions"
    return ""


def _present_state(model: Lvlm) -> str:
    if model.decoder is not None:
        return f"{type(model.decoder).__name__} chooses the tokens"
    if model.answer_from is not None or model.row_layout is not None:
        return "the model is answering already"
    early = next((item for item in model.interventions if not item.late), None)
    if early is not None:
        return f"the {early.kind} '{early.name}' may act on the prefix"
    hooks = model.unregistered_hooks
    return f"the effect of a hook is unknown: {hooks[0]}" if hooks else ""


def _measured(model: Lvlm) -> str:
    def measure() -> bool:
        equal = continues_exactly(model)
        if not equal and model.interventions:  # one of large strength also enlarges rounding errors
            raise _Undecided
        return equal

    try:
        equal = model.remember(("prefix runs", model.attention, str(model.dtype)), measure)
    except _Undecided:
        equal = False
    return "" if equal else "rows that continue a shared prefix do not have the logits of full forward passes"


class _Undecided(Exception):
    """A failure that is not remembered."""


@torch.no_grad()
def continues_exactly(model: Lvlm) -> bool:
    """Whether rows that continue shared prefixes have the logits of full forward passes, with padding and two images."""
    examples = _questions()
    groups = PrefixGroups(model, examples, len(examples))
    with model.with_row_layout(None), without_attention_edits(model):
        try:
            batch = next(prefix_batches(model, groups), None)
            if batch is None or len(batch.index) < len(examples):
                return False
            run = Continuation(batch)
            token = run.start().argmax(-1)
            shared = torch.stack([batch.logits(), run.next(token)])
            full = torch.stack([_full(model, batch.encodings, None), _full(model, batch.encodings, token)])
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError):
            return False
    difference = (shared.log_softmax(-1) - full.log_softmax(-1)).abs().amax().item()
    return difference <= len(examples) * rounding_of(model)


def _questions() -> list[Example]:
    """Return questions of different length about two images of random pixels."""
    draw = np.random.default_rng(0)
    examples = []
    for name in ("a", "b"):
        pixels = draw.integers(0, 256, (*_SIZE[::-1], 3), dtype=np.uint8)
        image = MemoryImage.of(Image.fromarray(pixels))
        for question in _QUESTIONS:
            fields = (question, "", (), "object", "open", "", "check")
            examples.append(Example(f"{name}: {question}", image, *fields))
    return examples


def _full(model: Lvlm, encodings: Sequence[Encoding], tokens: Tensor | None) -> Tensor:
    rows = []
    for number, encoding in enumerate(encodings):
        inputs = model.on_device(encoding.inputs)
        start = None
        if tokens is not None:
            inputs, start = append_tokens(model, inputs, [[int(tokens[number])]]), encoding.tokens.length
        with model.reading_answers(start):
            rows.append(model.forward(inputs)[:, -1])
    return torch.cat(rows)
