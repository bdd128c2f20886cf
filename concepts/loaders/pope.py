"""POPE question files: is there a … in the image, yes or no (Li et al. 2023, arXiv 2305.10355)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from concepts.nouns import asked_noun
from concepts.reading.assembly import YES_NO, Pictures, check_counts
from concepts.reading.record import Record
from concepts.reading.records import read_rows
from concepts.reading.text_files import sha256
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError

SPLITS = ("random", "popular", "adversarial")
_ENDINGS = (".jpg", ".png", ".jpeg")
_LONGEST_NAME = 255
"""Characters of an image's name; a longer text in a table is the image itself, as base64."""


@dataclass(frozen=True)
class PopeQuestion:
    """One record of a question file."""

    id: str
    splits: tuple[str, ...]
    """One split, or ``neutral``; several in a table of VLMEvalKit, whose row then counts once in each."""
    images: tuple[str, ...]
    """Names that the image may have, the first of them where none exists."""
    image_field: str
    text: str
    answer: str
    where: str
    """File and record, for error messages."""


def pope(
    questions: Path | str,
    images: Path | str,
    labels: Path | str | Sequence[Path | str] | None = None,
    *,
    limit: int | None = None,
) -> ConceptDataset:
    """Read a POPE question file.

    Layouts, each as JSON lines (whatever the file is called), as one JSON array, or as a table (``.tsv``, ``.csv``):

    - the release's: ``question_id, image, text, label``; a mirror's: ``question_id, image, question, answer``;
    - the Hugging Face table's: ``question_id, question, answer, image_source, category``, the image being
      ``<image_source>.jpg`` or ``.png``;
    - VLMEvalKit's: ``index, question, answer, category``, the image being ``image_path``, or ``<index>.jpg`` as
      VLMEvalKit writes it out; a row of several categories (``random,popular``) is a question in each;
    - LLaVA's ``llava_pope_test.jsonl``: ``question_id, image, text, category``, without labels: give `labels`.

    Other fields are ignored.

    Parameters
    ----------
    questions
        The file. The split is ``category``, where that is ``random``, ``popular`` or ``adversarial``, else the one of
        these in the file's name, else ``neutral``.
    images
        The folder that the image paths are relative to.
    labels
        The release's label files for questions without labels, one for each split. A label is joined by split, image
        and the question up to its line break, with "imange" read as "image". LLaVA's file fits the labels of
        RUCAIBox/POPE at commit e3e39262.
    limit
        Keep this many questions, the first; the rest is read and counted, but its fields and images are not checked.

    Returns
    -------
    ConceptDataset
        Existence questions with the ids ``<split>/<question_id>``, grouped by image file. The labels are
        ``object:named`` and, where the question has POPE's wording, ``object:<noun>``. The provenance holds the
        file's SHA-256 and counts what was left out.

    Raises
    ------
    DataError
        Naming file, line and field: broken JSON, a field that is missing or of the wrong kind, a label that is
        neither yes nor no, a question id that occurs twice in a split, a category that contradicts the file's name, a
        question and an answer each in two fields, a question without a label among `labels`, an image path that leaves
        the folder, an image that is missing, unreadable or over Pillow's pixel limit. Every image's header is read
        before this returns.
    ConfigError
        For a limit below 1.
    """
    file, folder = Path(questions), Path(images)
    check_counts(limit=limit)
    pictures = Pictures(folder)
    digest = sha256(file)
    truths = _read_labels(labels)
    records = read_rows(file)
    examples: list[Example] = []
    unnamed = 0
    for question in _numbered(islice(records, limit), split_of(file.name), truths):
        name = next((name for name in question.images if pictures.has(name)), question.images[0])
        picture = pictures.find(name, question.where, question.image_field)
        noun = asked_noun(_first_line(question.text))
        unnamed += noun is None
        true = question.answer == "yes"
        examples += [
            Example(
                id=f"{split}/{question.id}",
                image=picture,
                question=question.text,
                answer=question.answer,
                candidates=YES_NO,
                level="object",
                kind="existence",
                split=split,
                group=picture.name,
                labels={"object:named": true, **({} if noun is None else {f"object:{noun.lower()}": true})},
            )
            for split in question.splits
        ]
    if not examples:
        msg = f"{file}: there is no question in it"
        raise DataError(msg)
    # Before the images are looked at: another line may be broken, and that is found faster.
    beyond = 0 if limit is None else sum(1 for _ in records)
    pictures.check()
    splits = list(dict.fromkeys(e.split for e in examples))
    provenance = {
        "loader": "pope",
        "questions": str(file),
        "sha256": digest,
        "images": str(folder),
        "split": splits[0] if len(splits) == 1 else splits,
        "kept": len(examples),
        "left_out": {"questions beyond the limit": beyond, "labels of nouns, for another wording": unnamed},
    }
    if labels is not None:
        provenance["labels"] = {str(path): sha256(path) for path in _paths(labels)}
    return ConceptDataset(file.stem, tuple(examples), provenance)


def pope_questions(
    questions: Path | str, labels: Path | str | Sequence[Path | str] | None = None
) -> Iterator[PopeQuestion]:
    """Yield the questions of a POPE file with their true answers; no image is looked at.

    Parameters
    ----------
    questions, labels
        As for `pope`.

    Raises
    ------
    DataError
        As `pope` does, for what is in the files.
    """
    file = Path(questions)
    yield from _numbered(read_rows(file), split_of(file.name), _read_labels(labels))


