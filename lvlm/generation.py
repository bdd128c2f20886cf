"""Greedy answers: at each step the token with the largest logit, whatever the checkpoint's generation settings say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm.access.shared_vision_run import each_picture_once
from lvlm.encoding.encode import Batch
from lvlm.finite_logits import check_finite

if TYPE_CHECKING:
    from lvlm.model import Lvlm

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""All that is taken from a checkpoint's generation settings: which token begins and which ends an answer."""

_WITHOUT_EFFECT = {
    *_IDS,
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"),
    *("max_length", "max_new_tokens", "use_cache", "cache_implementation", "cache_config", "transformers_version"),
    *("num_return_sequences", "early_stopping", "length_penalty", "num_beam_groups", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
}
"""Settings that do not change greedy answers: of sampling, length, cache, output, and of beams where there is one."""


def end_tokens(model: Lvlm) -> frozenset[int]:
    """Return the tokens that end an answer; empty where the model has none."""
    return frozenset(_ends(_settings(model)["eos_token_id"]))


def other_rules(model: Lvlm) -> tuple[str, ...]:
    """Return the names of a checkpoint's generation settings that would change greedy answers; `greedy` leaves them out."""
    names: set[str] = set()
    for part in _generating(model):
        differ = part.generation_config.to_diff_dict()
        settings = (name for name, value in differ.items() if value is not None and not name.startswith("_"))
        names |= {name for name in settings if name not in _WITHOUT_EFFECT}
    return tuple(sorted(names))


@torch.no_grad()
def greedy(model: Lvlm, batch: Batch, most_tokens: int) -> list[list[int]]:
    """Return each row's greedy answer as tokens, without the token that ends it.

    Penalties, beams, n-gram rules, forced and suppressed tokens, sampling and every other setting of the checkpoint's
    generation configuration are left out; only its begin, end and padding tokens are used.

    Parameters
    ----------
    model
        The model.
    batch
        Prompts of equal shape.
    most_tokens
        Where an answer is cut off.

    Raises
    ------
    ModelError
        Where the logits of a step are not finite.
    """
    name = "decoder_input_ids" if model.encoder_decoder else "input_ids"
    with each_picture_once(model, batch.images), _plain_settings(model, most_tokens) as plain:
        out = model.hf.generate(**batch.inputs, generation_config=plain, logits_processor=[_finite(model)])
    ends = end_tokens(model)
    answers = []
    for row in out[:, batch.inputs[name].shape[1] :].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers


def _finite(model: Lvlm) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what looks at the logits of each step of `generate`: the largest of several NaN is the first token."""

    def check(_tokens: Tensor, logits: Tensor) -> Tensor:
        names = [f"row {row} of a batch" for row in range(len(logits))]
        check_finite(logits.float().logsumexp(-1), names, model.name)
        return logits

    return check


@contextmanager
def _plain_settings(model: Lvlm, most_tokens: int) -> Iterator[Any]:
    """Give every part of a model that generates the settings of greedy generation; restore its own afterwards.

    transformers fills what a call leaves open from the model's own settings, and some families generate with those of an
    inner language model: so both are replaced.
    """
    ids = _settings(model)
    ends = _ends(ids["eos_token_id"])
    pad = ids["pad_token_id"]
    ids["pad_token_id"] = pad if pad is not None else next(iter(ends), 0)
    parts = _generating(model)
    if not parts:
        msg = f"{model.name} has no generation_config: {type(model.hf).__name__} does not write text"
        raise ModelError(msg)
    before = [part.generation_config for part in parts]
    plain = type(before[0])(max_new_tokens=most_tokens, do_sample=False, num_beams=1, **ids)
    try:
        for part in parts:
            part.generation_config = plain
        yield plain
    finally:
        for part, own in zip(parts, before, strict=True):
            part.generation_config = own


def _generating(model: Lvlm) -> list[Any]:
    """Return the parts of a model that have generation settings, the model itself first."""
    return [module for module in model.hf.modules() if vars(module).get("generation_config") is not None]


def _settings(model: Lvlm) -> dict[str, Any]:
    """Return the special tokens of generation, from the first of model, inner language model and configurations."""
    config = model.hf.config
    sources = [*(part.generation_config for part in _generating(model)), config, getattr(config, "text_config", None)]
    found: dict[str, Any] = {}
    for name in _IDS:
        values = (getattr(source, name, None) for source in sources)
        found[name] = next((value for value in values if value is not None), None)
    return found


def _ends(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
