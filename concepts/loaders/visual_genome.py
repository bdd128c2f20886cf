"""Visual Genome: objects, attributes, relationships and regions (Krishna et al. 2017, arXiv 1602.07332)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from concepts.image_files import FileImage
from concepts.loaders.gqa import attributes_of
from concepts.reading.annotation_questions import RELATION_NAMES, Annotated, Asker
from concepts.reading.assembly import Pictures, check_counts, dataset
from concepts.reading.box_frames import annotated_size, box_numbers
from concepts.reading.json_stream import stream_list
from concepts.reading.record import Record, as_record
from concepts.schema import ConceptDataset, Example, SceneObject
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
    """Read Visual Genome, and ask about it.

    The files are streamed, the objects twice: once for the nouns that may be absent.

    Parameters
    ----------
    objects
        ``[{image_id, objects[{object_id, x, y, w, h, names or name}]}]``.
    images
        Folder with ``<image id>.jpg``, or with the folders ``VG_100K`` and ``VG_100K_2`` as they are published.
    attributes
        ``[{image_id, attributes[{object_id, attributes[]}]}]``: adds questions about colors.
    relationships
        ``[{image_id, relationships[{predicate, subject{object_id}, object{object_id}}]}]``: adds questions about those
        that have an opposite.
    regions
        ``[{image_id or id, regions[{phrase}]}]``: adds a question for a description of each image, whose answer is all
        of its phrases.
    image_data
        ``[{image_id, width, height}]``: with it, boxes are scaled and turned with an image that was resized in
        proportion or has an EXIF orientation.
    per_image
        Pairs of questions of each level an image gets at most; see `concepts.reading.annotation_questions`.
    seed
        Decides what is drawn.
    limit
        Keep this many images, the first.

    Returns
    -------
    ConceptDataset
        Yes-no questions of every level that was annotated, and captions, with objects and boxes. What is not annotated
        counts as absent, though people who annotated freely may have passed it over. An object whose box has no area,
        passes the edge of the image by more than a pixel, or cannot be placed (`concepts.reading.box_frames`) has no box, and
        is counted.

    Raises
    ------
    DataError
        Naming file, record and field: a file that is cut or broken, a field that is missing or of the wrong kind, an
        object id used twice, an image that is missing, unreadable, outside the folder, or of other proportions than
        `image_data` says.
    ConfigError
        For a limit or number of questions below 1.
    """
    check_counts(per_image=per_image, limit=limit)
    file, pictures = Path(objects), Pictures(Path(images))
    left_out: Counter[str] = Counter({_BEYOND: 0})
    nouns: dict[str, None] = {}
    wanted: dict[str, None] = {}
    for record in stream_list(file):
        if limit is None or len(wanted) < limit:
            wanted.setdefault(record.identifier("image_id"))
        for thing in record.records("objects"):
            nouns.setdefault(_noun(thing))
    more = [Path(p) for p in (attributes, relationships, regions, image_data) if p is not None]
    told = _attributes(Path(attributes), wanted, left_out) if attributes is not None else {}
    stands = _relationships(Path(relationships), wanted, left_out) if relationships is not None else {}
    sizes = _sizes(Path(image_data), wanted) if image_data is not None else {}
    asker = Asker(tuple(nouns), per_image, seed, left_out)
    scenes = {s.id: s for s in _scenes(file, pictures, wanted, sizes, told, stands, left_out)}
    examples = asker.ask(scenes.values())
    if regions is not None:
        examples += _described(Path(regions), scenes, left_out)
    return dataset("visual_genome", [file, *more], pictures, examples, left_out, per_image=per_image, seed=seed)


def _noun(thing: Record) -> str:
    if "names" in thing.values:
        names = thing.words("names")
        if names:
            return names[0].strip().lower()
    return thing.text("name").strip().lower()


def _scenes(
    file: Path,
    pictures: Pictures,
    wanted: Mapping[str, None],
    sizes: Mapping[str, tuple[int, int] | None],
    told: Mapping[str, Mapping[str, list[str]]],
    stands: Mapping[str, list[tuple[str, str, str]]],
    left_out: Counter[str],
) -> Iterator[Annotated]:
    for record in stream_list(file):
        image = record.identifier("image_id")
        if image not in wanted:
            left_out[_BEYOND] += 1
            continue
        picture = _image(image, pictures, record)
        frame = pictures.box_frame(picture, sizes.get(image) or annotated_size(record))
        things: dict[str, SceneObject] = {}
        for thing in record.records("objects"):
            number = thing.identifier("object_id")
            if number in things:
                msg = f"{thing.where}: field 'object_id': {number} was already used in this image"
                raise DataError(msg)
            words = told.get(image, {}).get(number, [])
            box = frame.place(*box_numbers(thing, *"xywh"), left_out)
            things[number] = SceneObject(number, _noun(thing), box, attributes_of(words, left_out))
        relations = [r for r in stands.get(image, []) if r[0] in things and r[2] in things]
        left_out["relations of objects that are not annotated"] += len(stands.get(image, [])) - len(relations)
        yield Annotated(image, picture, tuple(things.values()), tuple(relations))


def _image(image: str, pictures: Pictures, record: Record) -> FileImage:
    """Find an image where it lies; one that is nowhere is named as if it lay in the folder itself."""
    names = [f"{folder}{image}.jpg" for folder in _FOLDERS]
    there = next((name for name in names if pictures.has(name)), names[0])
    return pictures.find(there, record.where, "image_id")


def _sizes(file: Path, wanted: Mapping[str, None]) -> dict[str, tuple[int, int] | None]:
    records = ((record.identifier("image_id", "id"), record) for record in stream_list(file))
    return {image: annotated_size(record) for image, record in records if image in wanted}


def _attributes(file: Path, wanted: Mapping[str, None], left_out: Counter[str]) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    for record in stream_list(file):
        image = record.identifier("image_id")
        if image not in wanted:
            left_out["attributes of images that are not kept"] += 1
            continue
        held = found.setdefault(image, {})
        for thing in record.records("attributes"):
            if thing.values.get("attributes") is not None:  # many things have none
                words = [w.strip().lower() for w in thing.words("attributes")]
                held.setdefault(thing.identifier("object_id"), []).extend(words)
    return found


def _relationships(
    file: Path, wanted: Mapping[str, None], left_out: Counter[str]
) -> dict[str, list[tuple[str, str, str]]]:
    found: dict[str, list[tuple[str, str, str]]] = {}
    for record in stream_list(file):
        image = record.identifier("image_id")
        if image not in wanted:
            left_out["relationships of images that are not kept"] += 1
            continue
        for relation in record.records("relationships"):
            name = str(relation.field("predicate")).strip().lower()  # some are empty
            ends = [
                as_record(f"{relation.where}, {end}", relation.field(end)).identifier("object_id")
                for end in ("subject", "object")
            ]
            if name in RELATION_NAMES:
                found.setdefault(image, []).append((ends[0], RELATION_NAMES[name], ends[1]))
            else:
                left_out["relations without opposite"] += 1
    return found


def _described(file: Path, scenes: Mapping[str, Annotated], left_out: Counter[str]) -> Iterator[Example]:
    for record in stream_list(file):
        image = record.identifier("image_id", "id")
        phrases = [region.text("phrase").strip() for region in record.records("regions")]
        if image not in scenes or not phrases:
            left_out["region descriptions of images that are not kept, or without phrases"] += 1
            continue
        scene = scenes[image]
        yield Example(
            id=f"{image}/caption",
            image=scene.image,
            question="Describe the image.",
            answer="; ".join(phrases),
            candidates=(),
            level="object",
            kind="caption",
            split="caption",
            group=scene.image.name,
            objects=scene.objects,
        )
