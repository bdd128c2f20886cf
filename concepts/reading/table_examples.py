"""Examples from the rows of a user's table: images, question, answer, and label columns."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from concepts.annotated_object import AnnotatedObject, Box
from concepts.concept import LEVELS
from concepts.image_files import BytesImage, FileImage
from concepts.image_source import ImageSource, NoImage
from concepts.nouns import asked_noun
from concepts.question import YES_NO
from concepts.reading.image_folder import ImageFolder
from concepts.reading.label_columns import Label, label_names, parse_labels
from concepts.reading.record import Record, abbreviate
from concepts.schema import Example
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.text import nearest

if TYPE_CHECKING:
    import pandas as pd

FIELDS = (
    "id", "image", "images", "question", "answer", "candidates", "aliases", "prefix", "group", "split", "level", "kind",
    "boxes", "subject", "prior_answer",
)  # fmt: skip
"""Columns that are fields of an example; all others are labels."""
LONGEST_NAME = 255
"""Longest name of an image file; a longer text is the image itself, as base64."""


@dataclass
class Pictures:
    """The images that rows refer to: files below a folder, or the content of files in the table."""

    folder: ImageFolder | None
    """None: paths are not resolved in a folder."""
    checks: list[tuple[str, FileImage | BytesImage]] = field(default_factory=list)
    """Images whose headers `check` reads, with the row and column that refer to them first."""
    _known: dict[str, FileImage] = field(default_factory=dict)

    def find(self, cell: Any, where: str, column: str) -> ImageSource:
        """Return the image of a cell; raises `DataError`, naming row and column, if the cell is no image."""
        value: Any = cell
        if isinstance(value, Mapping):  # the images of Hugging Face datasets
            content, path = value.get("bytes"), value.get("path")
            if content is None and not path:
                msg = f"{where}: column '{column}' holds neither bytes nor a path"
                raise DataError(msg)
            value = content if content is not None else path
        if isinstance(value, bytes | bytearray):
            return self._content(bytes(value), where, column)
        if isinstance(value, str | Path) and str(value).strip():
            text = str(value)
            if len(text) > LONGEST_NAME and not Path(text[:LONGEST_NAME]).is_absolute():
                return self._content(_from_base64(text, where, column), where, column)
            if self.folder is not None:
                return self.folder.find(text, where, column)
            if text not in self._known:
                self._known[text] = FileImage(Path(text), text)
                self.checks.append((f"{where}: column '{column}'", self._known[text]))
            return self._known[text]
        if hasattr(cell, "load") and hasattr(cell, "identity"):
            return cell
        if hasattr(cell, "save") and hasattr(cell, "mode"):  # an image of Pillow
            file = io.BytesIO()
            cell.save(file, format="PNG")
            return self._content(file.getvalue(), where, column)
        msg = f"{where}: column '{column}' must hold a path or the bytes of an image, not {_show(value)}"
        raise DataError(msg)

    def check(self) -> None:
        """Read the headers of all images; raises `DataError`, naming row and column, for a missing or unreadable one."""
        if self.folder is not None:
            self.folder.check()
        for reference, image in self.checks:
            try:
                image.check()
            except DataError as error:
                msg = f"{reference}: {error}"
                raise DataError(msg) from error

    def _content(self, data: bytes, where: str, column: str) -> BytesImage:
        image = BytesImage(data, f"{where}, {column}")
        self.checks.append((f"{where}: column '{column}'", image))
        return image


def make_examples(
    records: Iterable[Record], pictures: Pictures, *, classes: Collection[str] = (), ignore: Collection[str] = ()
) -> tuple[list[Example], dict[str, int]]:
    """Return the examples of a table's rows, and the number of labeled rows by concept.

    Raises
    ------
    DataError
        Names the row and column: for a cell that does not fit its column, a repeated id, and as `parse_labels` does.
    ConfigError
        For an unknown column in `classes` or `ignore`.
    """
    rows = list(records)
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    unknown = next((name for name in ignore if name not in names), None)
    if unknown is not None:
        msg = f"ignore: unknown column '{unknown}'; choose from {', '.join(names)}{nearest(unknown, names)}"
        raise ConfigError(msg)
    labels = _labels(rows, [n for n in names if n not in FIELDS and n not in ignore], classes)
    examples: list[Example] = []
    first: dict[str, str] = {}
    for number, row in enumerate(rows):
        own = {concept: value for concept, values in labels.items() if (value := values[number]) is not None}
        example = _example(row, number + 1, pictures, own)
        if example.id in first:
            msg = f"{row.where}: column 'id' holds '{example.id}', as {first[example.id]} does; ids must be unique"
            raise DataError(msg)
        first[example.id] = row.where.rpartition(": ")[2]
        examples.append(example)
    return examples, {concept: sum(v is not None for v in values) for concept, values in labels.items()}


def examples_of_frame(
    frame: pd.DataFrame,
    images: Path | str | None,
    name: str,
    *,
    classes: Collection[str] = (),
    ignore: Collection[str] = (),
) -> tuple[list[Example], dict[str, int]]:
    """Return the examples of a data frame, after all checks, and the number of labeled rows by concept."""
    pictures = Pictures(None if images is None else ImageFolder(Path(images)))
    columns = {str(column): frame[column].tolist() for column in frame.columns}
    records = [
        Record(f"{name}: row {label}", {column: cells[i] for column, cells in columns.items()})
        for i, label in enumerate(frame.index.tolist())
    ]
    examples, labeled = make_examples(records, pictures, classes=classes, ignore=ignore)
    pictures.check()
    return examples, labeled


def _labels(rows: Sequence[Record], names: list[str], classes: Collection[str]) -> dict[str, list[Label | None]]:
    reserved = [name for name in names if name not in label_names(names)]
    if reserved:
        msg = (
            f"{rows[0].where.rpartition(': ')[0] or 'the table'}: column '{reserved[0]}' has the name of a column that stores "
            "write themselves; rename it, or leave it out with ignore=…"
        )
        raise DataError(msg)
    return parse_labels({n: [r.values.get(n) for r in rows] for n in names}, [r.where for r in rows], classes)


def _example(row: Record, number: int, pictures: Pictures, labels: dict[str, Label]) -> Example:
    question = row.text("question")
    answer = _text(row, "answer")
    answer = answer.lower() if answer.lower() in YES_NO else answer
    candidates = tuple(w.lower() if w.lower() in YES_NO else w for w in _list(row, "candidates"))
    if not candidates and answer in YES_NO:
        candidates = YES_NO
    if candidates and (answer not in candidates or len(set(candidates)) < len(candidates) or len(candidates) < 2):
        msg = f"{row.where}: column 'candidates' must hold at least two different answers, including '{answer[:40]}'"
        raise DataError(msg)
    images = [pictures.find(value, row.where, column) for column, value in _image_cells(row)]
    noun = asked_noun(question)
    level = _text(row, "level") or "object"
    if level not in LEVELS:
        msg = (
            f"{row.where}: column 'level' holds '{level[:40]}'; choose from {', '.join(LEVELS)}{nearest(level, LEVELS)}"
        )
        raise DataError(msg)
    existence = noun is not None and candidates == YES_NO and level == "object"
    objects = _objects(row, images)
    if candidates == YES_NO:
        named: dict[str, Label] = {f"{level}:named": answer == "yes"}
        if existence:
            named[f"object:{noun}"] = answer == "yes"
        labels = named | labels  # the user's own column has precedence
    return Example(
        id=_text(row, "id") or str(number),
        image=images[0] if images else NoImage(),
        further_images=tuple(images[1:]),
        question=question,
        answer=answer,
        candidates=candidates,
        aliases=_list(row, "aliases"),
        prefix=_text(row, "prefix", strip=False),
        level=level,
        kind=_text(row, "kind") or ("existence" if existence else "question"),
        split=_text(row, "split") or "neutral",
        group=_text(row, "group") or _group(images, question),
        labels=labels,
        objects=objects,
        subject=_subject(row, objects, noun),
        prior_answer=_text(row, "prior_answer") or None,
    )


def _group(images: Sequence[ImageSource], question: str) -> str:
    """Return the group of a row that names none: its first image, or without an image its question."""
    if not images:
        return f"no image: {question}"
    image = images[0]
    return (
        image.name
        if isinstance(image, FileImage)
        else image.digest
        if isinstance(image, BytesImage)
        else image.identity
    )


def _image_cells(row: Record) -> Iterator[tuple[str, Any]]:
    """Yield the images of a row with their columns."""
    columns = [name for name in ("image", "images") if not _is_empty(row.values.get(name))]
    if len(columns) > 1:
        msg = f"{row.where}: columns 'image' and 'images' both hold images; use one of them"
        raise DataError(msg)
    for name in columns:
        cell = row.values[name]
        if name == "images" and isinstance(cell, str):
            cell = [part.strip() for part in cell.split("|")]
        for value in cell if _is_list(cell) else [cell]:
            yield name, value


def _objects(row: Record, images: Sequence[ImageSource]) -> tuple[AnnotatedObject, ...]:
    """Return the annotated objects of a row; raises `DataError` for a box outside its image."""
    cell = row.values.get("boxes")
    if _is_empty(cell):
        return ()
    advice = 'a list of {"noun": …, "box": [x0, y0, x1, y1]} with optional "id" and "attributes"'
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError) as error:
            msg = f"{row.where}: column 'boxes' must hold {advice} as JSON, not {abbreviate(cell)}"
            raise DataError(msg) from error
    objects = []
    for number, item in enumerate(cell if _is_list(cell) else [cell], 1):
        if not isinstance(item, Mapping) or not isinstance(item.get("noun"), str):
            msg = f"{row.where}: column 'boxes' must hold {advice}, not {_show(item)}"
            raise DataError(msg)
        place = f"{row.where}: column 'boxes', {item['noun']}"
        attributes = {str(k): str(v) for k, v in dict(item.get("attributes") or {}).items() if v is not None}
        try:
            box = None if item.get("box") is None else Box(*(float(side) for side in item["box"]))
            thing = AnnotatedObject(str(item.get("id") or f"o{number}"), item["noun"], box, attributes)
        except DataError as error:
            msg = f"{place}: {error}"
            raise DataError(msg) from error
        except (TypeError, ValueError) as error:
            msg = f"{place}: a box has four numbers x0, y0, x1, y1 in pixels, not {_show(item['box'])}"
            raise DataError(msg) from error
        if box is not None:
            _check_inside(box, images, place)
        objects.append(thing)
    if len({o.id for o in objects}) < len(objects):
        msg = f"{row.where}: column 'boxes' repeats an id; give each object its own"
        raise DataError(msg)
    return tuple(objects)


def _check_inside(box: Box, images: Sequence[ImageSource], place: str) -> None:
    if not images:
        msg = f"{place}: a box needs an image, and this row has none"
        raise DataError(msg)
    image = images[0]
    try:
        size = image.header.upright_size if isinstance(image, FileImage | BytesImage) else image.load().size
    except DataError as error:
        msg = f"{place}: {error}"
        raise DataError(msg) from error
    if box.x1 > size[0] + 1 or box.y1 > size[1] + 1:
        sides = ", ".join(f"{side:g}" for side in (box.x0, box.y0, box.x1, box.y1))
        msg = f"{place}: the box {sides} extends beyond its image of {size[0]} x {size[1]} pixels; give pixels of the image"
        raise DataError(msg)


def _subject(row: Record, objects: Sequence[AnnotatedObject], noun: str | None) -> str | None:
    """Return the id of the object of the question: the column's id or noun, or the only object with the noun in question."""
    subject = _text(row, "subject")
    ids = [o.id for o in objects if subject in {o.id, o.noun}] if subject else [o.id for o in objects if o.noun == noun]
    if subject and not ids:
        msg = f"{row.where}: column 'subject' holds '{subject[:40]}', which is no id or noun in column 'boxes'"
        raise DataError(msg)
    return ids[0] if len(ids) == 1 or (subject and ids) else None


