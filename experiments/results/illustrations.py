"""Examples that the report shows: copies of their images, answers, and attention maps.

The stages `patch`, `evaluate` and `diagnose` have the model and the images, so each writes the examples of its part of the
report into its folder. The report then needs the run folder alone. Runs of earlier versions have no such files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from experiments.records import ILLUSTRATIONS, problem
from experiments.run.folder import ILLUSTRATIONS as ILLUSTRATIONS_FOLDER
from groundscope.core import artifacts
from groundscope.core.errors import ConfigError
from groundscope.core.paths import below, is_file

FILE = f"{ILLUSTRATIONS_FOLDER}examples.safetensors"
"""The file, inside the folder of a stage."""
_KIND, _VERSION = "illustrations", 1
_SIDE = 512
"""Longest side of an image copy, in pixels."""


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Attention of one head from the last token to the image."""

    weights: np.ndarray
    """Float ``[rows, columns]`` of image patches."""
    image_mass: float
    """Share of the head's attention that is on the image."""


@dataclass(frozen=True, eq=False)
class Illustration:
    """One example in the report."""

    example: str
    """Id of the example."""
    image: Image.Image
    """A copy of its image, at most 512 pixels wide and high."""
    size: tuple[int, int]
    """Width and height of the original image, in pixels; boxes refer to it."""
    answers: Mapping[str, str] = field(default_factory=dict)
    """Answers of the model by condition (``after``, ``twin``), beyond those in other files of the run."""
    attention: Mapping[str, AttentionMap] = field(default_factory=dict)
    """Attention maps by head (``L4.H7``)."""

    def __post_init__(self) -> None:
        for name in ("answers", "attention"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))


@dataclass(frozen=True, eq=False)
class Illustrations(Mapping[str, Illustration]):
    """The illustrations that a stage wrote, by id of the example."""

    entries: Mapping[str, Illustration]
    reason: str = ""
    """Why some are missing; empty if none is."""

    def __getitem__(self, example: str) -> Illustration:
        return self.entries[example]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def copy_image(image: Image.Image) -> Image.Image:
    """Return an RGB copy that is at most 512 pixels wide and high."""
    copy = image.convert("RGB")
    copy.thumbnail((_SIDE, _SIDE))
    return copy


def write_illustrations(folder: Path, entries: Sequence[Illustration], reason: str = "") -> None:
    """Write illustrations into the folder of a stage.

    Parameters
    ----------
    folder
        Folder of the stage.
    entries
        The illustrations.
    reason
        Why some could not be made.
    """
    tensors: dict[str, np.ndarray] = {}
    cards: list[dict[str, Any]] = []
    for i, entry in enumerate(entries):
        tensors[f"{i}/image"] = np.array(entry.image)
        tensors |= {f"{i}/{head}": np.ascontiguousarray(m.weights) for head, m in entry.attention.items()}
        masses = {head: m.image_mass for head, m in entry.attention.items()}
        cards.append(
            {
                "example": entry.example,
                "size": list(entry.size),
                "answers": dict(entry.answers),
                "image_mass": masses,
            }
        )
    artifacts.write(folder / FILE, _KIND, _VERSION, tensors, {"examples": cards, "reason": reason})


def read_illustrations(folder: Path) -> Illustrations | None:
    """Read the illustrations in the folder of a stage; None if an earlier version made it, which wrote none.

    Raises
    ------
    StoreError, ConfigError
        If the file is damaged.
    """
    path = below(folder, FILE, error=ConfigError)
    if not is_file(path):
        return None
    tensors, card = artifacts.read(path, _KIND, _VERSION)
    if wrong := problem(card, ILLUSTRATIONS) or _tensor_problem(tensors, card["examples"]):
        msg = f"{path}: {wrong}"
        raise ConfigError(msg)
    entries = {
        item["example"]: Illustration(
            item["example"],
            Image.fromarray(tensors[f"{i}/image"]),
            (item["size"][0], item["size"][1]),
            item["answers"],
            {head: AttentionMap(tensors[f"{i}/{head}"], mass) for head, mass in item["image_mass"].items()},
        )
        for i, item in enumerate(card["examples"])
    }
    return Illustrations(MappingProxyType(entries), card["reason"])


def _tensor_problem(tensors: Mapping[str, np.ndarray], cards: Sequence[Mapping[str, Any]]) -> str | None:
    """Return how the tensors differ from what the card says, or None."""
    for i, item in enumerate(cards):
        image = tensors.get(f"{i}/image")
        if image is None or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            return f"the image of example {i} is missing or has another format; the file is damaged"
        if min(item["size"]) < 1:
            return f"the image size of example {i} is not positive; the file is damaged"
        for head in item["image_mass"]:
            weights = tensors.get(f"{i}/{head}")
            if weights is None or weights.dtype.kind != "f" or weights.ndim != 2 or not weights.size:
                return f"the attention of {head} for example {i} is missing or has another format; the file is damaged"
    return None
