"""Public names of `concepts.scenes`, each with its module."""

from . import questions
from .scene import Scene
from .splits import SPLITS, dataset

__all__ = ["SPLITS", "Scene", "dataset", "questions"]
