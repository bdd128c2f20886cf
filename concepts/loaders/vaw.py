"""VAW: attributes that an object has, and attributes that it does not have (Pham et al. 2021, arXiv 2106.09707)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from concepts.annotated_object import AnnotatedObject
from concepts.image_files import FileImage
from concepts.nouns import is_the, singular
from concepts.question import YES_NO, yes_or_no
from concepts.reading.annotation_questions import ATTRIBUTE_KINDS, SPELLINGS, attribute_question, attributes_of
from concepts.reading.assembly import build_dataset, check_counts
from concepts.reading.box_frames import box_numbers
from concepts.reading.exclusive_values import attribute_kinds
from concepts.reading.image_folder import ImageFolder
from concepts.reading.outlines import read_outline
from concepts.reading.record import Record
from concepts.reading.records import read_json_records
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError
from groundscope.core.text import format_count

_FOLDERS = ("", "VG_100K/", "VG_100K_2/")
_BEYOND = "instances of images beyond the limit"


def vaw(attributes: Path | str, images: Path | str, *, per_image: int = 3, limit: int | None = None) -> ConceptDataset:
    """Load VAW annotations, and make questions about the attributes that annotators confirmed or denied.

    Parameters
    ----------
    attributes
        A JSON array or JSON lines of ``image_id, instance_id, instance_bbox [x, y, width, height], instance_polygon,
        object_name, positive_attributes, negative_attributes``; ``instance_polygon`` is a list of polygons of ``[x, y]``
        points, or null.
    images
        Folder with ``<image id>.jpg``, or with Visual Genome's folders ``VG_100K`` and ``VG_100K_2``.
    per_image
        Maximum number of attributes to ask about for an object, of the true and of the false ones each; the first ones.
    limit
        Maximum number of images; the first ones are used.

    Returns
    -------
    ConceptDataset
        Yes-no questions of level attribute, with objects, boxes and outlines. Kinds are ``color``, the kinds of
        `concepts.reading.exclusive_values`, and otherwise ``attribute``. Only objects whose noun is unique among the
        annotated objects of the image are asked about.

    Raises
    ------
    DataError
        Names the file, record and field: for invalid JSON, a field that is missing or of the wrong type, or an image that is
        missing, unreadable or outside the folder.
    ConfigError
        For a limit or number of questions below 1.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "17.jpg")
    >>> record = {
    ...     "image_id": "17", "instance_id": "1", "instance_bbox": [10, 20, 30, 40], "instance_polygon": None,
    ...     "object_name": "table", "positive_attributes": ["wooden"], "negative_attributes": ["red"],
    ... }
    >>> _ = (folder / "vaw.json").write_text(json.dumps([record]))
    >>> [(e.question, e.answer, e.kind) for e in gs.loaders.vaw(folder / "vaw.json", folder)]
    [('Is the table wooden?', 'yes', 'material'), ('Is the table red?', 'no', 'color')]
    """
    check_counts(per_image=per_image, limit=limit)
    file, folder = Path(attributes), ImageFolder(Path(images))
    left_out: Counter[str] = Counter({_BEYOND: 0})
    by_image: dict[str, _Image] = {}
    for record in read_json_records(file):
        number = record.identifier("image_id")
        if number not in by_image:
            if limit is not None and len(by_image) >= limit:
                left_out[_BEYOND] += 1
                continue
            by_image[number] = _Image(number, _find(number, folder, record))
        by_image[number].instances.append(_instance(record, folder, by_image[number].image, left_out))
    examples = [e for image in by_image.values() for e in _questions(image, per_image, left_out)]
    return build_dataset("vaw", [file], folder, examples, left_out, per_image=per_image)


@dataclass(frozen=True)
class _Instance:
    item: AnnotatedObject
    true: tuple[str, ...]
    false: tuple[str, ...]


@dataclass(frozen=True)
class _Image:
    id: str
    image: FileImage
    instances: list[_Instance] = field(default_factory=list)


def _find(number: str, folder: ImageFolder, record: Record) -> FileImage:
    names = [f"{subfolder}{number}.jpg" for subfolder in _FOLDERS]
    return folder.find(next((name for name in names if folder.has(name)), names[0]), record.where, "image_id")


def _instance(record: Record, folder: ImageFolder, image: FileImage, left_out: Counter[str]) -> _Instance:
    values = record.list("instance_bbox")
    if len(values) != 4:
        msg = f"{record.where}: field 'instance_bbox' must hold x, y, width, height, not {format_count(len(values), 'value')}"
        raise DataError(msg)
    box = box_numbers(Record(record.where, dict(zip("xywh", values, strict=True))), *"xywh")
    noun = record.text("object_name").strip().lower()
    true, false = (_words(record, name) for name in ("positive_attributes", "negative_attributes"))
    contradictions = set(true) & set(false)
    left_out["attributes that are both true and false"] += len(contradictions)
    true, false = (tuple(w for w in words if w not in contradictions) for words in (true, false))
    frame = folder.box_frame(image, None)
    item = AnnotatedObject(
        record.identifier("instance_id"),
        noun,
        frame.place(*box, left_out),
        MappingProxyType(attributes_of(true, Counter(), noun)),
        frame.place_outline(read_outline(record, "instance_polygon"), record.where),
    )
    return _Instance(item, true, false)


def _words(record: Record, name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip().lower() for word in record.texts(name)))


def _questions(image: _Image, per_image: int, left_out: Counter[str]) -> Iterator[Example]:
    counts = Counter(singular(instance.item.noun) for instance in image.instances)
    objects = tuple(instance.item for instance in image.instances)
    for instance in image.instances:
        item = instance.item
        if counts[singular(item.noun)] > 1:
            left_out["objects whose noun is not unique"] += 1
            continue
        labels = {f"attribute:{word}": truth for truth in (True, False) for word in _chosen(instance, truth)}
        for truth in (True, False):
            for word in _chosen(instance, truth)[:per_image]:
                yield _example(image, item, objects, word, truth, labels)


def _chosen(instance: _Instance, truth: bool) -> tuple[str, ...]:
    return instance.true if truth else instance.false


def _example(
    image: _Image,
    item: AnnotatedObject,
    objects: tuple[AnnotatedObject, ...],
    word: str,
    truth: bool,
    labels: Mapping[str, bool],
) -> Example:
    word = SPELLINGS.get(word, word)
    kind = "color" if word in SPELLINGS else next(iter(attribute_kinds([word], item.noun)), "attribute")
    text = attribute_question(kind, word, item.noun) if kind in ATTRIBUTE_KINDS else f"{is_the(item.noun)} {word}?"
    return Example(
        id=f"{image.id}/{item.id}/{word}", image=image.image, question=text, answer=yes_or_no(truth), candidates=YES_NO,
        level="attribute", kind=kind, split="neutral", group=image.image.name,
        labels={**labels, "attribute:named": truth}, objects=objects, subject=item.id,
    )  # fmt: skip
