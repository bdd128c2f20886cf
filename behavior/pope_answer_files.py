"""Join a POPE question file with an answer file from any source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from behavior.answer_files import AskedQuestion, match_answers, read_answers
from concepts.loaders.pope import pope_questions
from groundscope.core.errors import DataError


@dataclass(frozen=True)
class AnsweredQuestion:
    """One question of one split, with the text of its answer."""

    split: str
    text: str
    label: str
    """``yes`` or ``no``."""
    image: str


def join_answers(
    questions: Path | str,
    answers: Path | str,
    labels: Path | str | Sequence[Path | str] | None,
    answer_field: str | None,
    id_field: str | None,
) -> list[AnsweredQuestion]:
    """Return the questions of a file in order, once for each of their splits, with their answers.

    Parameters and errors are those of `behavior.pope.score_files`.
    """
    records = list(pope_questions(questions, labels))
    if not records:
        msg = f"{questions}: the file contains no questions"
        raise DataError(msg)
    count_of_id = Counter(record.id for record in records)
    questions_to_match = [
        AskedQuestion(
            record.id if count_of_id[record.id] == 1 else f"{record.splits[0]}/{record.id}",
            (record.id,),
            record.splits if record.splits != ("neutral",) else (),
            record.text,
            record.images[0],
        )
        for record in records
    ]
    matches = match_answers(read_answers(answers, answer_field, id_field=id_field), questions_to_match, answers)
    return [
        AnsweredQuestion(split, matches[question.id].text, record.answer, record.images[0])
        for question, record in zip(questions_to_match, records, strict=True)
        for split in record.splits
    ]
