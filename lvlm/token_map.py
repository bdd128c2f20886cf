"""Roles of the tokens of an encoded prompt, and the pixels that each image token covers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from concepts.annotated_object import Box
from groundscope.core.errors import SiteError
from groundscope.core.short_repr import short_repr
from groundscope.core.text import nearest
from lvlm.sites import Stack
from lvlm.token_selection import TokenSelection

COVER = 0.25
"""A patch belongs to an object if the object's box covers at least this share of it."""


@dataclass(frozen=True)
class PatchGrid:
    """The grid of patches of one view of an image, in pixels of the original image.

    Examples
    --------
    >>> from concepts.annotated_object import Box
    >>> from lvlm import PatchGrid
    >>> grid = PatchGrid(rows=2, columns=3, patch=Box(0, 0, 16, 16))
    >>> grid.count, grid.box(4)
    (6, Box(x0=16, y0=16, x1=32, y1=32))
    >>> grid.patches(Box(16, 0, 48, 16))
    (1, 2)
    """

    rows: int
    columns: int
    patch: Box
    """Pixel box of the top-left patch; all patches have its size."""

    @property
    def count(self) -> int:
        """Number of patches."""
        return self.rows * self.columns

    def box(self, index: int) -> Box:
        """Return the pixel box of a patch; patches are counted row by row."""
        row, column = divmod(index, self.columns)
        width, height = self.patch.x1 - self.patch.x0, self.patch.y1 - self.patch.y0
        x, y = self.patch.x0 + column * width, self.patch.y0 + row * height
        return Box(x, y, x + width, y + height)

    def patches(self, box: Box) -> tuple[int, ...]:
        """Return the patches of an object's box: those covered to at least `COVER`, or else the one covered most.

        Empty if the box is outside the part of the image that the model receives.
        """
        covered = [(self.box(i).intersection(box) / self.box(i).area, i) for i in range(self.count)]
        inside = tuple(i for share, i in covered if share >= COVER)
        if inside:
            return inside
        share, best = max(covered, key=lambda pair: (pair[0], -pair[1]))
        return (best,) if share > 0 else ()

    def touching(self, box: Box) -> tuple[int, ...]:
        """Return every patch that overlaps a box."""
        return tuple(i for i in range(self.count) if self.box(i).intersection(box) > 0)


@dataclass(frozen=True)
class ImageView:
    """Tokens of one view of an image in one stack: of the whole image, of a tile, or of a thumbnail."""

    positions: tuple[int, ...]
    """Token positions row by row, counted from 0 in the stack's sequence for each example."""
    grid: PatchGrid | None
    """Pixels that the tokens cover; None for tokens without a place in the image, such as the queries of a Q-Former."""
    kind: Literal["view", "tile", "thumbnail"] = "view"
    """``view``: the whole image; ``tile``: a part of it; ``thumbnail``: the whole image in addition to its tiles."""
    image: int = 0
    """Index of the image in the prompt, counted from 0."""

    def __post_init__(self) -> None:
        if self.grid is not None and self.grid.count != len(self.positions):
            msg = f"a view of {len(self.positions)} tokens does not fit a grid of {self.grid.rows} x {self.grid.columns} patches"
            raise SiteError(msg)

    def positions_of(self, box: Box) -> tuple[int, ...]:
        """Return the positions of the tokens that belong to a pixel box; empty for tokens without a place in the image."""
        return () if self.grid is None else tuple(self.positions[p] for p in self.grid.patches(box))

    def shifted(self, offset: int, image: int) -> ImageView:
        """Return the view with its positions increased by `offset`, as a view of image number `image`."""
        if not offset and image == self.image:
            return self
        return replace(self, positions=tuple(p + offset for p in self.positions), image=image)


