"""Read and check the images of the examples to trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from activation_store.tracing.example_table import picture_digest
from concepts.image_source import ImageSource
from concepts.schema import Example
from groundscope.core.errors import DataError
from groundscope.core.progress import step_bar

if TYPE_CHECKING:
    from PIL import Image

    from lvlm.model import Encoding, Lvlm


def check_images(examples: Sequence[Example], *, progress: bool | None) -> dict[str, str]:
    """Return the digest of each example's image by example id; each image is read once, before any forward pass.

    Several digests are joined by commas; without an image the text is empty.

    Raises
    ------
    DataError
        If an image cannot be read; the message names the first such example.
    """
    identities = [[image.identity for image in e.images] for e in examples]
    first = {
        image.identity: (image, e) for e in reversed(examples) for image in reversed(e.images)
    }  # the first example of each image
    digests: dict[str, str] = {}
    with step_bar("checking images", len(first), show=progress) as advance:
        for identity, (image, example) in reversed(first.items()):
            digests[identity] = picture_digest(_load(image, example))
            advance()
    return {e.id: ",".join(digests[i] for i in own) for e, own in zip(examples, identities, strict=True)}


def unreadable_images(examples: Sequence[Example], *, progress: bool | None) -> dict[str, str]:
    """Return the error message for each example whose image cannot be read, by example id."""
    reasons: dict[str, str] = {}
    problems: dict[str, str] = {}
    with step_bar("checking images", len(examples), show=progress) as advance:
        for example in examples:
            for image in example.images:
                identity = image.identity
                if identity not in problems:
                    try:
                        _load(image, example)
                        problems[identity] = ""
                    except DataError as error:
                        problems[identity] = str(error.__cause__ or error).splitlines()[0]
                if problems[identity]:
                    reasons.setdefault(example.id, problems[identity])
            advance()
    return reasons


def _load(image: ImageSource, example: Example) -> Image.Image:
    try:
        return image.load()
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all of them for files it cannot decode
        msg = f"example '{example.id}': its image cannot be read: {error}; repair it, remove the example, or set on_error='skip'"
        raise DataError(msg) from error


def encode_first(model: Lvlm, example: Example) -> Encoding:
    """Encode an example; raise `DataError`, which names it, if its image cannot be read."""
    for image in example.images:
        _load(image, example)
    return model.encode(example)
