"""LLaVA-Bench: a judge rates two answers, the reference's and the model's (Liu et al. 2023, arXiv 2304.08485).

Rule of haotian-liu/LLaVA, ``llava/eval/eval_gpt_review_bench.py`` and ``summarize_gpt_review.py``, commit c121f04.
What the release does:

- ratings are the first line of the reply, commas as spaces, if it is two numbers with one space between them;
  otherwise both are -1;
- an unreadable reply counts as -1 for both answers, so it lowers both means;
- the means over the reviews are rounded to .001 and their ratio, in percent, to .1: ``relative_score``, by category
  and in all;
- questions, answers and references are matched by line when reviews are made; here reviews are matched by
  ``question_id``.

``variant="judged_only"`` leaves out unreadable replies and rounds nothing. No answer is right or wrong: ``correct`` is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from behavior.benchmarks import record_files
from behavior.benchmarks.image_cells import image_name
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import score_of, with_value
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Judge, Scoring
from concepts.reading.record import Record, abbreviate
from groundscope.core.errors import DataError
from groundscope.core.statistics import FEW_GROUPS, Estimate, cluster_bootstrap, ratio

UNREADABLE = (-1.0, -1.0)


def read_ratings(reply: str) -> tuple[float, float]:
    r"""Read a review as the release does: the ratings of the reference and of the model, or -1 for both.

    >>> from behavior.benchmarks.llava_bench import read_ratings
    >>> read_ratings("8 7.5\nBecause"), read_ratings("8, 7"), read_ratings("Answer 1 is better")
    ((8.0, 7.5), (-1.0, -1.0), (-1.0, -1.0))
    """
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(word) for word in words)
    except ValueError:
        return UNREADABLE
    return first, second


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    def make(_: int, record: Record) -> BenchmarkQuestion:
        return BenchmarkQuestion(
            record.identifier("question_id"),
            image_name(record),
            record.text("text"),
            "",
            "judged",
            kind=record_files.text_or_empty(record, "category"),
            where=record.where,
        )

    return record_files.read_questions(files[QUESTIONS], make)


def _write_requests(rows: Sequence[AnsweredQuestion], path: Path) -> int:
    def number(question: BenchmarkQuestion) -> int | str:
        return int(question.id) if question.id.isdecimal() else question.id

    return record_files.write_lines(
        path,
        (
            {"question_id": number(r.question), "prompt": r.question.text, "text": r.text, "answer_id": r.question.id,
             "model_id": "", "metadata": {}}
            for r in rows
        ),
    )  # fmt: skip


def _verdict(record: Record) -> tuple[float, float]:
    pair = record.values.get("tuple")
    if pair is None:
        return read_ratings(record_files.reply_of(record, "content", "reply"))
    if (
        not isinstance(pair, list)
        or len(pair) != 2
        or not all(isinstance(v, int | float) and math.isfinite(v) for v in pair)
    ):
        msg = f"{record.where}: field 'tuple' must hold two numbers, not {abbreviate(pair)}"
        raise DataError(msg)
    return float(pair[0]), float(pair[1])


def _score(scoring: Scoring) -> BenchmarkScore:
    release = scoring.variant == "release"
    rows = [r for r in scoring.rows if release or tuple(r.verdict) != UNREADABLE]
    kinds = dict.fromkeys(r.question.kind for r in rows if r.question.kind)
    figures = {"relative_score": _relative(rows, rounded=release)}
    parts = {
        kind: {"relative_score": _relative([r for r in rows if r.question.kind == kind], rounded=release)}
        for kind in kinds
    }
    unread = sum(tuple(r.verdict) == UNREADABLE for r in scoring.rows)
    notes = [f"{unread} unreadable reviews, {'counted as -1' if release else 'left out'}"] if unread else []
    answers = [r.row(None, correct=None) for r in scoring.rows]
    return score_of("llava_bench", scoring, answers, figures, parts=parts, unparsed=unread, notes=notes)


def _relative(rows: Sequence[AnsweredQuestion], *, rounded: bool) -> Estimate:
    pairs = [(r.verdict[1], r.verdict[0]) for r in rows]
    groups = [r.question.group for r in rows]
    total = sum(reference for _, reference in pairs)
    if not pairs or total == 0:
        return Estimate(math.nan, math.nan, math.nan, len(pairs))
    low, high = cluster_bootstrap(pairs, groups, ratio)
    exact = Estimate(
        100 * sum(own for own, _ in pairs) / total, 100 * low, 100 * high, len(pairs), len(set(groups)) < FEW_GROUPS
    )
    if not rounded:
        return exact
    own, reference = (round(sum(values) / len(values), 3) for values in zip(*pairs, strict=True))
    return with_value(exact, round(own / reference * 100, 1) if reference else math.nan)


LLAVA_BENCH = Benchmark(
    "LLaVA-Bench",
    "Liu et al. 2023, arXiv 2304.08485; haotian-liu/LLaVA, commit c121f04",
    ("judged",),
    (),
    {QUESTIONS: "questions.jsonl: question_id, image, text, category"},
    _read,
    _score,
    AnswerLayout(("text",), ids=("question_id",), question=("prompt",)),
    variants={
        "release": "unreadable reviews are -1, figures rounded as printed",
        "judged_only": "unreadable reviews are left out",
    },
    judge=Judge(_write_requests, lambda path: record_files.verdicts(path, _verdict, ids=("question_id",))),
)
