"""Public names of `concepts`, each with the module that it comes from."""

from . import counterfactuals, loaders, scenes
from .combination import combine_datasets, dataset_parts
from .concept import Concept
from .image_files import BytesImage, FileImage
from .mention import Mention
from .mention_labels import with_mentions
from .run_length_masks import RunLengthMask
from .schema import (
    Box,
    ConceptDataset,
    CounterfactualPair,
    Example,
    ImageSource,
    NoImage,
    Question,
    SceneObject,
)

__all__ = [
    "Box",
    "BytesImage",
    "Concept",
    "ConceptDataset",
    "CounterfactualPair",
    "Example",
    "FileImage",
    "ImageSource",
    "Mention",
    "NoImage",
    "Question",
    "RunLengthMask",
    "SceneObject",
    "combine_datasets",
    "counterfactuals",
    "dataset_parts",
    "loaders",
    "scenes",
    "with_mentions",
]
