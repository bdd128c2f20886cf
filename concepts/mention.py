"""A mention: the words of a written text that name an object."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mention:
    """Words of a written text that name an object.

    Examples
    --------
    >>> import groundscope as gs
    >>> text = "A cat and a hot dog."
    >>> mention = gs.Mention("hot dog", 12, 19, present=False)
    >>> text[mention.start : mention.stop], mention.present
    ('hot dog', False)
    """

    noun: str
    """The object."""
    start: int
    """First character in the text (`Example.prefix`)."""
    stop: int
    """One after its last character."""
    present: bool | None = None
    """Whether the object is in the image; False: hallucinated; None: unknown."""
