"""The model under study: where its tensors are, which token is what, and how to ask it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lvlm.answers import AnswerKey, answer_key
    from lvlm.family import FamilySpec, StackSpec
    from lvlm.loading import load_lvlm, wrap_lvlm
    from lvlm.model import Lvlm
    from lvlm.sites import Head, Site, TokenSelection
    from lvlm.tokens import PatchGrid, TokenMap

__all__ = [
    "AnswerKey",
    "FamilySpec",
    "Head",
    "Lvlm",
    "PatchGrid",
    "Site",
    "StackSpec",
    "TokenMap",
    "TokenSelection",
    "answer_key",
    "load_lvlm",
    "wrap_lvlm",
]

_HOME = {
    "AnswerKey": "answers",
    "answer_key": "answers",
    "FamilySpec": "family",
    "StackSpec": "family",
    "load_lvlm": "loading",
    "wrap_lvlm": "loading",
    "Lvlm": "model",
    "Head": "sites",
    "Site": "sites",
    "TokenSelection": "sites",
    "PatchGrid": "tokens",
    "TokenMap": "tokens",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that ``lvlm.sites`` alone needs no model stack."""
    from importlib import import_module

    if name not in _HOME:
        msg = f"module 'lvlm' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(f"lvlm.{_HOME[name]}"), name)
