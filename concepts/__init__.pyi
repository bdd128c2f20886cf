"""Public names of `concepts`, each with the module that it comes from."""

from . import counterfactuals, loaders, scenes
from .annotated_object import AnnotatedObject, Box
from .combination import combine_datasets, dataset_parts
from .concept import Concept
from .counterfactual_pair import CounterfactualPair
from .image_captions import caption_images
from .image_files import BytesImage, FileImage
from .image_source import ImageSource, NoImage
from .mention import Mention
from .mention_labels import with_mentions
from .question import Question
from .run_length_masks import RunLengthMask
from .schema import ConceptDataset, Example

__all__ = [
    "AnnotatedObject",
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
    "caption_images",
    "combine_datasets",
    "counterfactuals",
    "dataset_parts",
    "loaders",
    "scenes",
    "with_mentions",
]
