"""Where the embedded models lie."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

EMBEDDED = ("tiny", "tiny-unbiased")
"""Models inside the package: one with a language prior that overrides what it sees, and its twin without."""


def folder_of(source: str | Path) -> Path:
    """Return the folder of an embedded model by name; any other source as a path."""
    name = str(source)
    return Path(str(files("lvlm.tiny"))) / "weights" / name if name in EMBEDDED else Path(name)