@dataclass(frozen=True)
class TokenMap:
    """Roles of the tokens of one encoded example; positions are counted from 0 in the sequence of each stack.

    Examples
    --------
    >>> from lvlm import TokenMap, TokenSelection
    >>> tokens = TokenMap(length=6, question=(3, 4), views={})
    >>> tokens.last, tokens.positions(TokenSelection.parse("question:all"))
    (5, (3, 4))
    """

    length: int
    """Number of prompt tokens of the decoder, those of the prefix included."""
    question: tuple[int, ...]
    """Positions of the question's own words; empty if an encoder reads the prompt."""
    views: Mapping[Stack, tuple[ImageView, ...]]
    """Views of the images by stack; only stacks whose sequence contains the image."""
    separators: tuple[int, ...] = ()
    """Positions of tokens that come with an image but are no part of it: row ends, tile names, brackets."""
    boxes: Mapping[str, tuple[int, Box]] = field(default_factory=dict)
    """Object id to the index of its image and its pixel box."""
    subject: str | None = None
    """Id of the object in question."""
    sequence: Mapping[Stack, int] = field(default_factory=dict)
    """Length of a stack's sequence where it is known: vision tokens of all views, with class tokens and padding."""
    generated: tuple[int, ...] | None = None
    """Positions of the tokens of the answer, the model's own or the true one, in order; None before an answer exists."""
    encoder: bool = False
    """Whether an encoder reads the prompt, so that neither the image nor the question is in the decoder's sequence."""
    prefix: tuple[int, ...] = ()
    """Positions of the prefix, the written start of the answer, at the end of the prompt; empty without one."""
    mentions: tuple[tuple[int, int], ...] = ()
    """First and last position of each object that the prefix mentions."""

    __repr__ = short_repr

    @property
    def image(self) -> tuple[int, ...]:
        """Positions of the image tokens in the decoder, view by view."""
        return tuple(p for view in self.views.get("decoder", ()) for p in view.positions)

    @property
    def suffix(self) -> tuple[int, ...]:
        """Positions after the last image token; all positions if the image is not in the decoder's sequence."""
        return tuple(range(max(self.image, default=-1) + 1, self.length))

    @property
    def grid(self) -> PatchGrid:
        """Grid of the image tokens in the decoder; raises `SiteError` if they have several views or no place in the image."""
        views = self.views.get("decoder", ())
        if len(views) != 1 or views[0].grid is None:
            why = f"they have {len(views)} views" if len(views) != 1 else "they have no place in the image"
            msg = f"the image tokens have no single grid: {why}; use TokenMap.views"
            raise SiteError(msg)
        return views[0].grid

    @cached_property
    def objects(self) -> Mapping[str, tuple[int, ...]]:
        """Object id to its tokens, as indices into `image`."""
        number = {position: i for i, position in enumerate(self.image)}
        return {name: tuple(number[p] for p in self._object_positions(name, "decoder")) for name in self.boxes}

    @property
    def last(self) -> int:
        """Position of the last token of prompt and prefix, where the answer is read."""
        return self.length - 1

    @property
    def system(self) -> tuple[int, ...]:
        """Positions before the image, without the first."""
        first = min((*self.image, *self.separators), default=0)
        return tuple(range(1, first))

    def object(self, name: str, stack: Stack = "decoder") -> tuple[int, ...]:
        """Return the positions of an object's image tokens; raises `SiteError` for an unknown id."""
        if name not in self.boxes:
            msg = f"unknown object '{name}'; choose from {', '.join(self.boxes) or 'none: the example has no boxes'}"
            raise SiteError(msg + nearest(name, self.boxes))
        return self._object_positions(name, stack)

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
        views = self.views.get(stack)
        if views is None:
            msg = f"token selection '{selection}' does not apply to the {stack}: the image is not in its sequence"
            raise SiteError(msg)
        if selection.role == "image":
            return tuple(p for view in views for p in view.positions)
        if views and all(view.grid is None for view in views):
            msg = (
                f"token selection '{selection}' does not apply to the {stack}: its image tokens have no place in the "
                "image; use 'image:mean'"
            )
            raise SiteError(msg)
        name = selection.name or self.subject
        return self._object_positions(name, stack) if name in self.boxes else ()

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
            case "prefix":
                return self.prefix
            case "mention":
                shift, end = {"before": (-1, 0), "first": (0, 0), "last": (0, 1)}[selection.name]
                return tuple(mention[end] + shift for mention in self.mentions)
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

    def _object_positions(self, name: str | None, stack: Stack) -> tuple[int, ...]:
        image, box = self.boxes[name or ""]
        return tuple(p for view in self.views.get(stack, ()) if view.image == image for p in view.positions_of(box))
