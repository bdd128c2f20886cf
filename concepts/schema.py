"""What a model is shown and what is true of it: concepts, examples, datasets, counterfactual pairs.

Nothing here knows of tensors, tokens or models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol, overload

from groundscope.core.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

Level = Literal["object", "attribute", "relation"]
LEVELS: tuple[Level, ...] = ("object", "attribute", "relation")


@dataclass(frozen=True, order=True)
class Concept:
    """One thing that can be true or false of an example; prints and parses as ``level:name``.

    ``object:<noun>``
        The image contains the noun.
    ``attribute:<value>``
        The object the question is about has this attribute (undefined where no such object is in the image).
    ``relation:<name>``
        The first object of the question stands in this relation to the second.
    ``<level>:named``
        What the question asks about is true of the image, whatever the words are.
    """

    level: Level
    name: str

    def __str__(self) -> str:
        return f"{self.level}:{self.name}"

    @classmethod
    def parse(cls, text: str) -> Concept:
        """Read ``level:name``; raises `DataError` for any other form."""
        level, _, name = text.partition(":")
        if level not in LEVELS or not name:
            msg = f"'{text}' is not a concept: write one of {', '.join(LEVELS)}, a colon and a name, as in 'attribute:green'"
            raise DataError(msg)
        return cls(level, name)


@dataclass(frozen=True, slots=True)
class Box:
    """Axis-aligned pixel box, half open: columns ``x0 .. x1-1``, rows ``y0 .. y1-1``."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """Area in square pixels; 0 where the box is empty."""
        return max(0.0, self.x1 - self.x0) * max(0.0, self.y1 - self.y0)

    @property
    def center(self) -> tuple[float, float]:
        """Center ``(x, y)`` in pixels."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def intersection(self, other: Box) -> float:
        """Area in square pixels shared with another box."""
        return Box(max(self.x0, other.x0), max(self.y0, other.y0), min(self.x1, other.x1), min(self.y1, other.y1)).area


def check_box(box: Box, name: str) -> None:
    """Raise `DataError` for a box of an object that is not finite, begins at a negative pixel or has no area."""
    sides = (box.x0, box.y0, box.x1, box.y1)
    if not all(math.isfinite(side) for side in sides) or min(box.x0, box.y0) < 0 or not box.area:
        msg = (
            f"object '{name}' has the box {', '.join(f'{side:g}' for side in sides)} (x0, y0, x1, y1): its sides must be "
            "finite, not negative, and x0 < x1, y0 < y1; clip it to the image, or give None for an object without a box"
        )
        raise DataError(msg)


@dataclass(frozen=True, slots=True)
class SceneObject:
    """An object in an image, as its annotation names it.

    Raises
    ------
    DataError
        For a box that is not finite, begins at a negative pixel or has no area.
    """

    id: str
    noun: str
    box: Box | None
    """Where it is, in pixels of the loaded image; None where that is not known: it then has no image tokens."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Attribute kind to value, e.g. ``{"color": "green", "size": "big"}``; empty where nothing is annotated."""

    def __post_init__(self) -> None:
        if self.box is not None:
            check_box(self.box, self.id)

    def require_box(self) -> Box:
        """Return the box; raises `DataError` naming the object where it has none."""
        if self.box is None:
            msg = f"object '{self.id}' ({self.noun}) has no box: its annotation does not say where it is"
            raise DataError(msg)
        return self.box


class ImageSource(Protocol):
    """Something an RGB image can be had from, again and again, without holding the pixels."""

    def load(self) -> Image.Image:
        """Return the RGB image; raises `DataError` naming the file where it cannot be read."""
        ...

    @property
    def identity(self) -> str:
        """Text that is equal for equal images: the scene's description or the file's digest."""
        ...


