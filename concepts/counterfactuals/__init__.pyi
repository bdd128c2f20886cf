"""Public names of `concepts.counterfactuals`, each with its module."""

from .image_edits import EditedImage
from .methods import METHODS, PairMethod
from .pair_making import KINDS, PairMaker, balanced_pairs, check_kind, pairs, register
from .pair_set import PairSet
from .photographs.canvas import CanvasImage, on_canvas
from .photographs.inpaint import InpaintedImage
from .photographs.mirror import MirroredImage
from .photographs.recolor import RecoloredImage
from .word_pair import word_pair

__all__ = [
    "KINDS",
    "METHODS",
    "CanvasImage",
    "EditedImage",
    "InpaintedImage",
    "MirroredImage",
    "PairMaker",
    "PairMethod",
    "PairSet",
    "RecoloredImage",
    "balanced_pairs",
    "check_kind",
    "on_canvas",
    "pairs",
    "register",
    "word_pair",
]
