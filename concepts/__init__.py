"""What a model is shown: scenes, questions, counterfactual pairs, and loaders of people's own data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concepts import counterfactuals, loaders, questions, scenes
    from concepts.schema import Box, Concept, ConceptDataset, CounterfactualPair, Example, Question, SceneObject
    from groundscope.core.errors import GroundscopeError

__all__ = [
    "Box",
    "Concept",
    "ConceptDataset",
    "CounterfactualPair",
    "Example",
    "GroundscopeError",
    "Question",
    "SceneObject",
    "counterfactuals",
    "loaders",
    "questions",
    "scenes",
]

_MODULES = ("counterfactuals", "loaders", "questions", "scenes")


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"concepts.{name}")
    if name not in __all__:
        msg = f"module 'concepts' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module("groundscope.core.errors" if name == "GroundscopeError" else "concepts.schema"), name)
