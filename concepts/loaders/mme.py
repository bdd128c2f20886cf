"""MME: two questions an image, one answered yes and one no (Fu et al. 2023, arXiv 2306.13394)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from concepts.reading.assembly import YES_NO, Pictures, check_counts, dataset
from concepts.reading.records import Record, read_table
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


def mme(questions: Path | str, images: Path | str, *, limit: int | None = None) -> ConceptDataset:
    r"""Read MME questions.

    Parameters
    ----------
    questions
        A file of one subtask, or a folder of them: lines ``image \t question \t answer``, the name of the file that of
        the subtask (``existence.txt``). A fourth column, an answer, is ignored here.
    images
        The folder that the image names are relative to, or one with a folder of images for each subtask.
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
    files = subtask_files(Path(questions))
    left_out: Counter[str] = Counter({"questions of cognition": 0, "questions beyond the limit": 0})
    examples: list[Example] = []
    for file in files:
        subtask = subtask_of(file)
        asked: dict[tuple[str, str], str] = {}
        folder = f"{file.stem}/" if (pictures.folder / file.stem).is_dir() else ""
        for number, record in enumerate(read_table(file, ("image", "question", "answer"), spare=("given",)), 1):
            if subtask not in LEVEL_OF or (limit is not None and number > limit):
                left_out["questions of cognition" if subtask not in LEVEL_OF else "questions beyond the limit"] += 1
                continue
            level, answer = LEVEL_OF[subtask], answer_of(record)
            picture = pictures.find(folder + record.text("image"), record.where)
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
    return dataset("mme", files, pictures, examples, left_out)


def subtask_files(path: Path) -> Sequence[Path]:
    """Return the file, or the ``.txt`` files of a folder; raises `DataError` where there are none."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        msg = f"folder '{path}' holds no .txt file of a subtask, as in existence.txt"
        raise DataError(msg)
    return files


def subtask_of(file: Path) -> str:
    """Return the subtask that a file is called; raises `DataError` for one that there is not."""
    name = file.stem.strip().lower()
    name = "color" if name == "colour" else name
    if name not in LEVEL_OF and name not in COGNITION:
        msg = f"'{file}': there is no subtask '{name}'; there are {', '.join((*LEVEL_OF, *COGNITION))}"
        raise DataError(msg)
    return name


def answer_of(record: Record) -> str:
    """Return the true answer of a line, yes or no; raises `DataError` naming the line."""
    answer = record.text("answer").strip().lower()
    if answer not in YES_NO:
        msg = f"{record.where}: field 'answer' is '{answer[:60]}', neither 'yes' nor 'no'"
        raise DataError(msg)
    return answer