def _text(row: Record, name: str, *, strip: bool = True) -> str:
    """Return a cell as text, empty if it is undefined; numbers without a needless point."""
    value = row.values.get(name)
    if _is_empty(value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int | float):
        return str(value).strip() if strip else str(value)
    msg = f"{row.where}: column '{name}' must hold text, not {_show(value)}"
    raise DataError(msg)


def _list(row: Record, name: str) -> tuple[str, ...]:
    """Return a cell with several texts: a list, or text with ``|`` between them."""
    cell = row.values.get(name)
    if _is_empty(cell):
        return ()
    parts = list(cell) if _is_list(cell) else str(cell).split("|")
    if not all(isinstance(part, str) and part.strip() for part in parts):
        msg = f"{row.where}: column '{name}' must hold texts with | between them, or a list of texts, not {_show(cell)}"
        raise DataError(msg)
    return tuple(part.strip() for part in parts)


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple) or type(value).__name__ == "ndarray"


def _is_empty(value: Any) -> bool:
    if _is_list(value):
        return not len(value)
    if isinstance(value, str):
        return not value.strip()
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value)


def _from_base64(text: str, where: str, column: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        msg = f"{where}: column '{column}' holds {len(text)} characters that are neither the name of a file nor base64: {error}"
        raise DataError(msg) from error


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
