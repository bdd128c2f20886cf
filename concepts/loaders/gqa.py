"""GQA: scene graphs with attributes and relations, and questions (Hudson & Manning 2019, arXiv 1902.09506)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from concepts.reading.annotation_questions import RELATION_NAMES, SPELLINGS, Annotated, Asker
from concepts.reading.assembly import YES_NO, Pictures, check_counts, dataset
from concepts.reading.box_frames import BoxFrame, annotated_size, box_numbers
from concepts.reading.json_stream import stream_keyed
from concepts.reading.record import Record, as_record
from concepts.schema import ConceptDataset, Example, Level, SceneObject
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
        ``{image id: {width, height, objects: {object id: {name, x, y, w, h, attributes, relations}}}}``; relations are a
        list of ``{name, object}`` or such objects by key. With width and height, boxes are scaled and turned with an
        image that was resized in proportion or has an EXIF orientation.
    images
        Folder with ``<image id>.jpg``.
    questions
        ``{question id: {imageId, question, answer, types: {semantic}, annotations: {question}}}``: GQA's own questions
        instead of made ones; those that are answered yes or no are kept. A question about an image without a scene graph
        is kept too, without objects, and counted in the provenance (``without_scene_graph``).
    per_image
        Pairs of made questions of each level an image gets at most; see `concepts.reading.annotation_questions`.
    seed
        Decides what is drawn.
    limit
        Keep this many images, the first; images without a scene graph follow those with one.

    Returns
    -------
    ConceptDataset
        Yes-no questions of every level, with objects and boxes. The subject of one of GQA's own questions is the first
        object that its ``annotations.question`` names; an object that is asked for and absent is no subject. An attribute
        that is a color is kept under ``color`` where the object has one only, any other under its own name. An object
        whose box has no area, passes the edge of the image by more than a pixel, or cannot be placed
        (`concepts.reading.box_frames`) has no box, and is counted.

    Raises
    ------
    DataError
        Naming file, record and field: a file that is cut or broken, a field that is missing or of the wrong kind, a
        relation to an object that is not there, a question of an unknown type, an image that is missing, unreadable,
        outside the folder, or of other proportions than its scene graph says.
    ConfigError
        For a limit or number of questions below 1.
    """
    check_counts(per_image=per_image, limit=limit)
    file, pictures = Path(scene_graphs), Pictures(Path(images))
    left_out: Counter[str] = Counter({_BEYOND: 0, "attributes that are no color": 0, "relations without opposite": 0})
    nouns: dict[str, None] = {}
    for _, record in stream_keyed(file):
        for _, thing in _objects(record):
            nouns.setdefault(thing.text("name").strip().lower())
    asker = Asker(tuple(nouns), per_image, seed, left_out)
    beyond: set[str] = set()
    scenes = _scenes(file, pictures, left_out, limit, beyond)
    if questions is None:
        examples = asker.ask(scenes)
        return dataset("gqa", [file], pictures, examples, left_out, per_image=per_image, seed=seed)
    known = {scene.id: scene for scene in scenes}
    own = _Own(known, beyond, pictures, limit, left_out)
    examples = list(own.examples(Path(questions)))
    return dataset(
        "gqa", [file, Path(questions)], pictures, examples, left_out, without_scene_graph=own.without_scene_graph
    )


def _scenes(
    file: Path, pictures: Pictures, left_out: Counter[str], limit: int | None, beyond: set[str]
) -> Iterator[Annotated]:
    """Yield the images of a file; the ids of those beyond the limit are added to `beyond`."""
    for count, (image, record) in enumerate(stream_keyed(file)):
        if limit is not None and count >= limit:
            left_out[_BEYOND] += 1
            beyond.add(image)
            continue
        objects = dict(_objects(record))
        picture = pictures.find(f"{image}.jpg", record.where)
        frame = pictures.box_frame(picture, annotated_size(record))
        things = tuple(_thing(key, value, frame, left_out) for key, value in objects.items())
        relations = tuple(r for key, value in objects.items() for r in _relations(key, value, objects, left_out))
        yield Annotated(image, picture, things, relations)


