"""GQA: scene graphs with attributes and relations, and questions (Hudson & Manning 2019, arXiv 1902.09506)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from concepts.reading.annotation_questions import RELATION_NAMES, SPELLINGS, Annotated, Asker
from concepts.reading.assembly import YES_NO, Pictures, check_counts, dataset
from concepts.reading.records import Record, as_record
from concepts.reading.streams import stream
from concepts.schema import Box, ConceptDataset, Example, Level, SceneObject
from groundscope.core.errors import DataError

LEVEL_OF: Mapping[str, Level] = MappingProxyType(
    {"obj": "object", "cat": "object", "attr": "attribute", "global": "attribute", "rel": "relation"}
)
"""GQA's semantic type of a question to its level; ``global`` asks for an attribute of the whole image."""
_BEYOND = "images beyond the limit"


def gqa(
    scene_graphs: Path | str,
    images: Path | str,
    questions: Path | str | None = None,
    *,
    per_image: int = 3,
    seed: int = 0,
    limit: int | None = None,
) -> ConceptDataset:
    """Read GQA scene graphs, and ask about them; or ask the questions of a file.

    Both files are streamed, the scene graphs twice: once for the nouns that may be absent.

    Parameters
    ----------
    scene_graphs
        ``{image id: {objects: {object id: {name, x, y, w, h, attributes, relations}}}}``; relations are a list of
        ``{name, object}`` or such objects by key.
    images
        Folder with ``<image id>.jpg``.
    questions
        ``{question id: {imageId, question, answer, types: {semantic}}}``: GQA's own questions instead of made ones;
        those that are answered yes or no are kept.
    per_image
        Pairs of made questions of each level an image gets at most; see `concepts.reading.annotation_questions`.
    seed
        Decides what is drawn.
    limit
        Keep this many images, the first.

    Returns
    -------
    ConceptDataset
        Yes-no questions of every level, with objects and boxes. An attribute that is a color is kept under ``color``
        where the object has one only, any other under its own name.

    Raises
    ------
    DataError
        Naming file, record and field: a file that is cut or broken, a field that is missing or of the wrong kind, a
        relation to an object that is not there, a question about an image without a scene graph or of an unknown type,
        an image that is missing, unreadable or outside the folder.
    ConfigError
        For a limit or number of questions below 1.
    """
    check_counts(per_image=per_image, limit=limit)
    file, pictures = Path(scene_graphs), Pictures(Path(images))
    left_out: Counter[str] = Counter({_BEYOND: 0, "attributes that are no color": 0, "relations without opposite": 0})
    nouns: dict[str, None] = {}
    for entry in stream(file):
        for _, thing in _objects(entry.record()):
            nouns.setdefault(thing.text("name").strip().lower())
    asker = Asker(tuple(nouns), per_image, seed, left_out)
    scenes = _scenes(file, pictures, left_out, limit)
    if questions is None:
        examples = asker.ask(scenes)
        return dataset("gqa", [file], pictures, examples, left_out, per_image=per_image, seed=seed)
    known = {scene.id: scene for scene in scenes}
    examples = list(_own(Path(questions), known, left_out))
    return dataset("gqa", [file, Path(questions)], pictures, examples, left_out)


def _scenes(file: Path, pictures: Pictures, left_out: Counter[str], limit: int | None) -> Iterator[Annotated]:
    for count, entry in enumerate(stream(file)):
        if limit is not None and count >= limit:
            left_out[_BEYOND] += 1
            continue
        record = entry.record()
        objects = dict(_objects(record))
        things = tuple(_thing(key, value, left_out) for key, value in objects.items())
        relations = tuple(r for key, value in objects.items() for r in _relations(key, value, objects, left_out))
        yield Annotated(str(entry.key), pictures.find(f"{entry.key}.jpg", record.where), things, relations)


def _objects(record: Record) -> Iterator[tuple[str, Record]]:
    objects = record.field("objects")
    if not isinstance(objects, dict):
        msg = f"{record.where}: field 'objects' must hold objects by their id"
        raise DataError(msg)
    for key, value in objects.items():
        yield key, as_record(f"{record.where}, object '{key}'", value)


def _thing(key: str, value: Record, left_out: Counter[str]) -> SceneObject:
    x, y, width, height = value.numbers("x", "y", "w", "h")
    words = [w.strip().lower() for w in value.words("attributes")] if "attributes" in value.values else []
    return SceneObject(
        key, value.text("name").strip().lower(), Box(x, y, x + width, y + height), attributes_of(words, left_out)
    )


def attributes_of(words: list[str], left_out: Counter[str]) -> dict[str, str]:
    """Return an object's attributes: its color where there is one only, others under their own names."""
    colors = {SPELLINGS[w] for w in words if w in SPELLINGS}
    others = {w: w for w in words if w not in SPELLINGS}
    left_out["attributes that are no color"] += len(others)
    if len(colors) > 1:
        left_out["colors of things with several"] += 1
    return {**others, "color": colors.pop()} if len(colors) == 1 else others


def _relations(
    key: str, value: Record, objects: Mapping[str, Record], left_out: Counter[str]
) -> Iterator[tuple[str, str, str]]:
    held = value.values.get("relations", [])
    if not isinstance(held, list | dict):
        msg = f"{value.where}: field 'relations' must hold a list or objects by key"
        raise DataError(msg)
    for number, item in enumerate(held.values() if isinstance(held, dict) else held, 1):
        relation = as_record(f"{value.where}, relation {number}", item)
        name, other = relation.text("name").strip().lower(), relation.identifier("object")
        if other not in objects:
            msg = f"{relation.where}: field 'object' is '{other}', which is not an object of this image"
            raise DataError(msg)
        if name in RELATION_NAMES:
            yield key, RELATION_NAMES[name], other
        else:
            left_out["relations without opposite"] += 1


def _own(file: Path, known: Mapping[str, Annotated], left_out: Counter[str]) -> Iterator[Example]:
    for entry in stream(file):
        record = entry.record()
        image, answer = record.identifier("imageId"), record.text("answer").strip().lower()
        semantic = as_record(f"{record.where}, types", record.field("types")).text("semantic")
        if semantic not in LEVEL_OF:
            msg = f"{record.where}: field 'types': semantic is '{semantic[:60]}', known are {', '.join(LEVEL_OF)}"
            raise DataError(msg)
        if image not in known:
            if not left_out[_BEYOND]:
                msg = f"{record.where}: field 'imageId' is '{image}', which has no scene graph"
                raise DataError(msg)
            left_out["questions about images that are not kept"] += 1
            continue
        if answer not in YES_NO:
            left_out["questions not answered yes or no"] += 1
            continue
        level = LEVEL_OF[semantic]
        yield Example(
            id=str(entry.key),
            image=known[image].image,
            question=record.text("question"),
            answer=answer,
            candidates=YES_NO,
            level=level,
            kind=f"gqa_{semantic}",
            split="neutral",
            group=known[image].image.name,
            labels={f"{level}:named": answer == "yes"},
            objects=known[image].objects,
        )