@dataclass(frozen=True)
class Question:
    """A question about an image, with its true answer."""

    text: str
    answer: str
    candidates: tuple[str, ...]
    """Every answer of the right kind (``("yes", "no")``, all colors); empty for free text."""
    level: Level
    kind: str
    """Form of the question: ``existence``, ``color``, ``what_color``, ``size``, ``relation``, ``caption``, …"""
    subject: str | None = None
    """Id of the object it is about; None where that is not in the image."""
    labels: Mapping[str, bool] = field(default_factory=dict)
    """Truth of the concepts the question itself is about, by concept as printed."""
    prior_answer: str | None = None
    """What the world's prior would say without looking, where one is known (the typical color, say)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one image, with everything that is known to be true of it."""

    id: str
    image: ImageSource
    question: str
    answer: str
    """The true answer, one of `candidates`; for a caption a reference description."""
    candidates: tuple[str, ...]
    """Every answer that would be of the right kind (``("yes", "no")``, all colors); empty for free text."""
    level: Level
    kind: str
    """Form of the question: ``existence``, ``color``, ``what_color``, ``size``, ``relation``, ``caption``, …"""
    split: str
    """The condition it tests: ``neutral``, ``random``, ``popular``, ``adversarial``, ``typical``, ``conflict``, …"""
    group: str
    """The image or scene it came from; train/test splits never divide a group."""
    labels: Mapping[str, bool] = field(default_factory=dict)
    """Truth by concept (as printed); a concept that does not apply is absent."""
    objects: tuple[SceneObject, ...] = ()
    subject: str | None = None
    """Id of the object the question is about; None where it is not in the image."""
    prior_answer: str | None = None
    """What the world's prior would say without looking, where one is known (the typical color, say)."""

    def named_object(self) -> SceneObject | None:
        """Return the object the question is about, or None where it is not in the image."""
        return next((o for o in self.objects if o.id == self.subject), None)

    def record(self) -> dict[str, object]:
        """Return everything but the pixels as plain values that JSON can hold."""
        return {
            "id": self.id,
            "image": self.image.identity,
            "question": self.question,
            "answer": self.answer,
            "candidates": list(self.candidates),
            "level": self.level,
            "kind": self.kind,
            "split": self.split,
            "group": self.group,
            "labels": dict(self.labels),
            "objects": [{**asdict(o), "attributes": dict(o.attributes)} for o in self.objects],
            "subject": self.subject,
            "prior_answer": self.prior_answer,
        }


@dataclass(frozen=True)
class ConceptDataset(Sequence[Example]):
    """An ordered, named collection of examples with unique ids.

    Raises
    ------
    DataError
        Where two examples share an id.
    """

    name: str
    examples: tuple[Example, ...]
    provenance: Mapping[str, object] = field(default_factory=dict)
    """How it was made: generator and seed, or files and their digests, and what was left out."""

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for example in self.examples:
            if example.id in seen:
                msg = f"dataset '{self.name}': two examples have the id '{example.id}'; ids must be unique"
                raise DataError(msg)
            seen.add(example.id)
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ConceptDataset: ...
    def __getitem__(self, index: int | slice) -> Example | ConceptDataset:
        if isinstance(index, slice):
            return ConceptDataset(self.name, self.examples[index], self.provenance)
        return self.examples[index]

    def filter(self, keep: Callable[[Example], bool]) -> ConceptDataset:
        """Return the examples for which `keep` is true, in order."""
        return ConceptDataset(self.name, tuple(e for e in self.examples if keep(e)), self.provenance)

    def where(self, **values: object) -> ConceptDataset:
        """Return the examples whose fields equal the given values, e.g. ``where(split="conflict", level="attribute")``."""
        return self.filter(lambda e: all(getattr(e, key) == value for key, value in values.items()))

    def frame(self) -> pd.DataFrame:
        """Return one row an example: its fields, and a column for each concept label (missing where undefined)."""
        import pandas as pd

        rows = []
        for e in self.examples:
            row = {k: v for k, v in e.record().items() if k not in {"labels", "objects", "candidates", "image"}}
            row.update({concept: float(value) for concept, value in e.labels.items()})
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def digest(self) -> str:
        """SHA-256 over every record in order: equal for equal data, whatever machine made it."""
        h = hashlib.sha256()
        for example in self.examples:
            h.update(json.dumps(example.record(), sort_keys=True).encode())
            h.update(b"\n")
        return h.hexdigest()


@dataclass(frozen=True)
class CounterfactualPair:
    """Two examples that differ in exactly one stated thing; the question has the same length in both.

    `clean` is answered correctly by looking; `corrupt` shows the changed image, under the same question, with another
    true answer (or, for ``blank``, ``blur``, ``noise``, ``mask``, no visible evidence for any).
    """

    clean: Example
    corrupt: Example
    kind: str
    """What was changed: ``object``, ``color``, ``relation``, ``blank``, ``blur``, ``noise``, ``mask``."""
    change: str
    """The change in words, for people: ``apple: green -> red``."""

    @property
    def group(self) -> str:
        """The scene both came from."""
        return self.clean.group