def _numbered(
    records: Iterable[Record], named: str, truths: Mapping[tuple[str, str, str], str] | None
) -> Iterator[PopeQuestion]:
    """Yield records as questions with their ids, each of which may occur once in a split."""
    places: dict[tuple[str, str], str] = {}
    for record in records:
        question = _question(record, named, truths)
        for split in question.splits:
            if (split, question.id) in places:
                place = places[split, question.id]
                msg = f"{record.where}: question_id '{question.id}' was already used, at {place}"
                raise DataError(msg)
            places[split, question.id] = record.where
        yield question


def _question(record: Record, named: str, truths: Mapping[tuple[str, str, str], str] | None) -> PopeQuestion:
    values = record.values
    # A table of VLMEvalKit has 'index'; it may have other ids that its answers do not use.
    by_index = "index" in values and (record.table or "question_id" not in values)
    number = record.identifier("index" if by_index else "question_id")
    splits = splits_of(values.get("category")) or (named,)
    if named in SPLITS and splits != (named,):
        msg = (
            f"{record.where}: field 'category' is '{', '.join(splits)}', but the file is named '{named}': two splits; "
            "rename the file"
        )
        raise DataError(msg)
    images, image_field = _images(record, number)
    if "text" in values and "question" in values and values["text"] != values["question"]:
        msg = f"{record.where}: the question may be field 'text' or field 'question'; leave one of them out"
        raise DataError(msg)
    text = record.text("text", "question")
    if truths is None:
        answer = _answer(record)
    else:
        key = (splits[0], images[0], plain_wording(_first_line(text)))
        if key not in truths:
            msg = (
                f"{record.where}: no label for image '{images[0]}' and question {_first_line(text)[:60]!r} of split "
                f"'{splits[0]}' in the label files; they are those of another version"
            )
            raise DataError(msg)
        answer = truths[key]
    return PopeQuestion(number, splits, images, image_field, text, answer, record.where)


def _images(record: Record, number: str) -> tuple[tuple[str, ...], str]:
    """Return the names that the image of a record may have, and the field they are from."""
    values = record.values
    if record.table:
        for name in ("image_path", "image"):
            cell = values.get(name)
            if isinstance(cell, str) and len(cell) <= _LONGEST_NAME and "." in cell:
                return (cell,), name
        # An image cell is the base64 of a picture, or the index of the row that has it.
        cell = values.get("image")
        shown = cell if isinstance(cell, str) and cell.isdecimal() else number
        return tuple(f"{shown}{ending}" for ending in _ENDINGS), "index"
    if "image_source" in values and not isinstance(values.get("image"), str):
        source = record.text("image_source")
        return tuple(f"{source}{ending}" for ending in (*_ENDINGS, "")), "image_source"
    return (record.text("image"),), "image"


def splits_of(category: object) -> tuple[str, ...]:
    """Return the splits that a ``category`` names, separated by commas; empty where it names anything else."""
    if not isinstance(category, str):
        return ()
    parts = tuple(dict.fromkeys(part.strip().lower() for part in category.split(",")))
    return parts if all(part in SPLITS for part in parts) else ()


def plain_wording(text: str) -> str:
    """Return a question with single spaces, and "imange" read as "image"."""
    return re.sub(r"\bimange\b", "image", " ".join(text.split()))


def same_wording(question: str, prompt: str) -> bool:
    """Say whether a prompt asks a question: its first line is in the prompt, whatever instructions are around it."""
    return plain_wording(_first_line(question)) in plain_wording(prompt)


def _first_line(text: str) -> str:
    return re.split(r"[\r\n]", text.strip(), maxsplit=1)[0]


def _paths(labels: Path | str | Sequence[Path | str]) -> list[Path]:
    return [Path(labels)] if isinstance(labels, Path | str) else [Path(path) for path in labels]


def _read_labels(labels: Path | str | Sequence[Path | str] | None) -> dict[tuple[str, str, str], str] | None:
    """Return the true answers of label files by split, image and question; None where there are no files."""
    if labels is None:
        return None
    truths: dict[tuple[str, str, str], str] = {}
    for path in _paths(labels):
        for question in _numbered(read_rows(path), split_of(path.name), None):
            for split in question.splits:
                key = (split, question.images[0], plain_wording(_first_line(question.text)))
                if truths.setdefault(key, question.answer) != question.answer:
                    msg = f"{question.where}: this image and question have both labels, yes and no"
                    raise DataError(msg)
    return truths


def split_of(name: str) -> str:
    """Return the one of `SPLITS` that a file name holds; ``neutral`` where it holds none or several."""
    found = [split for split in SPLITS if split in name.lower()]
    return found[0] if len(found) == 1 else "neutral"


def _answer(record: Record) -> str:
    if "label" not in record.values and "answer" not in record.values:
        msg = (
            f"{record.where}: no field 'label' or 'answer'; it has {', '.join(map(repr, record.values)) or 'no field'}; "
            "for a file without labels, give the label files of the release as labels="
        )
        raise DataError(msg)
    truth = record.text("label", "answer").strip().lower()
    if truth not in YES_NO:
        field = "label" if "label" in record.values else "answer"
        msg = f"{record.where}: field '{field}' is '{truth[:60]}', neither 'yes' nor 'no'"
        raise DataError(msg)
    return truth
