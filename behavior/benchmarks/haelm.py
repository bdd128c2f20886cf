"""HaELM: a trained judge says whether a description is accurate (Wang et al. 2023, arXiv 2308.15126).

Rule of junyangwang0410/HaELM, ``interface.py``. What the release does:

- only the first line of a description is judged, next to the reference captions;
- its judge, a LLaMA, writes one token for each description, and prints it; nothing is counted. The rate is the share
  of ``no``.

Requests are lines ``image, reference caption, output``, as the release reads them, with our ``id``. Verdicts are
``yes`` (accurate) or ``no``; the release prints them in order without ids, so they are matched by place only with
``by_place=True``. Questions, in our layout because the release has none apart from its answers, are the same lines
without ``output``; ``id`` is the image unless it repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from behavior.benchmarks import record_files
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import groups_of, score_of, share
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Judge, Scoring
from concepts.loaders.table import read_rows
from concepts.reading.record import Record, abbreviate, is_text
from groundscope.core.errors import DataError

_TEXT = ("output",)
_REFERENCE = "reference caption"


class _Numbered:
    """Makes questions of records, with the image as id, and a number behind it where the image repeats."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __call__(self, _: int, record: Record) -> BenchmarkQuestion:
        image = record.identifier("image")
        self._counts[image] = self._counts.get(image, 0) + 1
        captions = record.field(_REFERENCE)
        if not isinstance(captions, list) or not captions or not all(map(is_text, captions)):
            msg = f"{record.where}: field '{_REFERENCE}' must hold a list of texts, not {abbreviate(captions)}"
            raise DataError(msg)
        number = image if self._counts[image] == 1 else f"{image}#{self._counts[image]}"
        return BenchmarkQuestion(
            record.identifier("id") if "id" in record.values else number,
            image,
            "",
            "\n".join(captions),
            "caption",
            kind="caption",
            fields={"captions": tuple(captions)},
            where=record.where,
        )


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    return record_files.read_questions(files[QUESTIONS], _Numbered())


def _read_answers(path: Path, _: Mapping[str, Path]) -> list[AnsweredQuestion]:
    return record_files.read_answered(path, _Numbered(), _TEXT)


def _write_requests(rows: Sequence[AnsweredQuestion], path: Path) -> int:
    return record_files.write_lines(
        path,
        (
            {
                "id": r.question.id,
                "image": r.question.image,
                _REFERENCE: list(r.question.fields["captions"]),
                "output": r.text,
            }
            for r in rows
        ),
    )


def _read_verdicts(path: Path) -> list[tuple[str | None, bool | None, str]]:
    return [
        (
            record.identifier("id", "image") if "id" in record.values or "image" in record.values else None,
            record_files.yes_no_verdict(record, "verdict", "reply"),
            record.where,
        )
        for record in read_rows(path)
    ]


def _score(scoring: Scoring) -> BenchmarkScore:
    rows = [r for r in scoring.rows if r.verdict is not None]
    unread = len(scoring.rows) - len(rows)
    figures = {"hallucination_rate": share([not r.verdict for r in rows], groups_of(rows))}
    several = sum("\n" in r.text.strip() for r in scoring.rows)
    notes = [f"{several} descriptions have further lines, which the release does not judge"] if several else []
    notes += [f"{unread} verdicts are neither yes nor no, left out"] if unread else []
    answers = [r.row(None, correct=r.verdict) for r in scoring.rows]
    return score_of("haelm", scoring, answers, figures, unparsed=unread, notes=notes)


HAELM = Benchmark(
    "HaELM",
    "Wang et al. 2023, arXiv 2308.15126; junyangwang0410/HaELM, interface.py",
    ("caption",),
    (),
    {QUESTIONS: "lines image, reference caption (a list)"},
    _read,
    _score,
    AnswerLayout((*_TEXT, "caption", "text"), ids=("id", "image"), image=("image",)),
    judge=Judge(_write_requests, _read_verdicts),
    read_answers=_read_answers,
    answers_hold_questions=True,
)
