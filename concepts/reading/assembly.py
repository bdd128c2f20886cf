"""Build a dataset from loaded examples, with its provenance, after all checks that do not need image headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from concepts.reading.image_folder import ImageFolder
from concepts.reading.text_files import sha256
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.text import format_reasons


def build_dataset(
    loader: str,
    files: Sequence[Path],
    images: ImageFolder,
    examples: Iterable[Example],
    left_out: Mapping[str, int],
    **options: object,
) -> ConceptDataset:
    """Return a dataset whose images were all checked.

    Parameters
    ----------
    loader
        Name of the loader.
    files
        The files that were read; the name of the first is the name of the dataset.
    images
        The images of the examples.
    examples
        The examples. They are consumed before the images are checked, because errors in records are found faster.
    left_out
        Number of records that were left out, by reason; zeros are recorded too.
    options
        Options of the loader.

    Returns
    -------
    ConceptDataset
        The provenance has the loader, files with digests, image folder, options and counts.

    Raises
    ------
    DataError
        If there is no example, two examples have the same id, or an image is missing or unreadable.
    """
    rows = tuple(examples)
    if not rows:
        reasons = format_reasons(left_out)
        msg = f"{files[0]}: the file gives no question{reasons and f'; left out: {reasons}'}"
        raise DataError(msg)
    provenance = {
        "loader": loader,
        "files": {str(file): sha256(file) for file in files},
        "images": str(images.path),
        **options,
        "kept": len(rows),
        "left_out": dict(left_out),
    }
    data = ConceptDataset(files[0].stem, rows, provenance)
    images.check()
    return data


def check_counts(**counts: int | None) -> None:
    """Raise `ConfigError` for an option below 1; None is accepted."""
    for name, value in counts.items():
        if value is not None and value < 1:
            msg = f"{name}={value}; give at least 1" + (", or omit it to read all" if name == "limit" else "")
            raise ConfigError(msg)
