"""Attention computed step by step, which is the only way to read its pattern; and saying so."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvlm.model import Lvlm

_LOG = logging.getLogger(__name__)


def _configs(model: Lvlm) -> list[Any]:
    found: list[Any] = [m.config for m in model.hf.modules() if hasattr(m, "config")]
    return list({id(c): c for c in found if hasattr(c, "_attn_implementation")}.values())


def implementations(model: Lvlm) -> tuple[str, ...]:
    """Return the ways in which attention is computed, by transformers' names, sorted."""
    return tuple(sorted({str(config._attn_implementation) for config in _configs(model)}))


@contextmanager
def attention(model: Lvlm, name: str) -> Iterator[None]:
    """Let attention be computed in the way that transformers knows by a name; afterwards it is as it was."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def eager(model: Lvlm) -> Iterator[None]:
    """Let attention be computed step by step, so that its pattern can be read; afterwards it is as it was."""
    with attention(model, "eager"):
        yield


def say_eager(model: Lvlm) -> None:
    """Say that attention is about to be computed step by step, where it is not so already.

    A record of level WARNING of the logger ``lvlm.access.eager_attention``: Python shows it on standard error where
    nothing else is set up, every time, while a warning would be shown for the first of many calls alone.
    """
    usual = sorted({str(c._attn_implementation) for c in _configs(model)} - {"eager"})
    if usual:
        _LOG.warning(
            "an attention pattern was asked for: %s computes attention step by step (eager) for this call instead of %s; "
            "it needs more memory, and the last bits of all values differ",
            model.name,
            ", ".join(usual),
        )
