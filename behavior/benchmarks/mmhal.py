"""MMHal-Bench: 96 questions of eight types, each answer rated 0 to 6 by a judge (Sun et al. 2023, arXiv 2309.14525).

Rule of ``eval_gpt_mmhal.py``, commit 830a083 of the data set. What the release does:

- a rating is read where the reply contains ``rating: s``, with one space and ignoring case, for exactly one s from 0
  to 6; otherwise it is 0;
- an answer with a rating below 3 hallucinates; the score is the mean rating;
- the type of a question is its place modulo 8, so the order of the 96 records counts;
- verdict files are the judge's responses in the order of the records, without ids: they are matched by place only
  with ``by_place=True``. Our verdict files have ``id`` (the place, from 0) and ``rating`` or ``reply``.

``variant="judged_only"`` leaves out answers without a readable rating.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from behavior.benchmarks import record_files
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import average, score_of, share
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Judge, Scoring
from concepts.reading.record import Record, is_text
from groundscope.core.errors import DataError
from groundscope.core.statistics import Estimate

RECORDS = 96
TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
"""Types of questions by place modulo 8."""
_LEVELS = {
    "attribute": "attribute",
    "adversarial": "object",
    "comparison": "relation",
    "counting": "attribute",
    "relation": "relation",
}
"""Type to our level; the other types have none. Comparisons are of objects with each other."""
_TEXT = ("model_answer",)
_HALLUCINATES_BELOW = 3


def read_rating(reply: str) -> int | None:
    """Read a judge's reply as the release does; None if it has no rating or several.

    >>> from behavior.benchmarks.mmhal import read_rating
    >>> read_rating("… Rating: 4, somewhat"), read_rating("Rating:  4"), read_rating("rating: 1 or rating: 2")
    (4, None, None)
    """
    ratings = [s for s in range(7) if f"rating: {s}" in reply.lower()]
    return ratings[0] if len(ratings) == 1 else None


def _question(number: int, record: Record) -> BenchmarkQuestion:
    kind = TYPES[number % len(TYPES)]
    content = record.values.get("image_content")
    return BenchmarkQuestion(
        str(number),
        record_files.text_or_empty(record, "image_id", "image_src"),
        record.text("question"),
        record.text("gt_answer"),
        "judged",
        level=_LEVELS.get(kind, ""),
        kind=kind,
        fields={
            "record": record_files.short_cells(record),
            "image_content": ", ".join(content) if isinstance(content, list) else "",
        },
        where=record.where,
    )


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    return record_files.read_questions(files[QUESTIONS], _question)


def _read_answers(path: Path, _: Mapping[str, Path]) -> list[AnsweredQuestion]:
    return record_files.read_answered(path, _question, _TEXT)


def _write_requests(rows: Sequence[AnsweredQuestion], path: Path) -> int:
    ordered = sorted(rows, key=lambda r: int(r.question.id))
    return record_files.write_list(path, (dict(r.question.fields["record"]) | {_TEXT[0]: r.text} for r in ordered))


def _verdict(record: Record) -> int | None:
    if "rating" in record.values:
        value = record.values["rating"]
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 6):
            return value
        msg = f"{record.where}: field 'rating' must be a whole number from 0 to 6, or null"
        raise DataError(msg)
    if "reply" in record.values and not is_text(record.values["reply"]):
        msg = f"{record.where}: field 'reply' must hold text"
        raise DataError(msg)
    return read_rating(record_files.reply_of(record, "reply"))


def _score(scoring: Scoring) -> BenchmarkScore:
    rows = [r for r in scoring.rows if r.verdict is not None or scoring.variant == "release"]
    figures = _figures(rows)
    parts = {kind: _figures([r for r in rows if r.question.kind == kind]) for kind in TYPES}
    parts = {kind: part for kind, part in parts.items() if part["score"].n}
    unread = sum(r.verdict is None for r in scoring.rows)
    treated = "rated 0" if scoring.variant == "release" else "left out"
    notes = [f"{unread} answers without a readable rating, {treated}"] if unread else []
    if len(scoring.questions) != RECORDS:
        notes.append(f"{len(scoring.questions)} records; the release has {RECORDS}")
    rated = {r.question.id: r.verdict for r in rows}
    answers = [
        r.row(None, correct=(rated[r.question.id] or 0) >= _HALLUCINATES_BELOW if r.question.id in rated else None)
        for r in scoring.rows
    ]
    return score_of("mmhal", scoring, answers, figures, parts=parts, unparsed=unread, notes=notes)


def _figures(rows: Sequence[AnsweredQuestion]) -> dict[str, Estimate]:
    ratings = [float(r.verdict or 0) for r in rows]
    groups = [r.question.group for r in rows]
    return {
        "score": average(ratings, groups, 0, 6),
        "hallucination_rate": share([rating < _HALLUCINATES_BELOW for rating in ratings], groups),
    }


MMHAL = Benchmark(
    "MMHal-Bench",
    "Sun et al. 2023, arXiv 2309.14525; Shengcao1006/MMHal-Bench, commit 830a083",
    ("judged",),
    ("object", "attribute", "relation"),
    {QUESTIONS: "response_template.json: 96 records with question, gt_answer, image_content"},
    _read,
    _score,
    AnswerLayout(_TEXT, question=("question",), image=("image_id",)),
    variants={"release": "an unreadable rating is 0", "judged_only": "answers without a readable rating are left out"},
    judge=Judge(
        _write_requests,
        lambda path: record_files.verdicts(path, _verdict, ids=("id",) if _has_ids(path) else ()),
        by_place=True,
    ),
    read_answers=_read_answers,
    answers_hold_questions=True,
)


def _has_ids(path: Path) -> bool:
    """Whether verdicts have ids of ours; the id of a stored response of a judge is another."""
    from concepts.loaders.table import read_rows

    first = next(iter(read_rows(path)), None)
    return first is not None and "choices" not in first.values
