"""The rows and key columns of a forward pass: which row belongs to which branch, and which columns are image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowLayout:
    """What the rows and the key columns of one forward pass of the decoder are.

    While `lvlm.decoding` runs a forward pass, `Lvlm.row_layout` is its layout. Edits of attention read it, because rows of
    prompts and of branches share a pass after the prefill, and shorter rows begin with padding.

    Examples
    --------
    >>> import torch
    >>> from lvlm.decoding.row_layout import RowLayout
    >>> image = torch.tensor([[False, True, True, False, False]])
    >>> layout = RowLayout(torch.tensor([0]), image, torch.ones_like(image), prompt=4)
    >>> layout.after_image.int().tolist(), layout.before_image.int().tolist()
    ([[0, 0, 0, 1, 1]], [[1, 0, 0, 0, 0]])
    """

    branch: Tensor
    """Branch of each row, int ``[rows]``: 0 for the prompts themselves, ``k`` for the k-th branch."""
    image: Tensor
    """Which columns are image tokens, bool ``[rows, columns]``; columns are those of the keys, cached ones included."""
    valid: Tensor
    """Which columns are tokens of the row and not padding before it, bool ``[rows, columns]``."""
    prompt: int
    """Number of columns of the prompts; columns after them are generated tokens."""
    marks: dict[str, Tensor] = field(default_factory=dict)
    """What edits remember of columns, by name, bool ``[rows, columns]``; it follows the rows and columns into later passes."""

    @property
    def generated(self) -> Tensor:
        """Which columns are generated tokens, bool ``[rows, columns]``."""
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        return self.valid & (columns >= self.prompt)

    @property
    def before_image(self) -> Tensor:
        """Which columns are tokens before the first image token, bool ``[rows, columns]``; none in rows without an image."""
        return self.valid & (self.image.cumsum(1) == 0) & self.image.any(1, keepdim=True)

    @property
    def after_image(self) -> Tensor:
        """Which columns are tokens after the last image token, bool ``[rows, columns]``; all in rows without an image."""
        return self.valid & (self.image.flip(1).cumsum(1).flip(1) == 0)

    def with_column(self) -> RowLayout:
        """Return the layout after one more generated token in each row."""
        end = self.valid.new_ones(len(self.valid), 1)

        def longer(mask: Tensor) -> Tensor:
            return torch.cat([mask, ~end], dim=1)

        marks = {name: longer(mask) for name, mask in self.marks.items()}
        return RowLayout(self.branch, longer(self.image), torch.cat([self.valid, end], dim=1), self.prompt, marks)

    def without_columns(self, count: int) -> RowLayout:
        """Return the layout before the last `count` columns."""
        end = self.valid.shape[1] - count
        marks = {name: mask[:, :end] for name, mask in self.marks.items()}
        return RowLayout(self.branch, self.image[:, :end], self.valid[:, :end], min(self.prompt, end), marks)

    def selected(self, rows: Tensor) -> RowLayout:
        """Return the layout of some rows, int ``[n]``, in their order."""
        marks = {name: mask[rows] for name, mask in self.marks.items()}
        return RowLayout(self.branch[rows], self.image[rows], self.valid[rows], self.prompt, marks)


def stack_layouts(layouts: Sequence[RowLayout]) -> RowLayout:
    """Return the layout of several prefills as the rows of one batch, padded at their beginnings to equal length."""
    length = max(layout.prompt for layout in layouts)

    def padded(mask: Tensor) -> Tensor:
        return torch.nn.functional.pad(mask, (length - mask.shape[1], 0))

    names = {name for layout in layouts for name in layout.marks}
    marks = {
        name: torch.cat([padded(layout.marks.get(name, torch.zeros_like(layout.valid))) for layout in layouts])
        for name in names
    }
    return RowLayout(
        torch.cat([layout.branch for layout in layouts]),
        torch.cat([padded(layout.image) for layout in layouts]),
        torch.cat([padded(layout.valid) for layout in layouts]),
        length,
        marks,
    )
