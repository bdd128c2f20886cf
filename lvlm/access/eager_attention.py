"""Eager attention: attention patterns exist only if attention is computed step by step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lvlm.interfaces import Model

_LOG = logging.getLogger(__name__)


def implementations(model: Model) -> tuple[str, ...]:
    """Return the attention implementations in use, by transformers' names, sorted."""
    return tuple(sorted({str(config._attn_implementation) for config in _configs(model)}))


@contextmanager
def attention(model: Model, name: str) -> Iterator[None]:
    """Use an attention implementation, by transformers' name, while the context is open."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def eager(model: Model) -> Iterator[None]:
    """Compute attention step by step while the context is open, so that its pattern can be read."""
    with attention(model, "eager"):
        yield


def warn_of_eager(model: Model) -> None:
    """Log a warning that attention will be computed step by step, unless it already is.

    A record of the logger ``lvlm.access.eager_attention``: a Python warning would appear only for the first of many calls.
    """
    usual = sorted({str(c._attn_implementation) for c in _configs(model)} - {"eager"})
    if usual:
        _LOG.warning(
            "attention patterns are requested: for this call %s computes attention step by step (eager) instead of %s, "
            "which needs more memory and changes the last bits of all values",
            model.name,
            ", ".join(usual),
        )


def _configs(model: Model) -> list[Any]:
    configs: list[Any] = [m.config for m in model.hf.modules() if hasattr(m, "config")]
    return list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())
