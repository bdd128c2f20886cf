"""Eager attention: attention patterns exist only if attention is computed step by step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lvlm.access.replaced_attention import replace_usual, usual_name
from lvlm.interfaces import Model

_LOG = logging.getLogger(__name__)


def implementations(model: Model) -> tuple[str, ...]:
    """Return the attention implementations in use, by transformers' names, sorted."""
    return tuple(sorted({str(usual_name(config._attn_implementation)) for config in _configs(model)}))


@contextmanager
def attention(model: Model, name: str) -> Iterator[None]:
    """Use an attention implementation, by transformers' name, while the context is open; edits of attention stay active."""
    configs = _configs(model)
    before = [str(usual_name(config._attn_implementation)) for config in configs]
    _configure(configs, [name] * len(configs))
    try:
        yield
    finally:
        _configure(configs, before)


@contextmanager
def eager(model: Model) -> Iterator[None]:
    """Compute attention step by step while the context is open, so that its pattern can be read."""
    with attention(model, "eager"):
        yield


def warn_of_eager(model: Model) -> None:
    """Log a warning that attention will be computed step by step, unless it already is.

    A record of the logger ``lvlm.access.eager_attention``: a Python warning would appear only for the first of many calls.
    """
    usual = sorted({*implementations(model)} - {"eager"})
    if usual:
        _LOG.warning(
            "attention patterns are requested: for this call %s computes attention step by step (eager) instead of %s, "
            "which needs more memory and changes the last bits of all values",
            model.name,
            ", ".join(usual),
        )


def _configure(configs: Sequence[Any], names: Sequence[str]) -> None:
    # transformers sets parts of a configuration too, so all names are determined first, and parts are set after the whole.
    new = [replace_usual(c._attn_implementation, name) for c, name in zip(configs, names, strict=True)]
    for config, name in zip(configs, new, strict=True):
        config._attn_implementation = name


def _configs(model: Model) -> list[Any]:
    configs: list[Any] = [m.config for m in model.hf.modules() if hasattr(m, "config")]
    return list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())
