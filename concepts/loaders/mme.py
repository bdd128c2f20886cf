"""MME: two questions an image, one answered yes and one no (Fu et al. 2023, arXiv 2306.13394)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from concepts.reading.assembly import YES_NO, Pictures, check_counts, dataset
from concepts.reading.record import Record
from concepts.reading.tables import read_table
from concepts.schema import ConceptDataset, Example, Level
from groundscope.core.errors import DataError

LEVEL_OF: Mapping[str, Level] = MappingProxyType(
    {
        "existence": "object",
        "count": "object",
        "position": "relation",
        "color": "attribute",
        "posters": "object",
        "celebrity": "object",
        "scene": "attribute",
        "landmark": "object",
        "artwork": "attribute",
        "ocr": "attribute",
    }
)
"""Subtask of perception to its level."""
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""Subtasks about what follows from an image, not what is in it; they have no level."""


_ENDINGS = (".jpg", ".png", ".jpeg")
_IMAGES, _QUESTIONS = "images", "questions_answers_YN"
"""Folders inside a subtask's folder of the release; some subtasks have images and questions side by side instead."""


def mme(questions: Path | str, images: Path | str, *, limit: int | None = None) -> ConceptDataset:
    r"""Read MME questions.

    Parameters
    ----------
    questions
        A file of one subtask or a folder of such files: lines ``image \t question \t answer``, the file named like the
        subtask (``existence.txt``); a fourth column, a response, is ignored. Or the folder of the release, with a folder
        for each subtask that has a file of lines ``question \t answer`` for each image, next to the image
        (``existence/0001.txt``) or in ``questions_answers_YN``.
    images
        The folder that the image names are relative to, or one with a folder for each subtask, which may have its images
        in ``images``, as the release has it.
    limit
        Keep this many questions of each subtask, the first.

    Returns
    -------
    ConceptDataset
        Yes-no questions whose kind is the subtask, grouped by image. Subtasks of cognition are left out and counted, as
        they are about no level of what an image shows; `behavior.mme.score_files` scores them.

    Raises
    ------
    DataError
        Naming file, line and field: other columns, an unknown subtask, an answer that is neither yes nor no, a question
        asked twice of an image, an image that is missing, unreadable or outside the folder.
    ConfigError
        For a limit below 1.
    """
    check_counts(limit=limit)
    pictures = Pictures(Path(images))
    sources = _sources(Path(questions))
    left_out: Counter[str] = Counter({"questions of cognition": 0, "questions beyond the limit": 0})
    examples: list[Example] = []
    for subtask, (folder, files) in sources.items():
        asked: dict[tuple[str, str], str] = {}
        for number, record in enumerate(_records(files, released=folder is not None), 1):
            if subtask not in LEVEL_OF or (limit is not None and number > limit):
                left_out["questions of cognition" if subtask not in LEVEL_OF else "questions beyond the limit"] += 1
                continue
            level, answer = LEVEL_OF[subtask], answer_of(record)
            name = _image_name(record, folder or files[0].stem, pictures, released=folder is not None)
            picture = pictures.find(name, record.where)
            question = record.text("question").strip()
            if (picture.name, question) in asked:
                msg = (
                    f"{record.where}: this question was already asked of this image, at {asked[picture.name, question]}"
                )
                raise DataError(msg)
            asked[picture.name, question] = record.where
            examples.append(
                Example(
                    id=f"{subtask}/{number}",
                    image=picture,
                    question=question,
                    answer=answer,
                    candidates=YES_NO,
                    level=level,
                    kind=subtask,
                    split="neutral",
                    group=picture.name,
                    labels={f"{level}:named": answer == "yes"},
                )
            )
    return dataset("mme", [file for _, files in sources.values() for file in files], pictures, examples, left_out)


def _sources(path: Path) -> dict[str, tuple[str | None, list[Path]]]:
    """Return each subtask with its folder in the release, None for one file a subtask, and its files."""
    folders = sorted(part for part in path.iterdir() if part.is_dir()) if path.is_dir() else []
    if not folders or any(path.glob("*.txt")):
        return {subtask: (None, [file]) for subtask, file in subtask_files(path).items()}
    sources: dict[str, tuple[str | None, list[Path]]] = {}
    for folder in folders:
        name = _subtask_name(folder.name)
        inner = folder / _QUESTIONS if (folder / _QUESTIONS).is_dir() else folder
        files = sorted(inner.glob("*.txt"))
        if name is not None and files:
            sources[name] = folder.name, files
    if not sources:
        msg = f"folder '{path}' holds no folder of a subtask, as in existence, with questions in .txt files"
        raise DataError(msg)
    return sources


def _records(files: Sequence[Path], *, released: bool) -> Iterator[Record]:
    for file in files:
        if not released:
            yield from read_table(file, ("image", "question", "answer"), spare=("given",))
            continue
        for record in read_table(file, ("question", "answer")):
            yield Record(record.where, {"image": file.stem, **record.values})


def _image_name(record: Record, folder: str, pictures: Pictures, *, released: bool) -> str:
    """Return the name of an image under the folder of images, where it may be in a folder of its subtask."""
    image = record.text("image")
    names = [f"{image}{ending}" for ending in (_ENDINGS if released else ("",))]
    names = [*(f"{folder}/{name}" for name in names), *(f"{folder}/{_IMAGES}/{name}" for name in names), *names]
    missing = names[0] if (pictures.folder / folder).is_dir() else names[-1]
    return next((name for name in names if pictures.has(name)), missing)


def subtask_files(path: Path) -> dict[str, Path]:
    """Return each subtask with its file: the file itself, or the ``.txt`` files of a folder.

    Raises
    ------
    DataError
        For a folder without any, an unknown subtask, two files of one subtask.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        msg = f"folder '{path}' holds no .txt file of a subtask, as in existence.txt"
        raise DataError(msg)
    named: dict[str, Path] = {}
    for file in files:
        if named.setdefault(subtask_of(file), file) != file:
            msg = f"'{file}' and '{named[subtask_of(file)]}' are both of subtask '{subtask_of(file)}'; keep one of them"
            raise DataError(msg)
    return named


def _subtask_name(stem: str) -> str | None:
    """Return the subtask that a name means, or None."""
    name = stem.strip().lower()
    name = "color" if name == "colour" else name
    return name if name in LEVEL_OF or name in COGNITION else None


def subtask_of(file: Path) -> str:
    """Return the subtask that a file is named after; raises `DataError` for an unknown one."""
    name = _subtask_name(file.stem)
    if name is None:
        known = ", ".join((*LEVEL_OF, *COGNITION))
        msg = f"'{file}': there is no subtask '{file.stem.strip().lower()}'; there are {known}"
        raise DataError(msg)
    return name


def answer_of(record: Record) -> str:
    """Return the true answer of a line, yes or no; raises `DataError` naming the line."""
    answer = record.text("answer").strip().lower()
    if answer not in YES_NO:
        msg = f"{record.where}: field 'answer' is '{answer[:60]}', neither 'yes' nor 'no'"
        raise DataError(msg)
    return answer
