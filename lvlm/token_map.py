"""Which token of an encoded example is what, and which pixels a patch covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from concepts.schema import Box
from groundscope.core.errors import SiteError
from groundscope.core.short_repr import short_repr
from lvlm.sites import Stack
from lvlm.token_selection import TokenSelection

COVER = 0.25
"""A patch belongs to an object when the object's box covers at least this share of it."""


@dataclass(frozen=True)
class PatchGrid:
    """How the patches of one image, or of one tile of it, lie over its pixels."""

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

    def touching(self, box: Box) -> tuple[int, ...]:
        """Return every patch that shares any area with a box; together they cover what the model sees of it."""
        return tuple(i for i in range(self.count) if self.box(i).intersection(box) > 0)


@dataclass(frozen=True)
class Lattice:
    """Tokens of one view of an image in one stack, row by row."""

    positions: tuple[int, ...]
    """Positions in the stack's own sequence, counted from 0 for each example."""
    grid: PatchGrid | None
    """Where they lie over the image; None for tokens that have no place, as the queries of a Q-Former."""
    kind: Literal["view", "tile", "thumbnail"] = "view"
    """The whole image as it is, a part of it, or the whole of it beside its parts."""
    image: int = 0
    """Which image of the prompt, counted from 0."""

    def __post_init__(self) -> None:
        if self.grid is not None and self.grid.count != len(self.positions):
            msg = f"a lattice of {len(self.positions)} tokens does not fit a grid of {self.grid.rows} x {self.grid.columns}"
            raise SiteError(msg)

    def of(self, box: Box) -> tuple[int, ...]:
        """Return the positions of the tokens that belong to a pixel box; none where tokens have no place."""
        return () if self.grid is None else tuple(self.positions[p] for p in self.grid.patches(box))

    def moved(self, offset: int, image: int) -> Lattice:
        """Return the same view of another image, its positions moved."""
        if not offset and image == self.image:
            return self
        return replace(self, positions=tuple(p + offset for p in self.positions), image=image)


@dataclass(frozen=True)
class TokenMap:
    """Positions of one encoded example, counted from 0 in each stack's own sequence."""

    length: int
    """Tokens that the decoder reads before it answers."""
    question: tuple[int, ...]
    """Positions of the question's own words; none where an encoder reads them."""
    lattices: Mapping[Stack, tuple[Lattice, ...]]
    """Views of the images by stack; a stack in which the image is not is absent."""
    separators: tuple[int, ...] = ()
    """Positions that the image brings with it but that are no part of it: row ends, tile names, brackets."""
    boxes: Mapping[str, tuple[int, Box]] = field(default_factory=dict)
    """Object id to its image and its pixel box."""
    subject: str | None = None
    """The object the question is about."""
    sequence: Mapping[Stack, int] = field(default_factory=dict)
    """Length of a stack's sequence where it is known: vision tokens of all views, class tokens and padding included."""
    generated: tuple[int, ...] | None = None
    """Positions of the tokens of the answer, the model's own or one put there, in their order; None before there is one."""
    encoder: bool = False
    """Whether an encoder reads the prompt, so that the decoder has neither the image nor the question."""

    __repr__ = short_repr

    @property
    def image(self) -> tuple[int, ...]:
        """Positions of the image's tokens in the decoder, view after view."""
        return tuple(p for lattice in self.lattices.get("decoder", ()) for p in lattice.positions)

    @property
    def suffix(self) -> tuple[int, ...]:
        """Positions after the image; all where the image is not in the decoder's sequence, whose every token may see it."""
        return tuple(range(max(self.image, default=-1) + 1, self.length))

    @property
    def grid(self) -> PatchGrid:
        """Where the image's tokens lie; raises `SiteError` where they lie in several views, or nowhere."""
        views = self.lattices.get("decoder", ())
        if len(views) != 1 or views[0].grid is None:
            why = f"they lie in {len(views)} views" if len(views) != 1 else "they have no place in the image"
            msg = f"the image's tokens have no one grid: {why}; see TokenMap.lattices"
            raise SiteError(msg)
        return views[0].grid

    @cached_property
    def objects(self) -> Mapping[str, tuple[int, ...]]:
        """Object id to its tokens, as numbers into `image`."""
        number = {position: i for i, position in enumerate(self.image)}
        return {name: tuple(number[p] for p in self._of(name, "decoder")) for name in self.boxes}

    @property
    def last(self) -> int:
        """Position of the last prompt token, where the answer is read."""
        return self.length - 1

    @property
    def system(self) -> tuple[int, ...]:
        """Positions before the image, without the first."""
        first = min((*self.image, *self.separators), default=0)
        return tuple(range(1, first))

    def object(self, name: str, stack: Stack = "decoder") -> tuple[int, ...]:
        """Return the positions of an object's image tokens; raises `SiteError` for an unknown id."""
        if name not in self.boxes:
            msg = f"no object '{name}' in this example: there are {', '.join(self.boxes) or 'none'}"
            raise SiteError(msg)
        return self._of(name, stack)

    def positions(self, selection: TokenSelection, stack: Stack = "decoder") -> tuple[int, ...]:
        """Return the positions of a selection in a stack's sequence; empty if the example has none.

        Only ``image`` and ``object`` apply to the vision tower and the projector.

        Raises
        ------
        SiteError
            If the selection does not apply to the stack, or a listed position is out of range.
        """
        if selection.role in {"image", "object"}:
            return self._image_positions(selection, stack)
        if stack != "decoder":
            msg = f"token selection '{selection}' does not apply to the {stack}; use 'image:mean' or 'object:mean'"
            raise SiteError(msg)
        positions = self._text_positions(selection)
        return (*positions, *(self.generated or ())) if selection.generated else positions

    def _image_positions(self, selection: TokenSelection, stack: Stack) -> tuple[int, ...]:
        views = self.lattices.get(stack)
        if not views:
            msg = f"token selection '{selection}' does not apply to the {stack}: the image is not in its sequence"
            raise SiteError(msg)
        if selection.role == "image":
            return tuple(p for lattice in views for p in lattice.positions)
        if all(lattice.grid is None for lattice in views):
            msg = (
                f"token selection '{selection}' does not apply to the {stack}: its image tokens have no place in the "
                "image; use 'image:mean'"
            )
            raise SiteError(msg)
        name = selection.name or self.subject
        return self._of(name, stack) if name in self.boxes else ()

    def _text_positions(self, selection: TokenSelection) -> tuple[int, ...]:
        role = selection.role
        if self.encoder and role in {"question", "system"}:
            msg = f"token selection '{selection}' does not apply to the decoder: an encoder reads the prompt"
            raise SiteError(msg)
        match role:
            case "last":
                return (self.last,)
            case "bos":
                return (0,)
            case "all":
                return (*range(self.length), *(self.generated or ()))
            case "question":
                return self.question
            case "suffix":
                return self.suffix
            case "system":
                return self.system
            case "positions":
                outside = [position for position in selection.indices if position >= self.length]
                if outside:
                    msg = f"position {outside[0]} is out of range: the prompt has positions 0-{self.length - 1}"
                    raise SiteError(msg)
                return selection.indices
        if self.generated is None:
            msg = f"token selection '{selection}' is not available before an answer is generated"
            raise SiteError(msg)
        return self.generated if selection.step is None else self.generated[selection.step : selection.step + 1]

    def _of(self, name: str | None, stack: Stack) -> tuple[int, ...]:
        image, box = self.boxes[name or ""]
        return tuple(p for lattice in self.lattices.get(stack, ()) if lattice.image == image for p in lattice.of(box))
