"""Greedy generation: at each step the token with the largest logit, regardless of the checkpoint's generation settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from groundscope.core.errors import ModelError
from lvlm.access.shared_vision_run import share_vision_runs
from lvlm.finite_logits import check_finite
from lvlm.interfaces import Model

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Generation settings of a checkpoint that are used: the tokens that begin, end and pad an answer."""

_WITHOUT_EFFECT = {
    *_IDS,
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"),
    *("max_length", "max_new_tokens", "use_cache", "cache_implementation", "cache_config", "transformers_version"),
    *("num_return_sequences", "early_stopping", "length_penalty", "num_beam_groups", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
}
"""Settings that do not change greedy answers: of sampling, length, cache and output, and of beams with a single beam."""


Processor = Callable[[Tensor, Tensor], Tensor]
"""Function of the tokens so far ``[B, T]`` and the logits ``[B, V]`` that returns new logits."""


def end_tokens(model: Model) -> frozenset[int]:
    """Return the tokens that end an answer; empty if the model has none."""
    return frozenset(_ends(_special_tokens(model)["eos_token_id"])) if model.ends else frozenset()


def ignored_settings(model: Model) -> tuple[str, ...]:
    """Return the names of the generation settings that would change greedy answers; `greedy` ignores them."""
    names: set[str] = set()
    for part in _modules_with_settings(model):
        changed = part.generation_config.to_diff_dict()
        settings = (name for name, value in changed.items() if value is not None and not name.startswith("_"))
        names |= {name for name in settings if name not in _WITHOUT_EFFECT}
    return tuple(sorted(names))


@torch.no_grad()
def greedy(
    model: Model,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    *,
    images: Sequence[str] = (),
    choose: Processor | None = None,
) -> list[list[int]]:
    """Return each row's greedy answer as token ids, up to the end token or a placeholder of an image.

    Penalties, beams, n-gram rules, forced and suppressed tokens, sampling and all other settings of the checkpoint's
    generation configuration are ignored; only its begin, end and padding tokens are used.

    Parameters
    ----------
    model
        The model.
    inputs
        Model inputs of prompts of equal shape, on the model's device.
    max_new_tokens
        Largest number of tokens of an answer.
    images
        Identity of each row's image; rows with equal ones share one run of the vision tower.
    choose
        Logits processor after which the most likely token is the next one, such as that of `lvlm.sampling.Sampling`.

    Raises
    ------
    ModelError
        If the logits of a step are not finite.
    """
    name = "decoder_input_ids" if model.encoder_decoder else "input_ids"
    processors = [_finite_check(model), *([] if choose is None else [choose])]
    with share_vision_runs(model, images), _greedy_settings(model, max_new_tokens) as settings:
        out = model.hf.generate(**inputs, generation_config=settings, logits_processor=processors)
    # A placeholder of an image is no text (only an untrained model writes one): in a later forward pass over the answer,
    # transformers would look for the pixels of one more image.
    ends = end_tokens(model) | ({model.content_id} if model.ends else set())
    answers = []
    for row in out[:, inputs[name].shape[1] :].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers


def _finite_check(model: Model) -> Processor:
    """Return a logits processor that raises for logits that are not finite: argmax of NaN would return token 0."""

    def check(_tokens: Tensor, logits: Tensor) -> Tensor:
        names = [f"row {row} of a batch" for row in range(len(logits))]
        check_finite(logits.float().logsumexp(-1), names, model.name)
        return logits

    return check


@contextmanager
def _greedy_settings(model: Model, max_new_tokens: int) -> Iterator[Any]:
    """Set greedy generation on every module with generation settings while the context is open; yield the settings.

    transformers takes defaults of a call from the model's settings, and some families generate with those of an inner
    language model, so both are replaced.
    """
    ids = _special_tokens(model)
    ends = _ends(ids["eos_token_id"])
    pad = ids["pad_token_id"]
    ids["pad_token_id"] = pad if pad is not None else next(iter(ends), 0)
    if not model.ends:
        ids["eos_token_id"] = None
    parts = _modules_with_settings(model)
    if not parts:
        msg = f"{model.name} has no generation_config: {type(model.hf).__name__} cannot generate; load a class that can"
        raise ModelError(msg)
    before = [part.generation_config for part in parts]
    settings = type(before[0])(max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **ids)
    try:
        for part in parts:
            part.generation_config = settings
        yield settings
    finally:
        for part, original in zip(parts, before, strict=True):
            part.generation_config = original


def _modules_with_settings(model: Model) -> list[Any]:
    """Return the modules of a model that have generation settings, the model itself first."""
    return [module for module in model.hf.modules() if vars(module).get("generation_config") is not None]


def _special_tokens(model: Model) -> dict[str, Any]:
    """Return the special tokens of generation, from the first source that sets them: model, inner model, configurations."""
    config = model.hf.config
    modules = _modules_with_settings(model)
    sources = [*(part.generation_config for part in modules), config, getattr(config, "text_config", None)]
    ids: dict[str, Any] = {}
    for name in _IDS:
        values = (getattr(source, name, None) for source in sources)
        ids[name] = next((value for value in values if value is not None), None)
    return ids


def _ends(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
