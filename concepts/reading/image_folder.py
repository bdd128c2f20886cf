"""The images that a question or annotation file refers to: paths below one folder, and their headers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from concepts.image_files import FileImage, resolve_inside
from concepts.reading.box_frames import BoxFrame, box_frame
from groundscope.core.errors import DataError
from groundscope.core.progress import display


@dataclass
class ImageFolder:
    """A folder, and the images in it that records refer to.

    Raises
    ------
    DataError
        If the folder does not exist.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from concepts.reading.image_folder import ImageFolder
    >>> images = ImageFolder(Path(tempfile.mkdtemp()))
    >>> images.find("a/../../b.png", "questions.jsonl: line 1")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    groundscope.core.errors.DataError: questions.jsonl: line 1: field 'image': image path 'a/../../b.png' leaves the ...
    """

    path: Path
    _images: dict[str, FileImage] = field(default_factory=dict)
    """Name as written in a record, or plain relative path, to the image."""
    _first_references: dict[str, str] = field(default_factory=dict)
    """Plain relative path to the record and field that referred to it first."""

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            msg = f"image folder '{self.path}' does not exist"
            raise DataError(msg)
        self._root = self.path.resolve()

    def has(self, name: str) -> bool:
        """Whether the folder has a file of this name, which may be any text."""
        return os.path.isfile(os.path.join(self.path, name))  # noqa: PTH113, PTH118  # Path raises for some names

    def find(self, name: str, where: str, field: str = "image") -> FileImage:
        """Return the image that a record refers to; the file need not exist before `check`.

        Parameters
        ----------
        name
            Path relative to the folder.
        where, field
            The record and its field, for messages.

        Raises
        ------
        DataError
            Names the record and field: if the path leaves the folder.
        """
        if name in self._images:  # most records refer to the image of an earlier record
            return self._images[name]
        reference = f"{where}: field '{field}'"
        try:
            path = resolve_inside(self.path, name, self._root)
        except DataError as error:
            msg = f"{reference}: {error}"
            raise DataError(msg) from error
        plain = path.as_posix()[len(self._root.as_posix().rstrip("/")) + 1 :]
        self._first_references.setdefault(plain, reference)
        return self._images.setdefault(plain, FileImage(path, plain))

    def box_frame(self, image: FileImage, annotated_size: tuple[int, int] | None) -> BoxFrame:
        """Return `concepts.reading.box_frames.box_frame`; errors also name the first record that refers to the image."""
        try:
            return box_frame(image, annotated_size)
        except DataError as error:
            msg = f"{self._first_references[image.name]}: {error}"
            raise DataError(msg) from error

    def is_rotated(self, image: FileImage) -> bool:
        """Whether the image has an EXIF orientation; errors also name the first record that refers to the image."""
        return self.box_frame(image, None).is_known is False

    def check(self) -> None:
        """Read the headers of all images; raises `DataError`, naming the record, for a missing or unreadable image."""
        with display() as bar:
            for name, reference in bar.track(self._first_references.items(), description="checking images"):
                try:
                    self._images[name].check()
                except DataError as error:
                    msg = f"{reference}: {error}"
                    raise DataError(msg) from error
