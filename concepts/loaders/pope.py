"""POPE: yes-no questions about the presence of objects (Li et al. 2023, arXiv 2305.10355)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from concepts.nouns import asked_noun
from concepts.question import YES_NO
from concepts.reading.assembly import check_counts
from concepts.reading.image_folder import ImageFolder
from concepts.reading.record import Record
from concepts.reading.records import read_records
from concepts.reading.text_files import sha256
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError

SPLITS = ("random", "popular", "adversarial")
_ENDINGS = (".jpg", ".png", ".jpeg")
_LONGEST_NAME = 255
"""Limit in characters of an image's name; longer text in a table is the image itself, as base64."""


@dataclass(frozen=True)
class PopeQuestion:
    """One record of a question file."""

    id: str
    splits: tuple[str, ...]
    """The splits that contain the question, or ``neutral``; a row of a VLMEvalKit table may be in several."""
    images: tuple[str, ...]
    """Possible names of the image file; errors name the first one."""
    image_field: str
    """Field with the name of the image."""
    text: str
    """The question."""
    answer: str
    """The true answer, ``yes`` or ``no``."""
    where: str
    """File and record, for error messages."""


def pope(
    questions: Path | str,
    images: Path | str,
    labels: Path | str | Sequence[Path | str] | None = None,
    *,
    limit: int | None = None,
) -> ConceptDataset:
    """Load a POPE question file.

    Supported layouts, as JSON lines (with any file name), as one JSON array, or as a table (``.tsv``, ``.csv``):

    - the release: ``question_id, image, text, label``, or ``question_id, image, question, answer``;
    - the Hugging Face table: ``question_id, question, answer, image_source, category``, with the image
      ``<image_source>.jpg`` or ``.png``;
    - VLMEvalKit: ``index, question, answer, category``, with the image ``image_path``, or ``<index>.jpg`` as written by
      VLMEvalKit; a row with several categories (``random,popular``) is one question in each;
    - LLaVA's ``llava_pope_test.jsonl``: ``question_id, image, text, category``, without labels, which `labels` provides.

    Other fields are ignored.

    Parameters
    ----------
    questions
        The file. The split of a question is its ``category`` if that is ``random``, ``popular`` or ``adversarial``,
        otherwise the one of these that the file's name contains, otherwise ``neutral``.
    images
        Folder of the images.
    labels
        Label files of the release, one per split, for questions without labels. They are matched by split, image, and the
        question up to its first line break, with "imange" read as "image". The labels of RUCAIBox/POPE at commit e3e39262
        match LLaVA's file.
    limit
        Maximum number of questions; the first ones are used. The others are read and counted, but not checked.

    Returns
    -------
    ConceptDataset
        Existence questions with ids ``<split>/<question_id>``; groups are images. The labels are ``object:named`` and, for
        questions in POPE's wording, ``object:<noun>``. The provenance has the SHA-256 of the file and the number of questions
        that were left out.

    Raises
    ------
    DataError
        Names the file, line and field: for invalid JSON, a field that is missing or of the wrong type, a label that is neither
        yes nor no, a question id that is repeated in a split, a category that contradicts the file's name, a question or an
        answer in two fields, a question without a label in `labels`, or an image that is missing, unreadable, outside the
        folder, or exceeds Pillow's limit of pixels.
    ConfigError
        For a limit below 1.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> row = {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "no"}
    >>> _ = (folder / "coco_pope_random.json").write_text(json.dumps(row))
    >>> data = gs.loaders.pope(folder / "coco_pope_random.json", folder)
    >>> data[0].id, data[0].answer, dict(data[0].labels)
    ('random/1', 'no', {'object:named': False, 'object:dog': False})
    """
    file, folder = Path(questions), ImageFolder(Path(images))
    check_counts(limit=limit)
    digest = sha256(file)
    label_of_question = _read_labels(labels)
    records = read_records(file)
    examples: list[Example] = []
    other_wording = 0
    for question in _read_questions(islice(records, limit), split_of(file.name), label_of_question):
        name = next((name for name in question.images if folder.has(name)), question.images[0])
        image = folder.find(name, question.where, question.image_field)
        noun = asked_noun(_first_line(question.text))
        other_wording += noun is None
        true = question.answer == "yes"
        examples += [
            Example(
                id=f"{split}/{question.id}",
                image=image,
                question=question.text,
                answer=question.answer,
                candidates=YES_NO,
                level="object",
                kind="existence",
                split=split,
                group=image.name,
                labels={"object:named": true, **({} if noun is None else {f"object:{noun.lower()}": true})},
            )
            for split in question.splits
        ]
    if not examples:
        msg = f"{file}: the file contains no questions"
        raise DataError(msg)
    # Read the other records before the images: errors in them are found faster.
    beyond_limit = 0 if limit is None else sum(1 for _ in records)
    folder.check()
    splits = list(dict.fromkeys(e.split for e in examples))
    provenance = {
        "loader": "pope",
        "questions": str(file),
        "sha256": digest,
        "images": str(folder.path),
        "split": splits[0] if len(splits) == 1 else splits,
        "kept": len(examples),
        "left_out": {"questions beyond the limit": beyond_limit, "labels of nouns, for another wording": other_wording},
    }
    if labels is not None:
        provenance["labels"] = {str(path): sha256(path) for path in _paths(labels)}
    return ConceptDataset(file.stem, tuple(examples), provenance)


