"""CLEVR: rendered scenes with shapes, colors, sizes, materials and relations (Johnson et al. 2017, arXiv 1612.06890)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from concepts.annotated_object import AnnotatedObject
from concepts.concept import Level
from concepts.image_files import FileImage
from concepts.nouns import existence_question
from concepts.question import YES_NO, yes_or_no
from concepts.reading.assembly import build_dataset, check_counts
from concepts.reading.image_folder import ImageFolder
from concepts.reading.json_stream import stream_list
from concepts.reading.record import Record, as_record
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError
from groundscope.core.text import format_count, nearest

WORDING: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"left": ("left of", "right"), "right": ("right of", "left"), "front": ("in front of", "behind"),
     "behind": ("behind", "front")}
)  # fmt: skip
"""Relation in the file to its wording and its opposite."""
VALUES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "color": tuple("gray red blue green brown purple cyan yellow".split()),
        "shape": ("cube", "sphere", "cylinder"),
        "size": ("large", "small"),
        "material": ("rubber", "metal"),
    }
)
"""Attribute to its possible values."""


@dataclass(frozen=True)
class _Scene:
    id: str
    image: FileImage
    objects: tuple[AnnotatedObject, ...]
    relations: Mapping[str, Sequence[frozenset[int]]]
    """Relation to, for each object, the indices of the objects that have this relation to it."""


def clevr(
    scenes: Path | str, images: Path | str, *, per_image: int = 3, seed: int = 0, limit: int | None = None
) -> ConceptDataset:
    """Load CLEVR scenes, and make questions about their objects, colors and relations.

    Parameters
    ----------
    scenes
        File ``{scenes: [{image_filename, objects: [{shape, color, size, material, pixel_coords}], relationships}]}``; the last
        field may be ``relations``. ``j in relationships["left"][i]`` means that j is left of i. The file is streamed.
    images
        Folder of the images.
    per_image
        Maximum number of question pairs of each level for an image; a pair has one question with the answer yes and one with
        the answer no.
    seed
        Seed of the random choices.
    limit
        Maximum number of scenes; the first ones are used.

    Returns
    -------
    ConceptDataset
        Yes-no questions of all levels. An object is named by color and shape, and in questions about its color by size,
        material and shape; objects without a unique name are left out. Objects have no boxes, because the file has only
        their centers.

    Raises
    ------
    DataError
        Names the file, scene and field: for invalid or truncated JSON, a field that is missing or of the wrong type, an unknown
        attribute value, a relation of objects that do not exist, or an image that is missing, unreadable or outside the folder.
    ConfigError
        For a limit or number of questions below 1.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> cube = {"shape": "cube", "color": "red", "size": "large", "material": "metal", "pixel_coords": [9, 9, 9]}
    >>> relations = {name: [[]] for name in ("left", "right", "front", "behind")}
    >>> scene = {"image_filename": "a.png", "objects": [cube], "relationships": relations}
    >>> _ = (folder / "scenes.json").write_text(json.dumps({"scenes": [scene]}))
    >>> data = gs.loaders.clevr(folder / "scenes.json", folder)
    >>> [(e.question, e.answer) for e in data if e.level == "attribute"][0]
    ('Is the large metal cube red?', 'yes')
    """
    check_counts(per_image=per_image, limit=limit)
    file, folder = Path(scenes), ImageFolder(Path(images))
    records = stream_list(file, "scenes")
    left_out: Counter[str] = Counter()
    examples: list[Example] = []
    for record in islice(records, limit):
        scene = _read_scene(record, folder)
        rng = random.Random(f"{seed}/{scene.id}")
        for level, make_pairs in (("object", _existence), ("attribute", _colors), ("relation", _relations)):
            pairs = list(make_pairs(scene, rng))
            sample = rng.sample(pairs, min(per_image, len(pairs)))
            left_out[f"pairs of {level} questions beyond per_image"] += len(pairs) - len(sample)
            examples += [e for pair in sample for e in pair]
    left_out["scenes beyond the limit"] = sum(1 for _ in records)
    return build_dataset("clevr", [file], folder, examples, left_out, per_image=per_image, seed=seed)


def _read_scene(record: Record, folder: ImageFolder) -> _Scene:
    name = record.text("image_filename")
    objects = tuple(_read_object(number, value) for number, value in enumerate(record.records("objects")))
    relations = as_record(f"{record.where}, relationships", record.field("relationships", "relations"))
    related: dict[str, Sequence[frozenset[int]]] = {}
    for relation in WORDING:
        rows = relations.list(relation)
        valid = all(isinstance(row, list) and all(i in range(len(objects)) for i in row) for row in rows)
        if len(rows) != len(objects) or not valid:
            msg = (
                f"{relations.where}: '{relation}' must hold, for each of {format_count(len(objects), 'object')}, a "
                "list of object numbers"
            )
            raise DataError(msg)
        related[relation] = [frozenset(row) for row in rows]
    return _Scene(Path(name).stem, folder.find(name, record.where, "image_filename"), objects, related)


def _read_object(number: int, record: Record) -> AnnotatedObject:
    attributes = {name: record.text(name).strip().lower() for name in VALUES}
    for name, word in attributes.items():
        if word not in VALUES[name]:
            choices = f"{', '.join(VALUES[name])}{nearest(word, VALUES[name])}"
            msg = f"{record.where}: field '{name}' is '{word[:40]}'; choose from {choices}"
            raise DataError(msg)
    coordinates = record.list("pixel_coords")
    if len(coordinates) not in (2, 3):
        msg = f"{record.where}: field 'pixel_coords' must hold x, y and the depth, not {format_count(len(coordinates), 'value')}"
        raise DataError(msg)
    names = ("x", "y", "depth")[: len(coordinates)]
    Record(f"{record.where}, pixel_coords", dict(zip(names, coordinates, strict=True))).numbers(*names)
    shape = attributes.pop("shape")
    return AnnotatedObject(str(number), shape, None, attributes)


def _name(item: AnnotatedObject, *attributes: str) -> str:
    """Return the name of an object by some attributes and its shape."""
    return " ".join([*(item.attributes[a] for a in attributes), item.noun])


def _unique_names(objects: Sequence[AnnotatedObject], *attributes: str) -> dict[str, AnnotatedObject]:
    """Return the objects by name, without objects that share their name with another."""
    counts = Counter(_name(o, *attributes) for o in objects)
    return {name: o for o in objects if counts[name := _name(o, *attributes)] == 1}


def _existence(scene: _Scene, rng: random.Random) -> Iterator[tuple[Example, ...]]:
    """Yield a question about each present name, with one about an absent name."""
    present = dict.fromkeys(_name(o, "color") for o in scene.objects)
    names = [f"{color} {shape}" for color in VALUES["color"] for shape in VALUES["shape"]]
    absent = [name for name in names if name not in present]
    rng.shuffle(absent)
    for present_name, absent_name in zip(present, absent, strict=False):
        item = next(o for o in scene.objects if _name(o, "color") == present_name)
        yield tuple(
            _example(
                scene,
                existence_question(name),
                "object",
                "existence",
                truth,
                {f"object:{name}": truth},
                item.id if truth else None,
            )
            for name, truth in ((present_name, True), (absent_name, False))
        )


def _colors(scene: _Scene, rng: random.Random) -> Iterator[tuple[Example, ...]]:
    """Yield a question about the true color of each object with a unique name, with one about another color."""
    for name, item in _unique_names(scene.objects, "size", "material").items():
        true_color = item.attributes["color"]
        other_color = rng.choice([c for c in VALUES["color"] if c != true_color])
        labels = {f"attribute:{c}": c == true_color for c in VALUES["color"]}
        yield tuple(
            _example(scene, f"Is the {name} {color}?", "attribute", "color", color == true_color, labels, item.id)
            for color in (true_color, other_color)
        )


def _relations(scene: _Scene, _rng: random.Random) -> Iterator[tuple[Example, ...]]:
    """Yield a question about each relation of two objects with unique names, with one about the opposite relation."""
    objects = _unique_names(scene.objects, "color")
    for first_name, first in objects.items():
        for second_name, second in objects.items():
            for relation, (wording, opposite) in WORDING.items():
                i, j = int(first.id), int(second.id)
                if i not in scene.relations[relation][j] or i in scene.relations[opposite][j]:
                    continue
                opposite_wording = WORDING[opposite][0]
                labels = {f"relation:{wording}": True, f"relation:{opposite_wording}": False}
                yield tuple(
                    _example(
                        scene,
                        f"Is the {first_name} {words} the {second_name}?",
                        "relation",
                        "relation",
                        truth,
                        labels,
                        first.id,
                    )
                    for words, truth in ((wording, True), (opposite_wording, False))
                )


def _example(
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
        objects=scene.objects,
        subject=subject,
    )
