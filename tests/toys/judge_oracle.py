"""The debiased score of one sentence by whole forwards, one prompt at a time."""

from __future__ import annotations

from dataclasses import replace

import torch

from concepts.schema import Example
from lvlm import Lvlm
from tests.toys.decoding_oracle import text_only


def naive_score(model: Lvlm, example: Example, question: str, alpha: float) -> float:
    """``(1 + alpha) f - alpha f_blind`` of the logit of "yes", the only form of yes that the toy tokenizer knows."""
    fresh = replace(example, question=question, suffix="", prefix="", mentions=(), candidates=(), aliases=())
    inputs = model.encode(fresh).inputs
    yes = model.processor.tokenizer.get_vocab()["yes"]
    with torch.no_grad():
        f, blind = (
            float(model.hf(**row, use_cache=False).logits[0, -1, yes]) for row in (inputs, text_only(model, inputs))
        )
    return (1 + alpha) * f - alpha * blind