def pope_questions(
    questions: Path | str, labels: Path | str | Sequence[Path | str] | None = None
) -> Iterator[PopeQuestion]:
    """Yield the questions of a POPE file with their true answers; images are not needed.

    Parameters
    ----------
    questions, labels
        As for `pope`.

    Raises
    ------
    DataError
        As `pope` does, for errors in the files.
    """
    file = Path(questions)
    yield from _read_questions(read_records(file), split_of(file.name), _read_labels(labels))


def _read_questions(
    records: Iterable[Record], file_split: str, label_of_question: Mapping[tuple[str, str, str], str] | None
) -> Iterator[PopeQuestion]:
    """Yield records as questions; raises `DataError` for an id that is repeated in a split."""
    places: dict[tuple[str, str], str] = {}
    for record in records:
        question = _question(record, file_split, label_of_question)
        for split in question.splits:
            if (split, question.id) in places:
                place = places[split, question.id]
                msg = f"{record.where}: question_id '{question.id}' was already used, at {place}"
                raise DataError(msg)
            places[split, question.id] = record.where
        yield question


def _question(
    record: Record, file_split: str, label_of_question: Mapping[tuple[str, str, str], str] | None
) -> PopeQuestion:
    values = record.values
    # A table of VLMEvalKit has 'index'; it may also have other ids, which its answer files do not use.
    by_index = "index" in values and (record.table or "question_id" not in values)
    number = record.identifier("index" if by_index else "question_id")
    splits = splits_of(values.get("category")) or (file_split,)
    if file_split in SPLITS and splits != (file_split,):
        category = ", ".join(splits)
        msg = f"{record.where}: field 'category' is '{category}', but the file's name says '{file_split}'; rename the file"
        raise DataError(msg)
    images, image_field = _images(record, number)
    if "text" in values and "question" in values and values["text"] != values["question"]:
        msg = f"{record.where}: the question may be field 'text' or field 'question'; remove one of them"
        raise DataError(msg)
    text = record.text("text", "question")
    if label_of_question is None:
        answer = _answer(record)
    else:
        key = (splits[0], images[0], normalize_wording(_first_line(text)))
        if key not in label_of_question:
            msg = (
                f"{record.where}: the label files have no label for image '{images[0]}' and question "
                f"{_first_line(text)[:60]!r} in split '{splits[0]}'; they belong to another version of the questions"
            )
            raise DataError(msg)
        answer = label_of_question[key]
    return PopeQuestion(number, splits, images, image_field, text, answer, record.where)


def _images(record: Record, number: str) -> tuple[tuple[str, ...], str]:
    """Return the possible names of a record's image, and the field that they are from."""
    values = record.values
    if record.table:
        for name in ("image_path", "image"):
            cell = values.get(name)
            if isinstance(cell, str) and len(cell) <= _LONGEST_NAME and "." in cell:
                return (cell,), name
        # An image cell contains the image as base64, or the index of the row that contains it.
        cell = values.get("image")
        index = cell if isinstance(cell, str) and cell.isdecimal() else number
        return tuple(f"{index}{ending}" for ending in _ENDINGS), "index"
    if "image_source" in values and not isinstance(values.get("image"), str):
        source = record.text("image_source")
        return tuple(f"{source}{ending}" for ending in (*_ENDINGS, "")), "image_source"
    return (record.text("image"),), "image"


def splits_of(category: object) -> tuple[str, ...]:
    """Return the splits of a ``category``, separated by commas; empty if it contains anything else."""
    if not isinstance(category, str):
        return ()
    parts = tuple(dict.fromkeys(part.strip().lower() for part in category.split(",")))
    return parts if all(part in SPLITS for part in parts) else ()


def normalize_wording(text: str) -> str:
    """Return a question with single spaces, and with "imange" replaced by "image"."""
    return re.sub(r"\bimange\b", "image", " ".join(text.split()))


def same_wording(question: str, prompt: str) -> bool:
    """Whether a prompt contains the first line of a question."""
    return normalize_wording(_first_line(question)) in normalize_wording(prompt)


def _first_line(text: str) -> str:
    return re.split(r"[\r\n]", text.strip(), maxsplit=1)[0]


def _paths(labels: Path | str | Sequence[Path | str]) -> list[Path]:
    return [Path(labels)] if isinstance(labels, Path | str) else [Path(path) for path in labels]


def _read_labels(labels: Path | str | Sequence[Path | str] | None) -> dict[tuple[str, str, str], str] | None:
    """Return the true answers of label files by split, image and question; None without files."""
    if labels is None:
        return None
    answers: dict[tuple[str, str, str], str] = {}
    for path in _paths(labels):
        for question in _read_questions(read_records(path), split_of(path.name), None):
            for split in question.splits:
                key = (split, question.images[0], normalize_wording(_first_line(question.text)))
                if answers.setdefault(key, question.answer) != question.answer:
                    msg = f"{question.where}: this image and question have both labels, yes and no; keep one of them"
                    raise DataError(msg)
    return answers


def split_of(name: str) -> str:
    """Return the one of `SPLITS` in a file name; ``neutral`` for a name with none or several of them."""
    splits = [split for split in SPLITS if split in name.lower()]
    return splits[0] if len(splits) == 1 else "neutral"


def _answer(record: Record) -> str:
    if "label" not in record.values and "answer" not in record.values:
        msg = (
            f"{record.where}: no field 'label' or 'answer'; it has {', '.join(map(repr, record.values)) or 'no fields'}; "
            "for a file without labels, pass the label files of the release as labels=…"
        )
        raise DataError(msg)
    answer = record.text("label", "answer").strip().lower()
    if answer not in YES_NO:
        field = "label" if "label" in record.values else "answer"
        msg = f"{record.where}: field '{field}' is '{answer[:60]}', neither 'yes' nor 'no'"
        raise DataError(msg)
    return answer
