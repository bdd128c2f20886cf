"""GQA: scene graphs with attributes and relations, and questions (Hudson & Manning 2019, arXiv 1902.09506)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from concepts.annotated_object import AnnotatedObject
from concepts.concept import Level
from concepts.question import YES_NO
from concepts.reading.annotation_questions import (
    UNUSED_ATTRIBUTES,
    AnnotatedImage,
    QuestionMaker,
    attributes_of,
    relation_name,
)
from concepts.reading.assembly import build_dataset, check_counts
from concepts.reading.box_frames import BoxFrame, annotated_size, box_numbers
from concepts.reading.image_folder import ImageFolder
from concepts.reading.json_stream import stream_keyed
from concepts.reading.record import Record, as_record
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError
from groundscope.core.text import nearest

LEVEL_OF: Mapping[str, Level] = MappingProxyType(
    {"obj": "object", "cat": "object", "attr": "attribute", "global": "attribute", "rel": "relation"}
)
"""Semantic type of a GQA question to its level; ``global`` questions ask for an attribute of the whole image."""
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
    """Load GQA scene graphs, and make questions about them or load GQA's own questions.

    Both files are streamed, the scene graphs twice: first for the nouns of questions about absent objects.

    Parameters
    ----------
    scene_graphs
        File ``{image id: {width, height, objects: {object id: {name, x, y, w, h, attributes, relations}}}}``; relations are a
        list of ``{name, object}``, or an object with such values. With width and height, boxes are converted for images
        that were resized in proportion or have an EXIF orientation.
    images
        Folder with ``<image id>.jpg``.
    questions
        File ``{question id: {imageId, question, answer, types: {semantic}, annotations: {question}}}``: load GQA's questions
        with the answer yes or no, instead of making questions. Questions about images without a scene graph have no objects,
        and are counted in the provenance (``without_scene_graph``).
    per_image
        Maximum number of question pairs to make of each kind for an image (`concepts.reading.annotation_questions`).
    seed
        Seed of the random choices.
    limit
        Maximum number of images; the first ones are used, those with a scene graph before those without.

    Returns
    -------
    ConceptDataset
        Yes-no questions of all levels, with objects and boxes. The subject of a GQA question is the first object in its
        ``annotations.question``; a question about an absent object has none. The color of an object is its attribute
        ``color`` if it has exactly one; attributes that exclude others are under their kind, such as ``material``
        (`concepts.reading.exclusive_values`), and all others under their own names. Boxes are left out and counted if they have
        no area, extend beyond the image by more than a pixel, or cannot be converted (`concepts.reading.box_frames`); these
        objects have no box.

    Raises
    ------
    DataError
        Names the file, record and field: for invalid or truncated JSON, a field that is missing or of the wrong type, a relation
        to an object that is not in the image, a question of an unknown type, or an image that is missing, unreadable, outside
        the folder, or of other proportions than in its scene graph.
    ConfigError
        For a limit or number of questions below 1.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "17.jpg")
    >>> chair = {"name": "chair", "x": 10, "y": 20, "w": 30, "h": 40, "attributes": ["yellow"], "relations": []}
    >>> graph = {"17": {"width": 112, "height": 112, "objects": {"1": chair}}}
    >>> _ = (folder / "scene_graphs.json").write_text(json.dumps(graph))
    >>> data = gs.loaders.gqa(folder / "scene_graphs.json", folder)
    >>> [(e.question, e.answer) for e in data if e.answer == "yes"]
    [('Is the chair yellow?', 'yes')]
    """
    check_counts(per_image=per_image, limit=limit)
    file, folder = Path(scene_graphs), ImageFolder(Path(images))
    left_out: Counter[str] = Counter({_BEYOND: 0, UNUSED_ATTRIBUTES: 0, "relations without opposite": 0})
    nouns: dict[str, None] = {}
    for _, record in stream_keyed(file):
        for _, value in _object_records(record):
            nouns.setdefault(value.text("name").strip().lower())
    beyond_limit: set[str] = set()
    annotated = _annotated_images(file, folder, left_out, limit, beyond_limit)
    if questions is None:
        examples = QuestionMaker(tuple(nouns), per_image, seed, left_out).make(annotated)
        return build_dataset("gqa", [file], folder, examples, left_out, per_image=per_image, seed=seed)
    reader = _QuestionReader({image.id: image for image in annotated}, beyond_limit, folder, limit, left_out)
    examples = list(reader.examples(Path(questions)))
    return build_dataset(
        "gqa", [file, Path(questions)], folder, examples, left_out, without_scene_graph=reader.without_scene_graph
    )


def _annotated_images(
    file: Path, folder: ImageFolder, left_out: Counter[str], limit: int | None, beyond_limit: set[str]
) -> Iterator[AnnotatedImage]:
    """Yield the images of a file, and add the ids of images beyond the limit to `beyond_limit`."""
    for count, (image_id, record) in enumerate(stream_keyed(file)):
        if limit is not None and count >= limit:
            left_out[_BEYOND] += 1
            beyond_limit.add(image_id)
            continue
        records = dict(_object_records(record))
        image = folder.find(f"{image_id}.jpg", record.where)
        frame = folder.box_frame(image, annotated_size(record))
        objects = tuple(_read_object(key, value, frame, left_out) for key, value in records.items())
        relations = tuple(r for key, value in records.items() for r in _relations(key, value, records, left_out))
        yield AnnotatedImage(image_id, image, objects, relations)


def _object_records(record: Record) -> Iterator[tuple[str, Record]]:
    objects = record.field("objects")
    if not isinstance(objects, dict):
        msg = f"{record.where}: field 'objects' must hold a JSON object with a value for each object id"
        raise DataError(msg)
    for key, value in objects.items():
        yield key, as_record(f"{record.where}, object '{key}'", value)


def _read_object(key: str, value: Record, frame: BoxFrame, left_out: Counter[str]) -> AnnotatedObject:
    box = frame.place(*box_numbers(value, *"xywh"), left_out)
    words = [w.strip().lower() for w in value.texts("attributes")] if "attributes" in value.values else []
    noun = value.text("name").strip().lower()
    return AnnotatedObject(key, noun, box, attributes_of(words, left_out, noun))


def _relations(
    key: str, value: Record, objects: Mapping[str, Record], left_out: Counter[str]
) -> Iterator[tuple[str, str, str]]:
    """Yield the relations of an object that have an opposite, and count the others."""
    relations = value.values.get("relations", [])
    if not isinstance(relations, list | dict):
        msg = f"{value.where}: field 'relations' must hold a list or a JSON object"
        raise DataError(msg)
    for number, item in enumerate(relations.values() if isinstance(relations, dict) else relations, 1):
        relation = as_record(f"{value.where}, relation {number}", item)
        name, other = relation.text("name").strip().lower(), relation.identifier("object")
        if other not in objects:
            msg = f"{relation.where}: field 'object' is '{other}', which is not an object of this image"
            raise DataError(msg)
        standard_name = relation_name(name)
        if standard_name is not None:
            yield key, standard_name, other
        else:
            left_out["relations without opposite"] += 1


@dataclass
class _QuestionReader:
    """Reads GQA's own questions."""

    annotated: Mapping[str, AnnotatedImage]
    """Images with a scene graph."""
    beyond_limit: AbstractSet[str]
    """Ids of images with a scene graph that are left out."""
    folder: ImageFolder
    limit: int | None
    left_out: Counter[str]
    without_scene_graph: int = 0
    """Number of questions about images without a scene graph."""
    not_annotated: dict[str, AnnotatedImage] = field(default_factory=dict)
    """Images without a scene graph."""

    def examples(self, file: Path) -> Iterator[Example]:
        """Yield the questions with the answer yes or no."""
        for number, record in stream_keyed(file):
            image_id, answer = record.identifier("imageId"), record.text("answer").strip().lower()
            semantic = as_record(f"{record.where}, types", record.field("types")).text("semantic")
            if semantic not in LEVEL_OF:
                choices = f"{', '.join(LEVEL_OF)}{nearest(semantic, LEVEL_OF)}"
                msg = f"{record.where}: field 'types': semantic is '{semantic[:60]}'; choose from {choices}"
                raise DataError(msg)
            level = LEVEL_OF[semantic]
            if answer not in YES_NO:
                self.left_out["questions not answered yes or no"] += 1
                continue
            image = self._image(image_id, record)
            if image is None:
                self.left_out["questions about images that are left out"] += 1
                continue
            self.without_scene_graph += image_id in self.not_annotated
            absent = level == "object" and answer == "no"
            yield Example(
                id=number,
                image=image.image,
                question=record.text("question"),
                answer=answer,
                candidates=YES_NO,
                level=level,
                kind=f"gqa_{semantic}",
                split="neutral",
                group=image.image.name,
                labels={f"{level}:named": answer == "yes"},
                objects=image.objects,
                subject=None if absent else self._subject(record, image),
            )

    def _image(self, image_id: str, record: Record) -> AnnotatedImage | None:
        """Return an image with its objects, without objects if it has no scene graph; None if it is beyond the limit."""
        if image_id in self.annotated:
            return self.annotated[image_id]
        if image_id in self.beyond_limit:
            return None
        if image_id not in self.not_annotated:
            if self.limit is not None and len(self.annotated) + len(self.not_annotated) >= self.limit:
                return None
            image = self.folder.find(f"{image_id}.jpg", record.where, "imageId")
            self.not_annotated[image_id] = AnnotatedImage(image_id, image, ())
        return self.not_annotated[image_id]

    def _subject(self, record: Record, image: AnnotatedImage) -> str | None:
        """Return the first object, in the order of the question's words, that is in the scene graph."""
        annotations = record.values.get("annotations")
        if annotations is None:
            return None
        annotation = as_record(f"{record.where}, annotations", annotations)
        if annotation.values.get("question") is None:
            return None
        object_of_words = as_record(f"{annotation.where}, question", annotation.values["question"])
        first_word: dict[str, int] = {}
        for words in object_of_words.values:  # '2' or '4:6': indices of words
            start = words.partition(":")[0]
            if not (start.isascii() and start.isdecimal() and len(start) < 6):
                msg = f"{object_of_words.where}: '{words[:40]}' is not an index of words, such as '2' or '4:6'"
                raise DataError(msg)
            first_word[words] = int(start)
        present = {item.id for item in image.objects}
        ids = [object_of_words.identifier(words) for words in sorted(first_word, key=first_word.__getitem__)]
        if ids and not present & set(ids):
            self.left_out["objects of questions that are not in the scene graph"] += 1
        return next((number for number in ids if number in present), None)
