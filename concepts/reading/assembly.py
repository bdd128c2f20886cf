"""What every loader does alike: find images, check that they are there, and join examples to a dataset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from concepts.image_files import FileImage, resolve_inside
from concepts.reading.box_frames import BoxFrame, box_frame
from concepts.reading.text_files import sha256
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError

YES_NO = ("yes", "no")


@dataclass
class Pictures:
    """The images that a file names, one for every spelling of a path, each with the place that named it first.

    Raises
    ------
    DataError
        Where the folder does not exist.
    """

    folder: Path
    known: dict[str, FileImage] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    """Image to the place that named it first, field included."""

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            msg = f"image folder '{self.folder}' does not exist"
            raise DataError(msg)
        self._root = self.folder.resolve()

    def has(self, name: str) -> bool:
        """Say whether the folder has a file of this name; the name may be any text."""
        return os.path.isfile(os.path.join(self.folder, name))  # noqa: PTH113, PTH118  # Path raises for some names

    def find(self, name: str, where: str, name_of_field: str = "image") -> FileImage:
        """Return the image of a record; raises `DataError` naming it where the path leaves the folder."""
        if name in self.known:  # most records name an image as another did
            return self.known[name]
        place = f"{where}: field '{name_of_field}'"
        try:
            path = resolve_inside(self.folder, name, self._root)
        except DataError as error:
            msg = f"{place}: {error}"
            raise DataError(msg) from error
        plain = path.as_posix()[len(self._root.as_posix().rstrip("/")) + 1 :]
        self.named.setdefault(plain, place)
        return self.known.setdefault(plain, FileImage(path, plain))

    def box_frame(self, picture: FileImage, annotated: tuple[int, int] | None) -> BoxFrame:
        """Decide the frame of an image's boxes as `box_frame` does; its errors name the place of the image too."""
        try:
            return box_frame(picture, annotated)
        except DataError as error:
            msg = f"{self.named[picture.name]}: {error}"
            raise DataError(msg) from error

    def is_turned(self, picture: FileImage) -> bool:
        """Whether an EXIF orientation turns or mirrors the stored pixels; errors name the place of the image too."""
        return self.box_frame(picture, None).decided is False

    def check(self) -> None:
        """Read the header of every image; raises `DataError` for one that is missing or unreadable."""
        for name, place in shown(self.named):
            try:
                self.known[name].check()
            except DataError as error:
                msg = f"{place}: {error}"
                raise DataError(msg) from error


def shown(items: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the items under a progress bar, where there is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items.items(), "checking images", console=console, transient=True, disable=not console.is_terminal)


def dataset(
    loader: str,
    files: Sequence[Path],
    pictures: Pictures,
    examples: Iterable[Example],
    left_out: Mapping[str, int],
    **more: object,
) -> ConceptDataset:
    """Join examples to a dataset whose images are there.

    Parameters
    ----------
    loader
        Name of the loader, for the provenance.
    files
        What was read; their digests go into the provenance.
    pictures
        The images that the examples need.
    examples
        The examples; taken before the images are looked at, as another record may be broken and is found faster.
    left_out
        What was left out, by reason; kept in the provenance even where nothing was.
    more
        Further options for the provenance.

    Raises
    ------
    DataError
        Where there is no example, two have the same id, or an image is missing or unreadable.
    """
    found = tuple(examples)
    if not found:
        reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
        msg = f"{files[0]}: there is no question in it that can be asked" + (
            f" (left out: {reasons})" if reasons else ""
        )
        raise DataError(msg)
    made = ConceptDataset(
        files[0].stem,
        found,
        {
            "loader": loader,
            "files": {str(file): sha256(file) for file in files},
            "images": str(pictures.folder),
            **more,
            "kept": len(found),
            "left_out": dict(left_out),
        },
    )
    pictures.check()
    return made


def check_counts(**counts: int | None) -> None:
    """Raise `ConfigError` for a number below 1; None is no limit."""
    for name, value in counts.items():
        if value is not None and value < 1:
            msg = f"{name}={value}: give at least 1" + (", or leave it out to read all" if name == "limit" else "")
            raise ConfigError(msg)


def yes_or_no(truth: bool) -> str:
    """Return the true answer to a yes-no question."""
    return YES_NO[0] if truth else YES_NO[1]
