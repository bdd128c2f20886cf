"""Types shared by a loaded model and the code that encodes images for it, reads it and generates with it.

`lvlm.model.Lvlm` implements `Model`. Code below it takes a `Model`, so that no module imports the one that imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from lvlm.family.specification import FamilySpec
from lvlm.sites import Stack
from lvlm.token_map import ImageView

if TYPE_CHECKING:
    from PIL import Image


class Model(Protocol):
    """What a loaded model provides to the code below `lvlm.model.Lvlm`."""

    name: str
    """Name in messages and results."""
    hf: Any
    """The Hugging Face model."""
    processor: Any
    """Its processor, with a tokenizer and an image processor."""
    spec: FamilySpec
    image_encoding: ImageEncoding
    encoder_decoder: bool
    """Whether an encoder reads the prompt."""
    n_heads: int
    """Attention heads of a decoder layer."""
    n_vision_heads: int
    """Attention heads of a vision layer."""
    ends: bool
    """Whether end tokens end an answer; False to measure the cost of answers of equal length."""

    @property
    def placeholder(self) -> str:
        """Text that stands for an image in a prompt."""
        ...

    @property
    def content_id(self) -> int:
        """Id of the image token, whose embeddings are replaced by those of the image."""
        ...

    @property
    def content_token(self) -> str:
        """Text of the image token."""
        ...

    @property
    def accepts(self) -> frozenset[str]:
        """Names of the arguments of the model's forward method."""
        ...

    @property
    def tower(self) -> nn.Module | None:
        """The vision tower."""
        ...

    def layers(self, stack: str) -> tuple[nn.Module, ...]:
        """Return the layers of a stack."""
        ...

    def attends(self, stack: str, layer: int, *, cross: bool) -> bool:
        """Whether a layer has self-attention, or cross-attention."""
        ...


@dataclass(frozen=True)
class EncodedImage:
    """One image as inputs of a model."""

    text: str
    """Text that replaces the image's placeholder in the prompt: one image token for each token of the image."""
    inputs: Mapping[str, Tensor]
    """Model inputs by name."""
    views: Mapping[Stack, tuple[ImageView, ...]]
    """Views of the image by stack. Decoder positions count the tokens selected by `ImageEncoding.image_token_mask`, other
    positions count the stack's sequence."""
    sequence: Mapping[Stack, int] = field(default_factory=dict)
    """Length of the image's sequence in each stack except the decoder."""


@dataclass(frozen=True)
class ImageEncoding:
    """How a family turns images into tokens; `lvlm.encoding.registry.image_encodings` lists them by name."""

    encode: Callable[[Model, Image.Image], EncodedImage]
    """Encodes one image."""
    axis: int = 0
    """Axis along which the pixels of several images of one prompt are concatenated."""
    extra_inputs: Callable[[Model, list[int], Sequence[EncodedImage], str], dict[str, Tensor]] | None = None
    """Returns further model inputs from the prompt's token ids, its images and its text."""
    separable: bool = True
    """Whether the vision tower receives a batch of prompts with one image each as equal parts along the first axis, processes
    them independently, and returns them in order; required by `lvlm.access.shared_vision_run`."""
    pads: bool = False
    """Whether images of different shapes can share a prompt, padded with zeros that the model ignores."""
    runs_without_image: bool = True
    """Whether the model's forward pass runs without an image."""
    image_token_mask: Callable[[Model, Mapping[str, Any]], Tensor] | None = None
    """Returns which tokens of a forward pass are image tokens, bool ``[rows, positions]``, from the model's inputs; None if
    the image is not in the decoder's sequence. Called by `lvlm.image_tokens`."""
