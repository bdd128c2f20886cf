"""The model under study: where its tensors are, which token is what, and how to ask it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lvlm.answers import AnswerKey, answer_key
    from lvlm.family.specification import FamilySpec, StackSpec
    from lvlm.loading import load_lvlm, wrap_lvlm
    from lvlm.model import Lvlm
    from lvlm.sites import Head, Site, TokenSelection
    from lvlm.token_map import PatchGrid, TokenMap

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
    "AnswerKey": "lvlm.answers",
    "FamilySpec": "lvlm.family.specification",
    "Head": "lvlm.sites",
    "Lvlm": "lvlm.model",
    "PatchGrid": "lvlm.token_map",
    "Site": "lvlm.sites",
    "StackSpec": "lvlm.family.specification",
    "TokenMap": "lvlm.token_map",
    "TokenSelection": "lvlm.sites",
    "answer_key": "lvlm.answers",
    "load_lvlm": "lvlm.loading",
    "wrap_lvlm": "lvlm.loading",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        msg = f"module 'lvlm' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
