"""Public names of `lvlm`, each with the module that it comes from."""

from .answer_keys import AnswerKey, answer_key
from .family.registry import families
from .family.specification import FamilySpec, StackSpec
from .loading import load_lvlm, wrap_lvlm
from .model import Lvlm
from .sampling import Sampling
from .sites import Head, Site
from .token_map import PatchGrid, TokenMap
from .token_selection import TokenSelection

__all__ = [
    "AnswerKey",
    "FamilySpec",
    "Head",
    "Lvlm",
    "PatchGrid",
    "Sampling",
    "Site",
    "StackSpec",
    "TokenMap",
    "TokenSelection",
    "answer_key",
    "families",
    "load_lvlm",
    "wrap_lvlm",
]
