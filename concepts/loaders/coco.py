"""COCO: objects with boxes, and captions (Lin et al. 2014, arXiv 1405.0312)."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from concepts.nouns import canonical_noun
from concepts.reading.annotation_questions import Annotated, Asker
from concepts.reading.assembly import Pictures, check_counts, dataset
from concepts.reading.box_frames import annotated_size, box_numbers
from concepts.reading.json_stream import missing_list, stream, stream_list
from concepts.reading.record import Record
from concepts.schema import ConceptDataset, Example, SceneObject
from groundscope.core.errors import DataError

_BEYOND = "images beyond the limit"


def coco(
    instances: Path | str,
    images: Path | str,
    captions: Path | str | None = None,
    *,
    per_image: int = 3,
    seed: int = 0,
    limit: int | None = None,
) -> ConceptDataset:
    """Read COCO annotations: which of its categories are in an image, asked in POPE's words.

    The file is streamed: a box takes 48 bytes while it is read, its outline none.

    Parameters
    ----------
    instances
        File with ``images[id, file_name, width, height]``, ``annotations[id, image_id, category_id, bbox]``,
        ``categories[id, name]``, in any order. Other fields are ignored; crowds count as objects. With width and height,
        boxes are scaled and turned with an image that was resized in proportion or has an EXIF orientation.
    images
        The folder that the file names are relative to.
    captions
        File with ``annotations[image_id, caption]``: adds a question for a description of each image, whose answer is
        all of its captions, one a line. Images without objects are then kept for their captions.
    per_image
        How many categories that are in an image are asked about, the first of the file; as many that are not are drawn.
    seed
        Decides which absent ones.
    limit
        Keep this many images, the first with objects; with `captions` the first.

    Returns
    -------
    ConceptDataset
        Existence questions of split ``random``, and captions, with objects and boxes. The labels are ``object:named``
        and, as COCO annotates every category, ``object:<category>`` for each. An object whose box has no area, passes
        the edge of the image by more than a pixel, or cannot be placed (`concepts.reading.box_frames`) has no box, and is
        counted.

    Raises
    ------
    DataError
        Naming file, list, record and field: a file that is cut or broken, a field that is missing or of the wrong kind,
        an id used twice, an image or category that is not in the file, an image that is missing, unreadable, outside
        the folder, or of other proportions than the file says. Every image's header is read before this returns.
    ConfigError
        For a limit or number of questions below 1.
    """
    check_counts(per_image=per_image, limit=limit)
    file, pictures = Path(instances), Pictures(Path(images))
    left_out: Counter[str] = Counter({"images without objects": 0, _BEYOND: 0})
    held = _read(file)
    asker = Asker(
        tuple(held.categories.values()),
        per_image,
        seed,
        left_out,
        {f"object:{noun}": canonical_noun(noun) for noun in held.categories.values()},
    )
    kept = dict(_kept(held, pictures, left_out, limit, bare=captions is not None))
    files = [file]
    examples = asker.ask(kept.values())
    if captions is not None:
        files.append(Path(captions))
        examples += _described(Path(captions), kept, left_out)
    return dataset("coco", files, pictures, examples, left_out, per_image=per_image, seed=seed)


@dataclass(frozen=True)
class _Held:
    images: dict[int, tuple[str, str, tuple[int, int] | None]]
    """Id to file name, the record that has it, and its width and height."""
    categories: dict[int, str]
    boxes: dict[int, array[float]]
    """Image id to annotation id, category id, x, y, width, height, one after the other."""


def _read(file: Path) -> _Held:
    held = _Held({}, {}, {})
    for entry in stream(file):
        if entry.key == "images":
            record = entry.record()
            number = _new(record, held.images)
            held.images[number] = (record.text("file_name"), record.where, annotated_size(record))
        elif entry.key == "categories":
            record = entry.record()
            held.categories[_new(record, held.categories)] = record.text("name").strip().lower()
        elif entry.key == "annotations":
            record = entry.record()
            box = box_numbers(Record(record.where, dict(zip("xywh", _four(record), strict=True))), *"xywh")
            values = (_whole(record, "id"), _whole(record, "category_id"), *box)
            image = _whole(record, "image_id")
            if image not in held.boxes:
                held.boxes[image] = array("d")
            held.boxes[image].extend(values)
    for key in ("images", "annotations", "categories"):
        if not getattr(held, "boxes" if key == "annotations" else key):
            msg = f"{file}: {missing_list(key)}; an instances file has images, annotations and categories"
            raise DataError(msg)
    _check_references(file, held)
    return held


def _check_references(file: Path, held: _Held) -> None:
    seen: set[float] = set()
    for image, boxes in held.boxes.items():
        for number, category in zip(boxes[::6], boxes[1::6], strict=True):
            where = f"{file}: annotation {int(number)}"
            if image not in held.images:
                msg = f"{where}: field 'image_id' is {image}, which is not among the {len(held.images)} images"
                raise DataError(msg)
            if category not in held.categories:
                known = ", ".join(map(str, sorted(held.categories)[:10]))
                msg = f"{where}: field 'category_id' is {int(category)}, which is not among the categories {known}, …"
                raise DataError(msg)
            if number in seen:
                msg = f"{where}: this id was already used"
                raise DataError(msg)
            seen.add(number)


def _kept(
    held: _Held, pictures: Pictures, left_out: Counter[str], limit: int | None, *, bare: bool
) -> Iterator[tuple[int, Annotated]]:
    """Yield images with their objects; `bare` ones, without any, too."""
    count = 0
    for image, (name, where, size) in held.images.items():
        boxes = held.boxes.pop(image, None)
        if boxes is None and bare:
            boxes = array("d")
        if boxes is None:
            left_out["images without objects"] += 1
        elif limit is not None and count >= limit:
            left_out[_BEYOND] += 1
        else:
            count += 1
            rows = [boxes[i : i + 6] for i in range(0, len(boxes), 6)]
            picture = pictures.find(name, where, "file_name")
            frame = pictures.box_frame(picture, size)
            things = tuple(
                SceneObject(
                    str(int(number)), held.categories[int(category)], frame.place(x, y, w, h, left_out), _NOTHING
                )
                for number, category, x, y, w, h in rows
            )
            yield image, Annotated(str(image), picture, things)


_NOTHING: dict[str, str] = {}


def _described(file: Path, kept: dict[int, Annotated], left_out: Counter[str]) -> Iterator[Example]:
    told: dict[int, list[str]] = {}
    for record in stream_list(file, "annotations"):
        image, caption = _whole(record, "image_id"), record.text("caption")
        if image in kept:
            told.setdefault(image, []).append(caption)
        else:
            left_out["captions of images that are not kept"] += 1
    for image, scene in kept.items():
        if image not in told:
            left_out["images without captions"] += bool(scene.objects)
            continue
        yield Example(
            id=f"{scene.id}/caption",
            image=scene.image,
            question="Describe the image.",
            answer="\n".join(" ".join(text.split()) for text in told[image]),
            candidates=(),
            level="object",
            kind="caption",
            split="caption",
            group=scene.image.name,
            objects=scene.objects,
        )


def _four(record: Record) -> list[object]:
    box = record.list("bbox")
    if len(box) != 4:
        msg = f"{record.where}: field 'bbox' must hold x, y, width, height, not {len(box)} values"
        raise DataError(msg)
    return box


def _whole(record: Record, name: str) -> int:
    value = record.field(name)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 53:
        msg = f"{record.where}: field '{name}' must hold a whole number, not {str(value)[:60]!r}"
        raise DataError(msg)
    return value


def _new(record: Record, known: Container[int]) -> int:
    """Return the id of a record; raises `DataError` where it is already known."""
    number = _whole(record, "id")
    if number in known:
        msg = f"{record.where}: field 'id': {number} was already used"
        raise DataError(msg)
    return number
