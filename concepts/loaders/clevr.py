"""CLEVR: drawn scenes with shape, color, size, material and relations of everything (Johnson et al. 2017, 1612.06890)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from concepts.image_files import FileImage
from concepts.nouns import existence_question
from concepts.reading.assembly import YES_NO, Pictures, check_counts, dataset, yes_or_no
from concepts.reading.json_stream import stream_list
from concepts.reading.record import Record, as_record
from concepts.schema import ConceptDataset, Example, Level, SceneObject
from groundscope.core.errors import DataError

WORDING: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"left": ("left of", "right"), "right": ("right of", "left"), "front": ("in front of", "behind"),
     "behind": ("behind", "front")}
)  # fmt: skip
"""Relation of the file to its words and its opposite."""
VALUES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "color": tuple("gray red blue green brown purple cyan yellow".split()),
        "shape": ("cube", "sphere", "cylinder"),
        "size": ("large", "small"),
        "material": ("rubber", "metal"),
    }
)
"""Attribute to its values in CLEVR."""
_FIELDS = tuple(VALUES)


@dataclass(frozen=True)
class _Scene:
    id: str
    image: FileImage
    things: tuple[SceneObject, ...]
    relations: Mapping[str, Sequence[frozenset[int]]]
    """Relation to, for each object, those that stand so to it."""


def clevr(
    scenes: Path | str, images: Path | str, *, per_image: int = 3, seed: int = 0, limit: int | None = None
) -> ConceptDataset:
    """Read CLEVR scenes, and ask about them: is there a red cube, is the small metal cube red, how do two stand.

    Parameters
    ----------
    scenes
        ``{scenes: [{image_filename, objects[{shape, color, size, material}], relationships}]}``, or
        ``relations``; ``j in relationships["left"][i]`` means that j is left of i. The file is streamed.
    images
        The folder that the file names are relative to.
    per_image
        Pairs of questions of each level an image gets at most; one of a pair is answered yes, the other no.
    seed
        Decides what is drawn.
    limit
        Keep this many scenes, the first.

    Returns
    -------
    ConceptDataset
        Questions of every level. A thing is named by its color and shape, or, where its color is asked for, by size,
        material and shape, and only where that fits nothing else in the image. Objects have no
        boxes, as the file has their centers only.

    Raises
    ------
    DataError
        Naming file, scene and field: a file that is cut or broken, a field that is missing or of the wrong kind, an
        unknown color or shape, a relation of objects that are not there, an image that is missing, unreadable or outside
        the folder.
    ConfigError
        For a limit or number of questions below 1.
    """
    check_counts(per_image=per_image, limit=limit)
    file, pictures = Path(scenes), Pictures(Path(images))
    records = stream_list(file, "scenes")
    left_out: Counter[str] = Counter()
    examples: list[Example] = []
    for record in islice(records, limit):
        scene = _scene(record, pictures)
        chance = random.Random(f"{seed}/{scene.id}")
        for level, pairs in (("object", _existence), ("attribute", _colors), ("relation", _relations)):
            found = list(pairs(scene, chance))
            chosen = chance.sample(found, min(per_image, len(found)))
            left_out[f"pairs of {level} questions beyond per_image"] += len(found) - len(chosen)
            examples += [e for pair in chosen for e in pair]
    left_out["scenes beyond the limit"] = sum(1 for _ in records)
    return dataset("clevr", [file], pictures, examples, left_out, per_image=per_image, seed=seed)


def _scene(record: Record, pictures: Pictures) -> _Scene:
    name = record.text("image_filename")
    things = tuple(_thing(number, value) for number, value in enumerate(record.records("objects")))
    relations = as_record(f"{record.where}, relationships", record.field("relationships", "relations"))
    stands: dict[str, Sequence[frozenset[int]]] = {}
    for relation in WORDING:
        rows = relations.list(relation)
        good = all(isinstance(row, list) and all(i in range(len(things)) for i in row) for row in rows)
        if len(rows) != len(things) or not good:
            msg = (
                f"{relations.where}: '{relation}' must hold, for each of {len(things)} objects, a list of their numbers"
            )
            raise DataError(msg)
        stands[relation] = [frozenset(row) for row in rows]
    return _Scene(Path(name).stem, pictures.find(name, record.where, "image_filename"), things, stands)


def _thing(number: int, value: Record) -> SceneObject:
    found = {name: value.text(name).strip().lower() for name in _FIELDS}
    for name, word in found.items():
        if word not in VALUES[name]:
            msg = f"{value.where}: field '{name}' is '{word[:40]}', known are {', '.join(VALUES[name])}"
            raise DataError(msg)
    place = value.list("pixel_coords")
    if len(place) not in (2, 3):
        msg = f"{value.where}: field 'pixel_coords' must hold x, y and the depth, not {len(place)} values"
        raise DataError(msg)
    names = ("x", "y", "depth")[: len(place)]
    Record(f"{value.where}, pixel_coords", dict(zip(names, place, strict=True))).numbers(*names)
    shape = found.pop("shape")
    return SceneObject(str(number), shape, None, found)


def _named(thing: SceneObject, *names: str) -> str:
    return " ".join([*(thing.attributes[n] for n in names), thing.noun])


def _alone(things: Sequence[SceneObject], *names: str) -> dict[str, SceneObject]:
    """Return what is named by these attributes and its shape, where that fits one thing only."""
    counts = Counter(_named(t, *names) for t in things)
    return {name: t for t in things if counts[name := _named(t, *names)] == 1}


def _existence(scene: _Scene, chance: random.Random) -> Iterator[tuple[Example, ...]]:
    present = dict.fromkeys(_named(t, "color") for t in scene.things)
    every = [f"{color} {shape}" for color in VALUES["color"] for shape in VALUES["shape"]]
    absent = [name for name in every if name not in present]
    chance.shuffle(absent)
    for name, other in zip(present, absent, strict=False):
        thing = next(t for t in scene.things if _named(t, "color") == name)
        yield tuple(
            _asked(
                scene,
                existence_question(words),
                "object",
                "existence",
                truth,
                {f"object:{words}": truth},
                thing.id if truth else None,
            )
            for words, truth in ((name, True), (other, False))
        )


def _colors(scene: _Scene, chance: random.Random) -> Iterator[tuple[Example, ...]]:
    for name, thing in _alone(scene.things, "size", "material").items():
        own = thing.attributes["color"]
        other = chance.choice([c for c in VALUES["color"] if c != own])
        labels = {f"attribute:{c}": c == own for c in VALUES["color"]}
        yield tuple(
            _asked(scene, f"Is the {name} {color}?", "attribute", "color", color == own, labels, thing.id)
            for color in (own, other)
        )


def _relations(scene: _Scene, chance: random.Random) -> Iterator[tuple[Example, ...]]:
    del chance  # every relation has one opposite
    alone = _alone(scene.things, "color")
    for first, thing in alone.items():
        for second, other in alone.items():
            for relation, (words, opposite) in WORDING.items():
                here, there = int(thing.id), int(other.id)
                if here not in scene.relations[relation][there] or here in scene.relations[opposite][there]:
                    continue
                labels = {f"relation:{words}": True, f"relation:{WORDING[opposite][0]}": False}
                yield tuple(
                    _asked(
                        scene, f"Is the {first} {said} the {second}?", "relation", "relation", truth, labels, thing.id
                    )
                    for said, truth in ((words, True), (WORDING[opposite][0], False))
                )


def _asked(
    scene: _Scene, text: str, level: Level, kind: str, truth: bool, labels: Mapping[str, bool], subject: str | None
) -> Example:
    return Example(
        id=f"{scene.id}/{text}",
        image=scene.image,
        question=text,
        answer=yes_or_no(truth),
        candidates=YES_NO,
        level=level,
        kind=kind,
        split="random" if kind == "existence" else "neutral",
        group=scene.image.name,
        labels={**labels, f"{level}:named": truth},
        objects=scene.things,
        subject=subject,
    )