def _objects(record: Record) -> Iterator[tuple[str, Record]]:
    objects = record.field("objects")
    if not isinstance(objects, dict):
        msg = f"{record.where}: field 'objects' must hold objects by their id"
        raise DataError(msg)
    for key, value in objects.items():
        yield key, as_record(f"{record.where}, object '{key}'", value)


def _thing(key: str, value: Record, frame: BoxFrame, left_out: Counter[str]) -> SceneObject:
    box = frame.place(*box_numbers(value, *"xywh"), left_out)
    words = [w.strip().lower() for w in value.words("attributes")] if "attributes" in value.values else []
    return SceneObject(key, value.text("name").strip().lower(), box, attributes_of(words, left_out))


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


@dataclass
class _Own:
    """Reads GQA's own questions."""

    known: Mapping[str, Annotated]
    beyond: AbstractSet[str]
    """Images that have a scene graph and are not kept."""
    pictures: Pictures
    limit: int | None
    left_out: Counter[str]
    without_scene_graph: int = 0
    """Questions that are kept though their image has no scene graph."""
    bare: dict[str, Annotated] = field(default_factory=dict)
    """Images without a scene graph."""

    def examples(self, file: Path) -> Iterator[Example]:
        """Yield the questions that are answered yes or no."""
        for number, record in stream_keyed(file):
            image, answer = record.identifier("imageId"), record.text("answer").strip().lower()
            semantic = as_record(f"{record.where}, types", record.field("types")).text("semantic")
            if semantic not in LEVEL_OF:
                msg = f"{record.where}: field 'types': semantic is '{semantic[:60]}', known are {', '.join(LEVEL_OF)}"
                raise DataError(msg)
            level = LEVEL_OF[semantic]
            if answer not in YES_NO:
                self.left_out["questions not answered yes or no"] += 1
                continue
            scene = self._scene(image, record)
            if scene is None:
                self.left_out["questions about images that are not kept"] += 1
                continue
            self.without_scene_graph += image in self.bare
            absent = level == "object" and answer == "no"
            yield Example(
                id=number,
                image=scene.image,
                question=record.text("question"),
                answer=answer,
                candidates=YES_NO,
                level=level,
                kind=f"gqa_{semantic}",
                split="neutral",
                group=scene.image.name,
                labels={f"{level}:named": answer == "yes"},
                objects=scene.objects,
                subject=None if absent else self._subject(record, scene),
            )

    def _scene(self, image: str, record: Record) -> Annotated | None:
        """Return an image with its objects, without any where it has no scene graph; None beyond the limit."""
        if image in self.known:
            return self.known[image]
        if image in self.beyond:
            return None
        if image not in self.bare:
            if self.limit is not None and len(self.known) + len(self.bare) >= self.limit:
                return None
            self.bare[image] = Annotated(image, self.pictures.find(f"{image}.jpg", record.where, "imageId"), ())
        return self.bare[image]

    def _subject(self, record: Record, scene: Annotated) -> str | None:
        """Return the first object, in the order of the words, that the question names and the scene graph has."""
        annotations = record.values.get("annotations")
        if annotations is None:
            return None
        about = as_record(f"{record.where}, annotations", annotations)
        if about.values.get("question") is None:
            return None
        named = as_record(f"{about.where}, question", about.values["question"])
        first_words: dict[str, int] = {}
        for words in named.values:  # '2' or '4:6', the places of words
            start = words.partition(":")[0]
            if not (start.isascii() and start.isdecimal() and len(start) < 6):
                msg = f"{named.where}: '{words[:40]}' is no place of a word, such as '2' or '4:6'"
                raise DataError(msg)
            first_words[words] = int(start)
        there = {thing.id for thing in scene.objects}
        ids = [named.identifier(words) for words in sorted(first_words, key=first_words.__getitem__)]
        if ids and not there & set(ids):
            self.left_out["objects that a question names and no scene graph has"] += 1
        return next((number for number in ids if number in there), None)
