"""Records of questions, verdicts and lists of ids, shared by the files of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from behavior.benchmarks.image_cells import COLUMN, find_image
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, ImageCell
from concepts.loaders.table import read_rows
from concepts.reading.record import Record, abbreviate, is_text
from groundscope.core.errors import DataError
from groundscope.core.files import write_whole

_LONGEST_CELL = 10_000
"""Characters of a cell that is repeated in answer files; images in base64 are longer."""
VERDICT_IDS = ("id", "question_id", "index", "image_id")
"""Fields of a verdict that may identify the question."""


def read_questions(path: Path, make: Callable[[int, Record], BenchmarkQuestion | None]) -> list[BenchmarkQuestion]:
    """Return the questions of a file: `make` gets the number of each record, from 0, and the record; None leaves it out.

    Images inside the file become `image_cell`. In tables of VLMEvalKit a row may name the index of another row, which has the
    image.
    """
    questions: list[BenchmarkQuestion] = []
    cells: dict[str, ImageCell] = {}
    for number, record in enumerate(read_rows(path)):
        cell = find_image(record, path, number)
        if cell is not None and "index" in record.values:
            cells[str(record.values["index"])] = cell
        question = make(number, record)
        if question is not None:
            questions.append(replace(question, record=short_cells(record), image_cell=cell))
    if not cells:
        return questions
    return [
        replace(q, image_cell=cells[other], image="" if q.image == other else q.image)
        if q.image_cell is None and (other := str(q.record.get(COLUMN))) in cells
        else q
        for q in questions
    ]


def short_cells(record: Record) -> dict[str, Any]:
    """Return the fields of a record without images: bytes, and long texts of a table."""
    return {
        name: value
        for name, value in record.values.items()
        if not isinstance(value, bytes | dict) and not (is_text(value) and len(value) > _LONGEST_CELL)
    }


def read_answered(
    path: Path, make: Callable[[int, Record], BenchmarkQuestion], texts: Sequence[str], *, missing: str | None = None
) -> list[AnsweredQuestion]:
    """Return the answered questions of a file whose records hold the question and the answer.

    `missing` is the text of an empty cell of a table; None: it is an error.

    Raises
    ------
    DataError
        Names the file and record: for an answer that is missing or not text.
    """
    rows = []
    for number, record in enumerate(read_rows(path)):
        text = record.field(*texts)
        text = missing if text is None and record.table else text
        if not is_text(text):
            msg = f"{record.where}: the answer must be text, not {abbreviate(text)}"
            raise DataError(msg)
        rows.append(AnsweredQuestion(make(number, record), text, record.where))
    return rows


def label_of(record: Record, name: str, labels: Mapping[str, str]) -> str:
    """Return what a field means by a table of its values in lower case; raises `DataError` for another value."""
    value = str(record.field(name)).strip().lower()
    if value not in labels:
        msg = f"{record.where}: field '{name}' is '{value[:40]}'; it must be one of {', '.join(labels)}"
        raise DataError(msg)
    return labels[value]


def text_or_empty(record: Record, *names: str) -> str:
    """Return the first of these fields that holds text or a number, as text; empty if none does."""
    for name in names:
        value = record.values.get(name)
        if (is_text(value) and value.strip()) or (isinstance(value, int) and not isinstance(value, bool)):
            return str(value)
    return ""


def verdicts(
    path: Path, read: Callable[[Record], Any], ids: Sequence[str] = VERDICT_IDS
) -> list[tuple[str | None, Any, str]]:
    """Return the verdicts of a file: id (None in records without one), what `read` makes of the record, and the place."""
    result: list[tuple[str | None, Any, str]] = []
    for record in read_rows(path):
        number = next((record.identifier(n) for n in ids if n in record.values), None)
        result.append((number, read(record), record.where))
    if not result:
        msg = f"{path}: the file contains no verdicts"
        raise DataError(msg)
    return result


def reply_of(record: Record, *names: str) -> str:
    """Return a judge's reply: a field with text, or the message of a stored response (``choices[0].message.content``)."""
    choices = record.values.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        message = choices[0].get("message")
        if isinstance(message, dict) and is_text(message.get("content")):
            return message["content"]
    value = record.field(*names)
    if not is_text(value):
        msg = f"{record.where}: field {' or '.join(map(repr, names))} must hold text, not {abbreviate(value)}"
        raise DataError(msg)
    return value


def yes_no_verdict(record: Record, *names: str) -> bool | None:
    """Return the verdict yes or no, ignoring case; None for null and every other text."""
    value = record.field(*names)
    if isinstance(value, bool):
        return value
    if value is not None and not is_text(value):
        msg = f"{record.where}: the verdict must be yes, no or null, not {abbreviate(value)}"
        raise DataError(msg)
    return {"yes": True, "no": False}.get(value.lower()) if value is not None else None


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write records as JSON lines; return their number."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    _write(path, "".join(f"{line}\n" for line in lines))
    return len(lines)


def write_list(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write records as one JSON list; return their number."""
    content = list(records)
    _write(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    return len(content)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
