"""Masks of objects as run lengths, in COCO's compressed and uncompressed form.

COCO (Lin et al. 2014, arXiv 1405.0312) numbers the pixels of an image column by column, and stores the lengths of runs that are
alternately outside and inside the object; the first run is outside and may be empty. Its compressed form writes each length
as a number with sign in base 32, low digits first, one character a digit: character ``48 + digit``, plus 32 if more digits
follow; from the fourth length on, the difference to the length two before (`maskApi.c` of COCO's API).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from groundscope.core.errors import DataError

LARGEST_SIDE = 1 << 16
"""Largest width or height of a mask in pixels."""
_DIGIT, _MORE, _SIGN = 31, 32, 16
_LARGEST_DIGITS = 7
"""Most characters of one length: 35 bits, more than the pixels of the largest mask."""


@dataclass(frozen=True, slots=True)
class RunLengthMask:
    """The pixels of one object in an image of a certain size; false for an empty mask.

    Raises
    ------
    DataError
        For a width or height that is not from 1 to `LARGEST_SIDE`, and for counts that are not in the compressed form or whose
        sum is not the number of pixels.

    Examples
    --------
    >>> import groundscope as gs
    >>> mask = gs.RunLengthMask.from_runs(3, 2, [1, 2, 3])
    >>> mask
    RunLengthMask(width=3, height=2, counts='123')
    >>> mask.pixels().astype(int)
    array([[0, 1, 0],
           [1, 0, 0]])
    >>> gs.RunLengthMask.from_pixels(mask.pixels()) == mask, bool(mask)
    (True, True)
    """

    width: int
    """Width of the image in pixels."""
    height: int
    counts: str
    """The compressed form of the run lengths."""

    def __post_init__(self) -> None:
        for name, side in (("width", self.width), ("height", self.height)):
            if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= LARGEST_SIDE:
                msg = f"the {name} of a mask is {str(side)[:40]}; it must be a whole number from 1 to {LARGEST_SIDE}"
                raise DataError(msg)
        # Decoded once here, so that no later use fails.
        runs = decode_runs(self.counts)
        if min(runs, default=0) < 0 or sum(runs) != self.width * self.height:
            msg = (
                f"the run lengths of a mask sum to {sum(runs)} with the shortest {min(runs, default=0)}; they must not be "
                f"negative and sum to the {self.width} x {self.height} = {self.width * self.height} pixels of its image"
            )
            raise DataError(msg)

    @classmethod
    def from_runs(cls, width: int, height: int, runs: Sequence[int]) -> RunLengthMask:
        """Return the mask with these run lengths, COCO's uncompressed form; raises `DataError` as the class does."""
        return cls(width, height, encode_runs(runs))

    @classmethod
    def from_pixels(cls, pixels: np.ndarray) -> RunLengthMask:
        """Return the mask of pixels ``[height, width]`` that are not zero; raises `DataError` for another shape."""
        if np.ndim(pixels) != 2:
            msg = f"a mask has the shape {np.shape(pixels)}; it must be [height, width]"
            raise DataError(msg)
        flat = np.asarray(pixels, dtype=bool).ravel(order="F")
        starts = np.flatnonzero(np.diff(flat, prepend=False))
        runs = np.diff(np.concatenate(([0], starts, [flat.size])))
        height, width = np.shape(pixels)
        return cls.from_runs(width, height, runs.tolist())

    def __bool__(self) -> bool:
        return any(decode_runs(self.counts)[1::2])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        return self.width, self.height

    def pixels(self) -> np.ndarray:
        """Return which pixels belong to the object, bool ``[height, width]``."""
        runs = decode_runs(self.counts)
        inside = np.arange(len(runs)) % 2 == 1
        return np.repeat(inside, runs).reshape(self.width, self.height).T

    def mirrored(self) -> RunLengthMask:
        """Return the mask in the image mirrored left to right."""
        return RunLengthMask.from_pixels(self.pixels()[:, ::-1])

    def placed(self, scale: tuple[float, float], offset: tuple[float, float], size: tuple[int, int]) -> RunLengthMask:
        """Return the mask after the image was scaled and moved, in an image of another size.

        A pixel belongs to the object if its center is in a pixel that did.

        Parameters
        ----------
        scale
            Factors of x and y.
        offset
            Distance in pixels by which the scaled image is moved right and down.
        size
            Width and height of the new image.
        """
        rows, columns = (
            np.floor((np.arange(size[axis]) + 0.5 - offset[axis]) / scale[axis]).astype(int) for axis in (1, 0)
        )
        row_inside, column_inside = (rows >= 0) & (rows < self.height), (columns >= 0) & (columns < self.width)
        result = np.zeros((size[1], size[0]), dtype=bool)
        result[np.ix_(row_inside, column_inside)] = self.pixels()[np.ix_(rows[row_inside], columns[column_inside])]
        return RunLengthMask.from_pixels(result)

    def record(self) -> dict[str, object]:
        """Return the mask as COCO writes it: ``size`` (height, width) and compressed ``counts``."""
        return {"size": [self.height, self.width], "counts": self.counts}


def decode_runs(text: str) -> list[int]:
    """Return the run lengths that the compressed form stores; raises `DataError` for other text.

    >>> from concepts.run_length_masks import decode_runs
    >>> decode_runs("123")
    [1, 2, 3]
    """
    runs: list[int] = []
    number = digits = 0
    for position, character in enumerate(text):
        code = ord(character) - 48
        if not 0 <= code < 64 or digits == _LARGEST_DIGITS:
            problem = "more digits than a length has" if 0 <= code < 64 else f"the character {character!r}"
            msg = f"the counts of a mask have {problem} at position {position}; write COCO's compressed run lengths"
            raise DataError(msg)
        number |= (code & _DIGIT) << 5 * digits
        digits += 1
        if code & _MORE:
            continue
        if code & _SIGN:
            number -= 1 << 5 * digits
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = digits = 0
    if digits:
        msg = "the counts of a mask end inside a length; write COCO's compressed run lengths"
        raise DataError(msg)
    return runs


def encode_runs(runs: Iterable[int]) -> str:
    """Return the compressed form of run lengths.

    >>> from concepts.run_length_masks import encode_runs
    >>> encode_runs([1, 2, 3])
    '123'
    """
    runs = [int(run) for run in runs]
    characters: list[str] = []
    for index, run in enumerate(runs):
        number = run - runs[index - 2] if index > 2 else run
        while True:
            digit, number = number & _DIGIT, number >> 5
            more = number != (-1 if digit & _SIGN else 0)
            characters.append(chr(48 + digit + _MORE * more))
            if not more:
                break
    return "".join(characters)
