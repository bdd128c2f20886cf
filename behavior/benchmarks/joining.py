"""Match the answers of a file to the questions of a benchmark. A missing answer is counted, never filled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from behavior.benchmarks.answer_formats import Reading
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion
from concepts.loaders.pope import same_wording
from groundscope.core.errors import DataError
from groundscope.core.text import format_count


def join_answers(
    questions: Sequence[BenchmarkQuestion], readings: Sequence[Reading], path: Path, *, text_alone: bool = False
) -> tuple[AnsweredQuestion, ...]:
    """Return the answered questions in the order of the answer file.

    Parameters
    ----------
    questions
        The questions; ids are unique.
    readings
        The answers. With ids they may answer some of the questions only, in any order. Without ids there must be one for
        each question, with the same image and the same question line by line.
    path
        The answer file, for messages.
    text_alone
        Whether answers without ids may also have no image (`AnswerLayout.text_alone`).

    Raises
    ------
    DataError
        Names the record: for an answer to another question, two answers to one question, or a line whose image or question
        differs.
    """
    if readings[0].id is None:
        return _by_place(questions, readings, path, text_alone=text_alone)
    by_id = _names(questions)
    rows: list[AnsweredQuestion] = []
    places: dict[str, str] = {}
    for reading in readings:
        question = by_id.get(str(reading.id))
        if question is None:
            examples = ", ".join(q.id for q in questions[:3])
            what = "matches several questions" if str(reading.id) in by_id else "matches no question"
            msg = f"{reading.where}: id '{reading.id}' {what} of this benchmark; ids are {examples}, …"
            raise DataError(msg)
        if question.id in places:
            msg = f"{reading.where}: question '{question.id}' was already answered, at {places[question.id]}"
            raise DataError(msg)
        _check_question(
            question, reading, f"the question of id '{reading.id}'", "the ids belong to another question file"
        )
        places[question.id] = reading.where
        rows.append(AnsweredQuestion(question, reading.text, reading.where, reading.seconds))
    return tuple(rows)


def check_unique(questions: Sequence[BenchmarkQuestion]) -> tuple[BenchmarkQuestion, ...]:
    """Return the questions; raises `DataError` for none, or two with the same id."""
    if not questions:
        msg = "the benchmark's files contain no questions"
        raise DataError(msg)
    places: dict[str, str] = {}
    for question in questions:
        if question.id in places:
            msg = f"{question.where}: question '{question.id}' was already defined, at {places[question.id]}"
            raise DataError(msg)
        places[question.id] = question.where
    return tuple(questions)


def _by_place(
    questions: Sequence[BenchmarkQuestion], readings: Sequence[Reading], path: Path, *, text_alone: bool
) -> tuple[AnsweredQuestion, ...]:
    if len(readings) != len(questions):
        msg = (
            f"{path}: {format_count(len(readings), 'answer')} without ids for {format_count(len(questions), 'question')}; "
            "write the id of the question to each answer"
        )
        raise DataError(msg)
    rows = []
    for question, reading in zip(questions, readings, strict=True):
        if reading.question is None or (reading.image is None and question.image and not text_alone):
            lacking = "question" if reading.question is None else "image"
            msg = (
                f"{reading.where}: the answer has neither an id nor its {lacking}, so its place alone would decide; write the "
                "id of the question to each answer"
            )
            raise DataError(msg)
        _check_question(question, reading, "the question", "put the answers in the order of the questions")
        if reading.image is not None and question.image and not _same_image(question.image, reading.image):
            msg = (
                f"{reading.where}: the image is '{reading.image}' here, but '{question.image}' in the question file; put the "
                "answers in the order of the questions"
            )
            raise DataError(msg)
        rows.append(AnsweredQuestion(question, reading.text, reading.where, reading.seconds))
    return tuple(rows)


def _names(questions: Sequence[BenchmarkQuestion]) -> dict[str, BenchmarkQuestion | None]:
    """Map each id, and each alias of one question, to its question; an alias of several to None."""
    names: dict[str, BenchmarkQuestion | None] = {}
    for question in questions:
        for alias in question.aliases:
            names[alias] = None if alias in names else question
    return names | {question.id: question for question in questions}


def _check_question(question: BenchmarkQuestion, reading: Reading, subject: str, advice: str) -> None:
    recorded = reading.question
    if recorded is None or not question.text.strip() or same_wording(question.text, recorded):
        return
    msg = f"{reading.where}: {subject} is {_line(recorded)} here, but {_line(question.text)} in the question file; {advice}"
    raise DataError(msg)


def _same_image(name: str, other: str) -> bool:
    """Whether two names are of one image; folders and endings may differ."""
    first, second = Path(name), Path(other)
    return first.name == second.name or first.stem == second.stem


def _line(text: str) -> str:
    first = text.strip().split("\n", 1)[0]
    return repr(first if len(first) <= 60 else f"{first[:57]}...")
