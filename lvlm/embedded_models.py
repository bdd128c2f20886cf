"""Names and folders of the models in this package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

EMBEDDED = ("tiny", "tiny-unbiased")
"""A model whose language prior overrides the image, and its twin without that prior."""


def folder_of(source: str | Path) -> Path:
    """Return the folder of an embedded model by name; another source as a path.

    Examples
    --------
    >>> from lvlm.embedded_models import folder_of
    >>> (folder_of("tiny") / "config.json").is_file(), folder_of("models/mine").name
    (True, 'mine')
    """
    name = str(source)
    return Path(str(files("lvlm.tiny"))) / "weights" / name if name in EMBEDDED else Path(name)
