"""COCO: objects with boxes, and captions (Lin et al. 2014, arXiv 1405.0312)."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from concepts.annotated_object import AnnotatedObject
from concepts.nouns import canonical_noun
from concepts.outlines import Outline
from concepts.reading.annotation_questions import AnnotatedImage, QuestionMaker
from concepts.reading.assembly import build_dataset, check_counts
from concepts.reading.box_frames import annotated_size, box_numbers
from concepts.reading.image_folder import ImageFolder
from concepts.reading.json_stream import missing_list, stream, stream_list
from concepts.reading.outlines import read_outline
from concepts.reading.record import Record
from concepts.run_length_masks import RunLengthMask
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError
from groundscope.core.text import format_count

_BEYOND = "images beyond the limit"


def coco(
    instances: Path | str,
    images: Path | str,
    captions: Path | str | None = None,
    *,
    outlines: bool = False,
    per_image: int = 3,
    seed: int = 0,
    limit: int | None = None,
) -> ConceptDataset:
    """Load COCO annotations, and make questions about the presence of its categories, in POPE's wording.

    The file is streamed: a box needs 48 bytes of memory while the file is read. Files in the layout of LVIS, whose images
    have ``neg_category_ids``, are read too: only these categories are certainly absent.

    Parameters
    ----------
    instances
        File with the lists ``images`` (``id, file_name, width, height``), ``annotations`` (``id, image_id, category_id, bbox``)
        and ``categories`` (``id, name``), in any order; optional are ``segmentation`` of annotations, and ``neg_category_ids``
        and ``coco_url`` (instead of ``file_name``) of images, as in LVIS. Other fields are ignored; crowds count as
        objects. With width and height, boxes are converted for images that were resized in proportion or have an EXIF
        orientation.
    images
        Folder of the images.
    captions
        File with the list ``annotations`` (``image_id, caption``). It adds for each image a request for a description, whose
        answer has all of the image's captions, one per line; images without objects are then included.
    outlines
        Whether to read ``segmentation`` as outlines of the objects, with which pairs change the object only and not its box:
        polygons, and masks as run lengths, compressed or not, as those of crowds. They need about 300 bytes of memory each.
    per_image
        Maximum number of present categories to ask about for an image, the first in the file; for each, one question about a
        random absent category.
    seed
        Seed of the random choices.
    limit
        Maximum number of images; the first with objects, or with `captions` the first, are used.

    Returns
    -------
    ConceptDataset
        Existence questions of split ``random``, and captions, with objects and boxes. The labels are ``object:named`` and,
        because COCO annotates all of its categories, ``object:<category>`` for each category; for LVIS only for that of the
        question. Boxes are left out and counted if
        they have no area, extend beyond the image by more than a pixel, or cannot be converted
        (`concepts.reading.box_frames`); these objects have no box.

    Raises
    ------
    DataError
        Names the file, list, record and field: for invalid or truncated JSON, a field that is missing or of the wrong type, a
        repeated id, an image or category that is not in the file, a mask of another size than its image, or an image that is
        missing, unreadable, outside the folder, or of other proportions than in the file.
    ConfigError
        For a limit or number of questions below 1.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> content = {
    ...     "images": [{"id": 1, "file_name": "a.png", "width": 112, "height": 112}],
    ...     "categories": [{"id": 7, "name": "chair"}, {"id": 8, "name": "dog"}],
    ...     "annotations": [{"id": 3, "image_id": 1, "category_id": 7, "bbox": [10, 20, 30, 40]}],
    ... }
    >>> _ = (folder / "instances.json").write_text(json.dumps(content))
    >>> data = gs.loaders.coco(folder / "instances.json", folder)
    >>> [(example.question, example.answer) for example in data]
    [('Is there a chair in the image?', 'yes'), ('Is there a dog in the image?', 'no')]
    >>> data[0].objects[0].box
    Box(x0=10.0, y0=20.0, x1=40.0, y1=60.0)
    """
    check_counts(per_image=per_image, limit=limit)
    file, folder = Path(instances), ImageFolder(Path(images))
    left_out: Counter[str] = Counter({"images without objects": 0, _BEYOND: 0})
    content = _read(file, outlines=outlines)
    closed = {f"object:{noun}": canonical_noun(noun) for noun in content.categories.values()}
    maker = QuestionMaker(
        tuple(content.categories.values()), per_image, seed, left_out, None if content.absent else closed
    )
    annotated = dict(_annotated_images(content, folder, left_out, limit, without_objects=captions is not None))
    files = [file]
    examples = maker.make(annotated.values())
    if captions is not None:
        files.append(Path(captions))
        examples += _caption_examples(Path(captions), annotated, left_out)
    return build_dataset("coco", files, folder, examples, left_out, per_image=per_image, seed=seed)


@dataclass(frozen=True)
class _Content:
    images: dict[int, tuple[str, str, tuple[int, int] | None]]
    """Id to file name, place in the annotation file, and annotated width and height."""
    categories: dict[int, str]
    boxes: dict[int, array[float]]
    """Image id to the image's annotations, six numbers each: id, category id, x, y, width, height."""
    outlines: dict[int, tuple[array[float], ...] | RunLengthMask]
    """Annotation id to its polygons or mask; empty unless they are read."""
    absent: dict[int, tuple[int, ...]]
    """Image id to the categories that are certainly absent; empty for COCO, whose other categories all are."""

    def pop_outline(self, annotation: int) -> Outline:
        """Return the outline of an annotation, and forget it."""
        outline = self.outlines.pop(annotation, ())
        return tuple(map(tuple, outline)) if isinstance(outline, tuple) else outline

    def absent_nouns(self, image: int) -> tuple[str, ...] | None:
        """Return the nouns of the categories that are certainly absent from an image; None if all others are."""
        if not self.absent:
            return None
        return tuple(self.categories[number] for number in self.absent.get(image, ()) if number in self.categories)


