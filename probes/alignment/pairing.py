"""The images that rows belong to, and permutations of whole images."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.permutations import LEAST_MOVABLE
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count


@dataclass(frozen=True, eq=False)
class ImageRows:
    """The image of each caption: rows of one image repeat its vector, next to different captions.

    Examples
    --------
    >>> from probes.alignment import ImageRows
    >>> rows = ImageRows.of(["cat.jpg", "dog.jpg", "cat.jpg"])
    >>> rows.image, rows.first
    (array([0, 1, 0]), array([0, 1]))
    """

    image: np.ndarray
    """int64 [N]: index of each row's image, in the order of first appearance."""

    __repr__ = short_repr

    @classmethod
    def of(cls, names: Iterable[Hashable]) -> ImageRows:
        """Index images by name."""
        number: dict[Hashable, int] = {}
        return cls(np.array([number.setdefault(name, len(number)) for name in names], dtype=np.int64))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.first)

    @cached_property
    def first(self) -> np.ndarray:
        """int64 [G]: the first row of each image."""
        return np.unique(self.image, return_index=True)[1]

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [G]: number of captions of each image."""
        return np.bincount(self.image)

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows by image [N], the start of each image among them [G], and the number of each row within its image [N]."""
        order = np.argsort(self.image, kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - starts[self.image[order]]
        return order, starts, rank

    def permutations(self, count: int, seed: int) -> list[np.ndarray]:
        """Return random permutations of images, int64 [G]: image g takes the captions of image ``result[g]``.

        Images exchange captions only with images that have as many, so that these permutations form a group and p-values
        are valid (`groundscope.core.permutations.exchange_groups`).

        Raises
        ------
        ProbeError
            If fewer than 10 images share their number of captions with another image.
        """
        strata = [np.flatnonzero(self.counts == n) for n in np.unique(self.counts)]
        movable = sum(len(s) for s in strata if len(s) > 1)
        if count and movable < LEAST_MOVABLE:
            msg = (
                f"{format_count(movable, 'image')} can exchange captions with another image that has as many; a permutation "
                f"test needs {LEAST_MOVABLE}: give more images, equally many captions of each, or permutations=0"
            )
            raise ProbeError(msg)
        rng = np.random.default_rng(seed)
        draws = []
        for _ in range(count):
            moved = np.empty(len(self), dtype=np.int64)
            for stratum in strata:
                moved[stratum] = rng.permutation(stratum)
            draws.append(moved)
        return draws

    def rows(self, moved: np.ndarray) -> np.ndarray:
        """Return for each row the row whose caption it takes, int64 [N], if image g takes the captions of ``moved[g]``."""
        order, starts, rank = self._sorted
        return order[starts[moved[self.image]] + rank]
