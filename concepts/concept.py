"""A concept: a property of an example, such as an object in its image, and the three levels of such properties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from groundscope.core.errors import DataError

Level = Literal["object", "attribute", "relation"]
LEVELS: tuple[Level, ...] = ("object", "attribute", "relation")


@dataclass(frozen=True, order=True)
class Concept:
    """A property of an example, written ``level:name``, or a free name for a property of the user's own.

    ``object:<noun>``
        The image contains the noun.
    ``attribute:<value>``
        The object of the question has this attribute; undefined if the object is not in the image.
    ``relation:<name>``
        The first object of the question has this relation to the second.
    ``<level>:named``
        The statement that the question asks about is true of the image, whatever objects or attributes it names.
    ``hallucinated``, ``scene:indoor``
        A concept without a level: a label column of the user's own, or one value of it (`concepts.loaders.table`).

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.Concept.parse("attribute:green")
    Concept(level='attribute', name='green')
    >>> str(gs.Concept("object", "apple"))
    'object:apple'
    >>> gs.Concept.parse("hallucinated")
    Concept(level='', name='hallucinated')
    """

    level: Level | Literal[""]
    """One of `LEVELS`; empty for a free name."""
    name: str

    def __str__(self) -> str:
        return f"{self.level}:{self.name}" if self.level else self.name

    @classmethod
    def parse(cls, text: str) -> Concept:
        """Parse ``level:name`` or a free name; raises `DataError` for an empty text and for a level without a name."""
        level, separator, name = text.partition(":")
        if level in LEVELS and name:
            return cls(level, name)
        if not text.strip() or (level in LEVELS and separator) or text.startswith(":"):
            levels = ", ".join(LEVELS)
            msg = (
                f"'{text}' is not a concept; write 'level:name', as in 'attribute:green' (levels: {levels}), or a name"
            )
            raise DataError(msg)
        return cls("", text)
