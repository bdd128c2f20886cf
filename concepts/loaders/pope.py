"""POPE question files: is there a … in the image, yes or no (Li et al. 2023, arXiv 2305.10355)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from concepts.nouns import asked_noun
from concepts.reading.assembly import YES_NO, Pictures, check_counts
from concepts.reading.records import Record, read_records, sha256
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError

SPLITS = ("random", "popular", "adversarial")


def pope(questions: Path | str, images: Path | str, *, limit: int | None = None) -> ConceptDataset:
    """Read a POPE question file.

    Two layouts are known, each as JSON lines (whatever the file is called) or as one JSON array:
    ``question_id, image, text, label`` and ``question_id, image, question, answer``. Other fields are ignored.

    Parameters
    ----------
    questions
        The file. ``random``, ``popular`` or ``adversarial`` in its name becomes the split, else it is ``neutral``.
    images
        The folder that the image paths are relative to.
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
        neither yes nor no, a question id that was there before, an image path that leaves the folder, an image that
        is missing, unreadable or over Pillow's pixel limit. Every image's header is read before this returns.
    ConfigError
        For a limit below 1.
    """
    file, folder = Path(questions), Path(images)
    check_counts(limit=limit)
    pictures = Pictures(folder)
    digest = sha256(file)
    split = split_of(file.name)
    records = read_records(file)
    examples: list[Example] = []
    unnamed = 0
    for number, record in _numbered(islice(records, limit)):
        picture = pictures.find(record.text("image"), record.where)
        text, answer = record.text("text", "question"), _answer(record)
        noun = asked_noun(text)
        unnamed += noun is None
        labels = {"object:named": answer == "yes"}
        if noun is not None:
            labels[f"object:{noun.lower()}"] = answer == "yes"
        examples.append(
            Example(
                id=f"{split}/{number}",
                image=picture,
                question=text,
                answer=answer,
                candidates=YES_NO,
                level="object",
                kind="existence",
                split=split,
                group=picture.name,
                labels=labels,
            )
        )
    if not examples:
        msg = f"{file}: there is no question in it"
        raise DataError(msg)
    # Before the images are looked at: another line may be broken, and that is found faster.
    beyond = 0 if limit is None else sum(1 for _ in records)
    pictures.check()
    provenance = {
        "loader": "pope",
        "questions": str(file),
        "sha256": digest,
        "images": str(folder),
        "split": split,
        "kept": len(examples),
        "left_out": {"questions beyond the limit": beyond, "labels of nouns, for another wording": unnamed},
    }
    return ConceptDataset(file.stem, tuple(examples), provenance)


def pope_labels(questions: Path | str) -> Iterator[tuple[str, str, str]]:
    """Yield id, image and true answer of each question of a POPE file; no image is looked at.

    Raises
    ------
    DataError
        As `pope` does, for what is in the file.
    """
    for number, record in _numbered(read_records(Path(questions))):
        yield number, record.text("image"), _answer(record)


def _numbered(records: Iterable[Record]) -> Iterator[tuple[str, Record]]:
    """Yield records with their ids, each of which may be there once."""
    asked: dict[str, str] = {}
    for record in records:
        number = record.identifier("question_id")
        if number in asked:
            msg = f"{record.where}: question_id '{number}' was already used, at {asked[number]}"
            raise DataError(msg)
        asked[number] = record.where
        yield number, record


def split_of(name: str) -> str:
    """Return the one of `SPLITS` that a file name holds; ``neutral`` where it holds none or several."""
    found = [split for split in SPLITS if split in name.lower()]
    return found[0] if len(found) == 1 else "neutral"


def _answer(record: Record) -> str:
    given = record.text("label", "answer").strip().lower()
    if given not in YES_NO:
        field = "label" if "label" in record.values else "answer"
        msg = f"{record.where}: field '{field}' is '{given[:60]}', neither 'yes' nor 'no'"
        raise DataError(msg)
    return given
