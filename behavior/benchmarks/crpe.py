"""CRPE: choices about relations, each asked with its options in four orders (Wang et al. 2024, arXiv 2402.19474).

Rule of open-compass/VLMEvalKit, ``CRPE.evaluate``, commit e8e78f0. What the release does:

- four consecutive rows are one question, right if all four are; its category is that of its rows;
- a row: a text that is one character, or begins with A, B, C or D, is compared by its first character with the first
  of the truth, so "A cat" is option A; otherwise it is right if it contains the truth from its fifth character on,
  ignoring case;
- that rest is empty for a truth that is a bare letter, so any text that begins with another character is right; a
  note counts the rows that were decided so;
- an empty cell is the text ``nan``.

``variant="all_seeing"`` is the rule of OpenGVLab/all-seeing, commit 5cb8cea: a row is right if the text is exactly the letter.
Groups without all four answers are left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from behavior.benchmarks import record_files
from behavior.benchmarks.image_cells import image_name
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import grouped, incomplete_note, score_of, share
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Scoring
from concepts.reading.record import Record
from groundscope.core.errors import DataError

CATEGORIES = ("exist", "subject", "predicate", "object")
_ROWS = 4
_LETTERS = "ABCD"


def is_right(truth: str, text: str) -> bool:
    """Return whether a row is right by the rule of VLMEvalKit.

    >>> from behavior.benchmarks.crpe import is_right
    >>> is_right("A. the man", "A cat"), is_right("A. the man", "It is the man"), is_right("A", "none"), is_right("B", "C")
    (True, True, True, False)
    """
    text = text or "nan"
    if len(text) == 1 or text[0] in _LETTERS:
        return text[0] == truth[0]
    return truth[4:].lower() in text.lower()


def _question(number: int, record: Record) -> BenchmarkQuestion:
    truth = record.text("answer", "correct_option")
    category = record.text("category").strip()
    if category not in CATEGORIES:
        msg = f"{record.where}: field 'category' is '{category[:20]}'; it must be one of {', '.join(CATEGORIES)}"
        raise DataError(msg)
    by_index = "index" in record.values
    return BenchmarkQuestion(
        record.identifier("index" if by_index else "question_id"),
        image_name(record, "image_path", "image"),
        record.text("question", "text"),
        truth,
        "choice",
        level="object" if category == "exist" else "relation",
        kind=category,
        candidates=tuple(_LETTERS),
        aliases=(str(number),),
        fields={"set": number // _ROWS},
        where=record.where,
    )


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    questions = record_files.read_questions(files[QUESTIONS], _question)
    if len(questions) % _ROWS:
        msg = f"{files[QUESTIONS]}: {len(questions)} rows, but each question has four consecutive rows"
        raise DataError(msg)
    return questions


def _read_answers(path: Path, _: Mapping[str, Path]) -> list[AnsweredQuestion]:
    # A cell that pandas reads as missing is the text "nan" for the release.
    rows = record_files.read_answered(path, _question, ("prediction", "text"), missing="nan")
    if len(rows) % _ROWS:
        msg = f"{path}: {len(rows)} rows, but each question has four consecutive rows"
        raise DataError(msg)
    return rows


def _score(scoring: Scoring) -> BenchmarkScore:
    strict = scoring.variant == "all_seeing"

    def right(row: AnsweredQuestion) -> bool:
        return row.text == row.question.answer if strict else is_right(row.question.answer, row.text)

    sets = grouped(scoring.rows, lambda r: r.question.fields["set"])
    whole = [members for members in sets.values() if len(members) == _ROWS]
    ok = [(all(right(r) for r in members), members[0]) for members in whole]
    figures = {"accuracy": share([hit for hit, _ in ok], [_group(r) for _, r in ok])}
    parts = {}
    for category in CATEGORIES:
        chosen = [(hit, _group(r)) for hit, r in ok if r.question.kind == category]
        if chosen:
            parts[category] = {"accuracy": share([hit for hit, _ in chosen], [group for _, group in chosen])}
    notes = list(incomplete_note(len(sets) - len(whole), "question"))
    empty = 0 if strict else sum(_by_empty_rest(r) for r in scoring.rows)
    if empty:
        notes.append(f"{empty} rows are right only because the truth is a bare letter")
    rows = scoring.rows
    answers = [r.row(r.text[0] if r.text[:1] in tuple(_LETTERS) else None, correct=right(r)) for r in rows]
    unparsed = sum(r.text[:1] not in tuple(_LETTERS) for r in rows)
    return score_of("crpe", scoring, answers, figures, parts=parts, unparsed=unparsed, notes=notes)


def _by_empty_rest(row: AnsweredQuestion) -> bool:
    text = row.text or "nan"
    return len(text) > 1 and text[0] not in _LETTERS and not row.question.answer[4:]


def _group(row: AnsweredQuestion) -> str:
    return row.question.image or str(row.question.fields["set"])


CRPE = Benchmark(
    "CRPE",
    "Wang et al. 2024, arXiv 2402.19474; open-compass/VLMEvalKit, commit e8e78f0",
    ("choice",),
    ("object", "relation"),
    {
        QUESTIONS: "CRPE_EXIST.tsv or CRPE_RELATION.tsv, or All-Seeing's lines question_id, text, category, correct_option"
    },
    _read,
    _score,
    AnswerLayout(
        ("prediction", "text"), ids=("index", "question_id"), question=("question", "prompt"), image=("image_path",)
    ),
    variants={"release": "the rule of VLMEvalKit", "all_seeing": "exactly the letter"},
    read_answers=_read_answers,
    answers_hold_questions=True,
)
