"""Public names of `concepts`, each with the module that it comes from."""

from . import counterfactuals, loaders, scenes
from .schema import Box, Concept, ConceptDataset, CounterfactualPair, Example, Question, SceneObject

__all__ = [
    "Box",
    "Concept",
    "ConceptDataset",
    "CounterfactualPair",
    "Example",
    "Question",
    "SceneObject",
    "counterfactuals",
    "loaders",
    "scenes",
]
