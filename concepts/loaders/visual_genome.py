"""Visual Genome: objects, attributes, relationships and region descriptions (Krishna et al. 2017, arXiv 1602.07332)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from concepts.annotated_object import AnnotatedObject
from concepts.image_files import FileImage
from concepts.reading.annotation_questions import AnnotatedImage, QuestionMaker, attributes_of, relation_name
from concepts.reading.assembly import build_dataset, check_counts
from concepts.reading.box_frames import annotated_size, box_numbers
from concepts.reading.image_folder import ImageFolder
from concepts.reading.json_stream import stream_list
from concepts.reading.record import Record, as_record
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError

_FOLDERS = ("", "VG_100K/", "VG_100K_2/")
_BEYOND = "images beyond the limit"


def visual_genome(
    objects: Path | str,
    images: Path | str,
    attributes: Path | str | None = None,
    relationships: Path | str | None = None,
    regions: Path | str | None = None,
    *,
    image_data: Path | str | None = None,
    per_image: int = 3,
    seed: int = 0,
    limit: int | None = None,
) -> ConceptDataset:
    """Load Visual Genome annotations, and make questions about them.

    The files are streamed, the objects twice: first for the nouns of questions about absent objects.

    Parameters
    ----------
    objects
        File ``[{image_id, objects: [{object_id, x, y, w, h, names}]}]``; the last field may be ``name``.
    images
        Folder with ``<image id>.jpg``, or with the published folders ``VG_100K`` and ``VG_100K_2``.
    attributes
        File ``[{image_id, attributes: [{object_id, attributes}]}]``; adds questions about colors and other attributes.
    relationships
        File ``[{image_id, relationships: [{predicate, subject: {object_id}, object: {object_id}}]}]``; adds questions about
        relations that have an opposite, and actions that exclude another.
    regions
        File ``[{image_id, regions: [{phrase}]}]``; the id may be ``id``. Adds for each image a request for a description, whose
        answer has all of the image's phrases.
    image_data
        File ``[{image_id, width, height}]``. With it, boxes are converted for images that were resized in proportion or have an
        EXIF orientation.
    per_image
        Maximum number of question pairs of each kind for an image (`concepts.reading.annotation_questions`).
    seed
        Seed of the random choices.
    limit
        Maximum number of images; the first ones are used.

    Returns
    -------
    ConceptDataset
        Yes-no questions of the annotated levels, and captions, with objects and boxes. Objects that are not annotated count as
        absent, although annotators may have omitted them. Boxes are left out and counted if they have no area, extend beyond
        the image by more than a pixel, or cannot be converted (`concepts.reading.box_frames`); these objects have no box.

    Raises
    ------
    DataError
        Names the file, record and field: for invalid or truncated JSON, a field that is missing or of the wrong type, a
        repeated object id, or an image that is missing, unreadable, outside the folder, or of other proportions than in
        `image_data`.
    ConfigError
        For a limit or number of questions below 1.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "17.jpg")
    >>> chair = {"object_id": 1, "x": 10, "y": 20, "w": 30, "h": 40, "names": ["chair"]}
    >>> yellow = {"object_id": 1, "attributes": ["yellow"]}
    >>> _ = (folder / "objects.json").write_text(json.dumps([{"image_id": 17, "objects": [chair]}]))
    >>> _ = (folder / "attributes.json").write_text(json.dumps([{"image_id": 17, "attributes": [yellow]}]))
    >>> data = gs.loaders.visual_genome(folder / "objects.json", folder, folder / "attributes.json")
    >>> [(e.question, e.answer) for e in data if e.answer == "yes"]
    [('Is the chair yellow?', 'yes')]
    """
    check_counts(per_image=per_image, limit=limit)
    file, folder = Path(objects), ImageFolder(Path(images))
    left_out: Counter[str] = Counter({_BEYOND: 0})
    nouns: dict[str, None] = {}
    image_ids: dict[str, None] = {}
    for record in stream_list(file):
        if limit is None or len(image_ids) < limit:
            image_ids.setdefault(record.identifier("image_id"))
        for value in record.records("objects"):
            nouns.setdefault(_noun(value))
    other_files = [Path(p) for p in (attributes, relationships, regions, image_data) if p is not None]
    words = _read_attributes(Path(attributes), image_ids, left_out) if attributes is not None else {}
    relations = _read_relations(Path(relationships), image_ids, left_out) if relationships is not None else {}
    sizes = _read_sizes(Path(image_data), image_ids) if image_data is not None else {}
    annotated = {i.id: i for i in _annotated_images(file, folder, image_ids, sizes, words, relations, left_out)}
    examples = QuestionMaker(tuple(nouns), per_image, seed, left_out).make(annotated.values())
    if regions is not None:
        examples += _caption_examples(Path(regions), annotated, left_out)
    files = [file, *other_files]
    return build_dataset("visual_genome", files, folder, examples, left_out, per_image=per_image, seed=seed)


def _noun(record: Record) -> str:
    """Return the first name of an object."""
    if "names" in record.values:
        names = record.texts("names")
        if names:
            return names[0].strip().lower()
    return record.text("name").strip().lower()


def _annotated_images(
    file: Path,
    folder: ImageFolder,
    image_ids: Mapping[str, None],
    sizes: Mapping[str, tuple[int, int] | None],
    words: Mapping[str, Mapping[str, list[str]]],
    relations: Mapping[str, list[tuple[str, str, str]]],
    left_out: Counter[str],
) -> Iterator[AnnotatedImage]:
    """Yield images with their objects; `sizes`, `words` (by object) and `relations` are by image id."""
    for record in stream_list(file):
        image_id = record.identifier("image_id")
        if image_id not in image_ids:
            left_out[_BEYOND] += 1
            continue
        image = _find_image(image_id, folder, record)
        frame = folder.box_frame(image, sizes.get(image_id) or annotated_size(record))
        objects: dict[str, AnnotatedObject] = {}
        for value in record.records("objects"):
            number = value.identifier("object_id")
            if number in objects:
                msg = f"{value.where}: field 'object_id': {number} was already used in this image"
                raise DataError(msg)
            box = frame.place(*box_numbers(value, *"xywh"), left_out)
            attributes = attributes_of(words.get(image_id, {}).get(number, []), left_out, _noun(value))
            objects[number] = AnnotatedObject(number, _noun(value), box, attributes)
        image_relations = relations.get(image_id, [])
        annotated = tuple(r for r in image_relations if r[0] in objects and r[2] in objects)
        left_out["relations of objects that are not annotated"] += len(image_relations) - len(annotated)
        yield AnnotatedImage(image_id, image, tuple(objects.values()), annotated)


def _find_image(image_id: str, folder: ImageFolder, record: Record) -> FileImage:
    """Return the image in one of the published folders, or directly in the image folder."""
    names = [f"{subfolder}{image_id}.jpg" for subfolder in _FOLDERS]
    name = next((name for name in names if folder.has(name)), names[0])
    return folder.find(name, record.where, "image_id")


def _read_sizes(file: Path, image_ids: Mapping[str, None]) -> dict[str, tuple[int, int] | None]:
    records = ((record.identifier("image_id", "id"), record) for record in stream_list(file))
    return {image_id: annotated_size(record) for image_id, record in records if image_id in image_ids}


def _read_attributes(
    file: Path, image_ids: Mapping[str, None], left_out: Counter[str]
) -> dict[str, dict[str, list[str]]]:
    """Return the attribute words by image id and object id."""
    words: dict[str, dict[str, list[str]]] = {}
    for record in stream_list(file):
        image_id = record.identifier("image_id")
        if image_id not in image_ids:
            left_out["attributes of images that are left out"] += 1
            continue
        words_of_object = words.setdefault(image_id, {})
        for value in record.records("attributes"):
            if value.values.get("attributes") is not None:  # null for many objects
                object_words = [w.strip().lower() for w in value.texts("attributes")]
                words_of_object.setdefault(value.identifier("object_id"), []).extend(object_words)
    return words


def _read_relations(
    file: Path, image_ids: Mapping[str, None], left_out: Counter[str]
) -> dict[str, list[tuple[str, str, str]]]:
    """Return the relations that have an opposite by image id: first object id, relation, second object id."""
    relations: dict[str, list[tuple[str, str, str]]] = {}
    for record in stream_list(file):
        image_id = record.identifier("image_id")
        if image_id not in image_ids:
            left_out["relationships of images that are left out"] += 1
            continue
        for relation in record.records("relationships"):
            name = str(relation.field("predicate")).strip().lower()  # some are empty
            ends = [
                as_record(f"{relation.where}, {end}", relation.field(end)).identifier("object_id")
                for end in ("subject", "object")
            ]
            standard_name = relation_name(name)
            if standard_name is not None:
                relations.setdefault(image_id, []).append((ends[0], standard_name, ends[1]))
            else:
                left_out["relations without opposite"] += 1
    return relations


def _caption_examples(file: Path, annotated: Mapping[str, AnnotatedImage], left_out: Counter[str]) -> Iterator[Example]:
    for record in stream_list(file):
        image_id = record.identifier("image_id", "id")
        phrases = [region.text("phrase").strip() for region in record.records("regions")]
        if image_id not in annotated or not phrases:
            left_out["region descriptions of images that are left out, or without phrases"] += 1
            continue
        image = annotated[image_id]
        yield Example(
            id=f"{image_id}/caption",
            image=image.image,
            question="Describe the image.",
            answer="; ".join(phrases),
            candidates=(),
            level="object",
            kind="caption",
            split="caption",
            group=image.image.name,
            objects=image.objects,
        )