def _read(file: Path, *, outlines: bool) -> _Content:
    content = _Content({}, {}, {}, {}, {})
    for entry in stream(file):
        if entry.key == "images":
            record = entry.record()
            number = _new_id(record, content.images)
            content.images[number] = (_file_name(record), record.where, annotated_size(record))
            if "neg_category_ids" in record.values:
                content.absent[number] = tuple(x for x in record.list("neg_category_ids") if isinstance(x, int))
        elif entry.key == "categories":
            record = entry.record()
            content.categories[_new_id(record, content.categories)] = record.text("name").strip().lower()
        elif entry.key == "annotations":
            record = entry.record()
            box = box_numbers(Record(record.where, dict(zip("xywh", _box_values(record), strict=True))), *"xywh")
            values = (_whole_number(record, "id"), _whole_number(record, "category_id"), *box)
            image = _whole_number(record, "image_id")
            if image not in content.boxes:
                content.boxes[image] = array("d")
            content.boxes[image].extend(values)
            if outlines and (outline := read_outline(record, "segmentation")):
                compact = tuple(array("f", polygon) for polygon in outline) if isinstance(outline, tuple) else outline
                content.outlines[values[0]] = compact
    for key, part in (("images", content.images), ("annotations", content.boxes), ("categories", content.categories)):
        if not part:
            msg = f"{file}: {missing_list(key)}; an instances file has images, annotations and categories"
            raise DataError(msg)
    _check_references(file, content)
    return content


def _check_references(file: Path, content: _Content) -> None:
    """Raise `DataError` for an annotation with an unknown image or category, or a repeated id."""
    ids: set[float] = set()
    for image, boxes in content.boxes.items():
        for number, category in zip(boxes[::6], boxes[1::6], strict=True):
            where = f"{file}: annotation {int(number)}"
            if image not in content.images:
                msg = f"{where}: field 'image_id' is {image}, which is not among the {format_count(len(content.images), 'image')}"
                raise DataError(msg)
            if category not in content.categories:
                some = ", ".join(map(str, sorted(content.categories)[:10]))
                msg = f"{where}: field 'category_id' is {int(category)}, which is not among the categories {some}, …"
                raise DataError(msg)
            if number in ids:
                msg = f"{where}: this id was already used"
                raise DataError(msg)
            ids.add(number)


def _annotated_images(
    content: _Content, folder: ImageFolder, left_out: Counter[str], limit: int | None, *, without_objects: bool
) -> Iterator[tuple[int, AnnotatedImage]]:
    """Yield images with their objects, and also images without objects if `without_objects` is True."""
    count = 0
    for image_id, (name, where, size) in content.images.items():
        boxes = content.boxes.pop(image_id, None)
        if boxes is None and without_objects:
            boxes = array("d")
        if boxes is None:
            left_out["images without objects"] += 1
        elif limit is not None and count >= limit:
            left_out[_BEYOND] += 1
        else:
            count += 1
            rows = [boxes[i : i + 6] for i in range(0, len(boxes), 6)]
            image = folder.find(name, where, "file_name")
            frame = folder.box_frame(image, size)
            objects = tuple(
                AnnotatedObject(
                    str(int(number)),
                    content.categories[int(category)],
                    frame.place(x, y, w, h, left_out),
                    _NO_ATTRIBUTES,
                    frame.place_outline(content.pop_outline(int(number)), f"{where}: annotation {int(number)}"),
                )
                for number, category, x, y, w, h in rows
            )
            yield image_id, AnnotatedImage(str(image_id), image, objects, absent=content.absent_nouns(image_id))


_NO_ATTRIBUTES: dict[str, str] = {}
"""The attributes of all objects: one mapping instead of one per object."""


def _caption_examples(file: Path, annotated: dict[int, AnnotatedImage], left_out: Counter[str]) -> Iterator[Example]:
    captions: dict[int, list[str]] = {}
    for record in stream_list(file, "annotations"):
        image_id, caption = _whole_number(record, "image_id"), record.text("caption")
        if image_id in annotated:
            captions.setdefault(image_id, []).append(caption)
        else:
            left_out["captions of images that are left out"] += 1
    for image_id, image in annotated.items():
        if image_id not in captions:
            left_out["images without captions"] += bool(image.objects)
            continue
        yield Example(
            id=f"{image.id}/caption",
            image=image.image,
            question="Describe the image.",
            answer="\n".join(" ".join(text.split()) for text in captions[image_id]),
            candidates=(),
            level="object",
            kind="caption",
            split="caption",
            group=image.image.name,
            objects=image.objects,
        )


def _file_name(record: Record) -> str:
    """Return the name of the image file; LVIS has only its address, which ends in the folder and the name."""
    if "file_name" not in record.values and "coco_url" in record.values:
        return record.text("coco_url").rstrip("/").rsplit("/", 1)[-1]
    return record.text("file_name")


def _box_values(record: Record) -> list[object]:
    box = record.list("bbox")
    if len(box) != 4:
        msg = f"{record.where}: field 'bbox' must hold x, y, width, height, not {format_count(len(box), 'value')}"
        raise DataError(msg)
    return box


def _whole_number(record: Record, name: str) -> int:
    value = record.field(name)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 53:
        msg = f"{record.where}: field '{name}' must hold a whole number, not {str(value)[:60]!r}"
        raise DataError(msg)
    return value


def _new_id(record: Record, ids: Container[int]) -> int:
    """Return the id of a record; raises `DataError` if it is among `ids`."""
    number = _whole_number(record, "id")
    if number in ids:
        msg = f"{record.where}: field 'id': {number} was already used"
        raise DataError(msg)
    return number
