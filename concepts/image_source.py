"""Where the image of an example comes from: anything that loads it, or no image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from groundscope.core.errors import DataError

if TYPE_CHECKING:
    from PIL import Image


class ImageSource(Protocol):
    """Source of one RGB image, which is decoded or drawn each time it is loaded.

    Any object with these two members can be the image of an example: `FileImage`, `BytesImage`, or a class of the user's own.
    Derive identities from pixels or from what determines them: images with equal identities are encoded once.

    Examples
    --------
    >>> from dataclasses import dataclass, replace
    >>> from PIL import Image
    >>> import groundscope as gs
    >>> @dataclass(frozen=True)
    ... class PlainImage:
    ...     color: str
    ...     @property
    ...     def identity(self):
    ...         return f"plain {self.color}"
    ...     def load(self):
    ...         return Image.new("RGB", (112, 112), self.color)
    >>> example = replace(gs.scenes.dataset(10)[0], image=PlainImage("red"))
    >>> model = gs.load_lvlm("tiny")
    >>> model.encode(example).tokens.length == model.encode(gs.scenes.dataset(10)[0]).tokens.length
    True
    """

    def load(self) -> Image.Image:
        """Return the RGB image; raises `DataError`, naming the file, if it cannot be read."""
        ...

    @property
    def identity(self) -> str:
        """Text that is equal for equal images, such as the description of a scene or the digest of a file."""
        ...


@dataclass(frozen=True)
class NoImage:
    """The image of an example without one: its question is asked without an image.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import groundscope as gs
    >>> from concepts import NoImage
    >>> example = replace(gs.scenes.dataset(10)[0], image=NoImage())
    >>> example.images
    ()
    """

    identity: str = "no image"

    def load(self) -> Image.Image:
        """Raise `DataError`: there is nothing to load."""
        msg = "an example without an image is used where an image is needed; leave it out: data.filter(lambda e: e.images)"
        raise DataError(msg)
