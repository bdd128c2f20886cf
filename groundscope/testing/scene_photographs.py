"""Icon scenes saved as image files: a dataset of photographs whose truth is known exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from concepts.image_files import FileImage
from concepts.schema import ConceptDataset


def save_as_photographs(data: ConceptDataset, folder: Path | str, *, quality: int | None = None) -> ConceptDataset:
    """Save the image of every group and return the same questions about the files.

    Parameters
    ----------
    data
        Examples of icon scenes.
    folder
        Folder of the image files; created if necessary.
    quality
        Quality of JPEG files; by default PNG files, with the exact pixels.

    Returns
    -------
    ConceptDataset
        The examples with `FileImage`; nothing in it can be drawn again.

    Examples
    --------
    >>> import tempfile
    >>> import groundscope as gs
    >>> from groundscope.testing.scene_photographs import save_as_photographs
    >>> data = gs.scenes.dataset(10)
    >>> photographs = save_as_photographs(data, tempfile.mkdtemp())
    >>> photographs[0].question == data[0].question, photographs[0].image.load() == data[0].image.load()
    (True, True)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, FileImage] = {}
    for example in data:
        if example.image.identity not in images:
            name = f"{len(images):06d}.{'png' if quality is None else 'jpg'}"
            image = example.image.load()
            if quality is None:
                image.save(folder / name)
            else:
                image.save(folder / name, quality=quality)
            images[example.image.identity] = FileImage(folder / name, name)
    examples = tuple(replace(e, image=images[e.image.identity]) for e in data)
    return ConceptDataset(f"{data.name}, as photographs", examples, {**data.provenance, "quality": quality})
