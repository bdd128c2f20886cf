"""MME: two yes-no questions about each image (Fu et al. 2023, arXiv 2306.13394)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from concepts.concept import Level
from concepts.question import YES_NO
from concepts.reading.assembly import build_dataset, check_counts
from concepts.reading.image_folder import ImageFolder
from concepts.reading.record import Record
from concepts.reading.tables import read_tab_separated
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError
from groundscope.core.text import nearest

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
"""Perception subtask to its level."""
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""Cognition subtasks. They require reasoning beyond the content of the image and have no level."""

_ENDINGS = (".jpg", ".png", ".jpeg")
_IMAGES, _QUESTIONS = "images", "questions_answers_YN"
"""Folders inside the folder of a subtask in the release; other subtasks have images and questions in one folder."""


def mme(
    questions: Path | str, images: Path | str, *, limit: int | None = None, cognition: bool = False
) -> ConceptDataset:
    r"""Load MME questions.

    Parameters
    ----------
    questions
        One of:

        - the file of a subtask, or a folder of such files: lines ``image \t question \t answer``, in a file named after the
          subtask (``existence.txt``); a fourth column with a response is ignored;
        - the folder of the release: one folder per subtask, with one file per image of lines ``question \t answer``, next
          to the image (``existence/0001.txt``) or in ``questions_answers_YN``.
    images
        Folder of the images, or a folder with one folder per subtask, which may have its images in ``images`` as in the
        release.
    limit
        Maximum number of questions of each subtask; the first ones are used.
    cognition
        Whether to load the cognition subtasks too. Their questions require reasoning and have no level (None).

    Returns
    -------
    ConceptDataset
        Yes-no questions whose kind is the subtask; groups are images. Without `cognition`, the questions of cognition
        subtasks are left out and counted.

    Raises
    ------
    DataError
        Names the file, line and field: for other columns, an unknown subtask, an answer that is neither yes nor no, a
        repeated question about an image, or an image that is missing, unreadable or outside the folder.
    ConfigError
        For a limit below 1.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> folder = Path(tempfile.mkdtemp())
    >>> gs.scenes.dataset(10)[0].image.load().save(folder / "a.png")
    >>> lines = ["a.png\tIs there a chair?\tYes", "a.png\tIs there a dog?\tNo"]
    >>> _ = (folder / "existence.txt").write_text("\n".join(lines))
    >>> data = gs.loaders.mme(folder / "existence.txt", folder)
    >>> [(example.question, example.answer) for example in data]
    [('Is there a chair?', 'yes'), ('Is there a dog?', 'no')]
    """
    check_counts(limit=limit)
    image_folder = ImageFolder(Path(images))
    sources = _sources(Path(questions))
    left_out: Counter[str] = Counter({"questions of cognition": 0, "questions beyond the limit": 0})
    examples: list[Example] = []
    for subtask, (folder, files) in sources.items():
        places: dict[tuple[str, str], str] = {}
        for number, record in enumerate(_records(files, released=folder is not None), 1):
            unwanted = subtask not in LEVEL_OF and not cognition
            if unwanted or (limit is not None and number > limit):
                left_out["questions of cognition" if unwanted else "questions beyond the limit"] += 1
                continue
            level, answer = LEVEL_OF.get(subtask), answer_of(record)
            name = _image_name(record, folder or files[0].stem, image_folder, released=folder is not None)
            image = image_folder.find(name, record.where)
            question = record.text("question").strip()
            if (image.name, question) in places:
                msg = f"{record.where}: the question about this image is repeated, first at {places[image.name, question]}"
                raise DataError(msg)
            places[image.name, question] = record.where
            examples.append(
                Example(
                    id=f"{subtask}/{number}",
                    image=image,
                    question=question,
                    answer=answer,
                    candidates=YES_NO,
                    level=level,
                    kind=subtask,
                    split="neutral",
                    group=image.name,
                    labels={f"{level}:named": answer == "yes"} if level else {},
                )
            )
    return build_dataset(
        "mme", [file for _, files in sources.values() for file in files], image_folder, examples, left_out
    )


def _sources(path: Path) -> dict[str, tuple[str | None, list[Path]]]:
    """Return, for each subtask, its folder in the release (None for a single file) and its question files."""
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
        msg = f"folder '{path}' has no folder of a subtask, such as existence, with questions in .txt files"
        raise DataError(msg)
    return sources


def _records(files: Sequence[Path], *, released: bool) -> Iterator[Record]:
    for file in files:
        if not released:
            yield from read_tab_separated(file, ("image", "question", "answer"), optional=("response",))
            continue
        for record in read_tab_separated(file, ("question", "answer")):
            yield Record(record.where, {"image": file.stem, **record.values})


def _image_name(record: Record, folder: str, image_folder: ImageFolder, *, released: bool) -> str:
    """Return the path of a record's image relative to the image folder, possibly in the folder of the subtask."""
    image = record.text("image")
    names = [f"{image}{ending}" for ending in (_ENDINGS if released else ("",))]
    names = [*(f"{folder}/{name}" for name in names), *(f"{folder}/{_IMAGES}/{name}" for name in names), *names]
    missing = names[0] if (image_folder.path / folder).is_dir() else names[-1]
    return next((name for name in names if image_folder.has(name)), missing)


def subtask_files(path: Path) -> dict[str, Path]:
    """Return the file of each subtask: a file, or the ``.txt`` files of a folder.

    Raises
    ------
    DataError
        For a folder without such files, an unknown subtask, or two files of one subtask.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        msg = f"folder '{path}' has no .txt file of a subtask, such as existence.txt"
        raise DataError(msg)
    file_of_subtask: dict[str, Path] = {}
    for file in files:
        subtask = subtask_of(file)
        if file_of_subtask.setdefault(subtask, file) != file:
            msg = f"'{file}' and '{file_of_subtask[subtask]}' are both of subtask '{subtask}'; keep one of them"
            raise DataError(msg)
    return file_of_subtask


def _subtask_name(stem: str) -> str | None:
    """Return the subtask of this name, in any case and in both spellings of color, or None."""
    name = stem.strip().lower()
    name = "color" if name == "colour" else name
    return name if name in LEVEL_OF or name in COGNITION else None


def subtask_of(file: Path) -> str:
    """Return the subtask that a file is named after; raises `DataError` for another name."""
    name = _subtask_name(file.stem)
    if name is None:
        names = (*LEVEL_OF, *COGNITION)
        stem = file.stem.strip().lower()
        msg = f"'{file}': unknown subtask '{stem}'; choose from {', '.join(names)}{nearest(stem, names)}"
        raise DataError(msg)
    return name


def answer_of(record: Record) -> str:
    """Return the true answer of a line; raises `DataError`, naming the line, if it is neither yes nor no."""
    answer = record.text("answer").strip().lower()
    if answer not in YES_NO:
        msg = f"{record.where}: field 'answer' is '{answer[:60]}', neither 'yes' nor 'no'"
        raise DataError(msg)
    return answer
