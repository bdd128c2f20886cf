"""Public names of `concepts.counterfactuals`, each with its module."""

from .image_edits import EditedImage
from .kinds import KINDS, PairMaker, balanced_pairs, pairs, register

__all__ = ["KINDS", "EditedImage", "PairMaker", "balanced_pairs", "pairs", "register"]
