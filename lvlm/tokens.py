"""Which token of an encoded example is what, and which pixels a patch covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from concepts.errors import SiteError
from concepts.schema import Box
from lvlm.sites import Stack, TokenSelection

COVER = 0.25
"""A patch belongs to an object when the object's box covers at least this share of it."""


@dataclass(frozen=True)
class PatchGrid:
    """How the patches of one image lie over its pixels."""

    rows: int
    columns: int
    patch: Box
    """Pixel box of the top-left patch in the original image; the others follow at its width and height."""

    @property
    def count(self) -> int:
        """Number of patches."""
        return self.rows * self.columns

    def box(self, index: int) -> Box:
        """Return the pixel box of a patch, counted row by row."""
        row, column = divmod(index, self.columns)
        width, height = self.patch.x1 - self.patch.x0, self.patch.y1 - self.patch.y0
        x, y = self.patch.x0 + column * width, self.patch.y0 + row * height
        return Box(x, y, x + width, y + height)

    def patches(self, box: Box) -> tuple[int, ...]:
        """Return the patches that belong to a box: covered by at least `COVER`, or else the one covered most.

        Empty where the box lies wholly outside the image the model sees.
        """
        covered = [(self.box(i).intersection(box) / self.box(i).area, i) for i in range(self.count)]
        inside = tuple(i for share, i in covered if share >= COVER)
        if inside:
            return inside
        share, best = max(covered, key=lambda pair: (pair[0], -pair[1]))
        return (best,) if share > 0 else ()


@dataclass(frozen=True)
class TokenMap:
    """Positions of one encoded example, counted from 0 in the decoder's sequence."""

    length: int
    image: tuple[int, ...]
    """Positions of the image tokens, in patch order."""
    question: tuple[int, ...]
    """Positions of the question's own words."""
    grid: PatchGrid
    vision_prefix: int
    """Tokens of the vision tower before its first patch."""
    objects: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Object id to its patches, counted from 0."""
    subject: str | None = None
    """The object the question is about."""

    @property
    def last(self) -> int:
        """Position of the last prompt token, where the answer is read."""
        return self.length - 1

    @property
    def system(self) -> tuple[int, ...]:
        """Positions before the image, without the first."""
        return tuple(range(1, self.image[0])) if self.image else ()

    def object(self, name: str) -> tuple[int, ...]:
        """Return the decoder positions of an object's image tokens; raises `SiteError` for an unknown id."""
        if name not in self.objects:
            msg = f"no object '{name}' in this example: there are {', '.join(self.objects) or 'none'}"
            raise SiteError(msg)
        return tuple(self.image[p] for p in self.objects[name])

    def positions(self, selection: TokenSelection, stack: Stack = "decoder") -> tuple[int, ...]:
        """Return the positions a selection means in a stack's own sequence; empty where the example has none.

        In the vision tower and the projector only ``image`` and ``object`` mean anything.

        Raises
        ------
        SiteError
            For a role that the stack does not have.
        """
        role = selection.role
        if role in {"image", "object"}:
            patches = range(self.grid.count) if role == "image" else self.objects.get(self.subject or "", ())
            if stack == "decoder":
                return tuple(self.image[p] for p in patches)
            offset = self.vision_prefix if stack == "vision" else 0
            return tuple(p + offset for p in patches)
        if stack != "decoder":
            msg = f"token selection '{selection}' means nothing in the {stack}: use 'image:mean' or 'object:mean'"
            raise SiteError(msg)
        match role:
            case "last":
                return (self.last,)
            case "bos":
                return (0,)
            case "question":
                return self.question
            case "system":
                return self.system
            case _:
                msg = f"token selection '{selection}' is not available before an answer is generated"
                raise SiteError(msg)
