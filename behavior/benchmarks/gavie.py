"""GAVIE: a judge rates accuracy and relevancy of answers to instructions, each 0 to 10 (Liu et al. 2023, arXiv 2306.14565).

Source: FuxiaoLiu/LRV-Instruction, ``Evaluation/evaluate.py``, commit 5101024, which writes prompts and computes no
figure. What the release does, and what differs here:

- the prompt gives each region's height as its width (``bbox[2]`` twice); our requests give both;
- its code reads the field ``instruction``, its data has ``question``; both are read;
- prompts are files named after the image, so a second instruction about an image replaces the first; our requests are
  one file with a line for each instruction, which states what the judge rates in our words;
- it compares several models in one prompt; our requests have one answer each.

Verdicts are ``relevancy`` and ``accuracy``, or ``reply`` in the release's output format, of which the scores of
answer 1 are read. Relevancy is the share of instruction following in the card. No answer is right or wrong:
``correct`` is None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from behavior.benchmarks import record_files
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import average, score_of
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Judge, Scoring
from concepts.reading.record import Record
from groundscope.core.errors import DataError
from groundscope.core.user_files import read_json

REGIONS = "regions"
RATINGS = ("accuracy", "relevancy")
_RATED = (
    "Rate the answer from 0 to 10 twice. Relevancy: does it directly follow the instruction? Accuracy: does it agree with "
    "the image, as the regions describe it?"
)


def read_ratings(reply: str) -> dict[str, float] | None:
    r"""Read a reply in the release's output format; None without both ratings of answer 1.

    >>> from behavior.benchmarks.gavie import read_ratings
    >>> read_ratings("Relevancy:\nscore of the answer1: 8\nreason: …\nAccuracy:\nscore of the answer1: 5/10\nreason: …")
    {'accuracy': 5.0, 'relevancy': 8.0}
    """
    ratings = {}
    for name in RATINGS:
        part = re.search(rf"{name}\s*:(.*?)(?=relevancy\s*:|accuracy\s*:|\Z)", reply, re.IGNORECASE | re.DOTALL)
        number = (
            re.search(r"score of the answer\s*1\s*:\s*(\d+(?:\.\d+)?)", part.group(1), re.IGNORECASE) if part else None
        )
        if number is None or float(number.group(1)) > 10:
            return None
        ratings[name] = float(number.group(1))
    return ratings


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    regions = _regions(files[REGIONS]) if REGIONS in files else {}

    def make(number: int, record: Record) -> BenchmarkQuestion:
        image = record.identifier("image_id")
        return BenchmarkQuestion(
            f"{image}/{number}",
            image,
            record.text("instruction", "question"),
            "",
            "judged",
            fields={"regions": regions.get(image, "")},
            where=record.where,
        )

    return record_files.read_questions(files[QUESTIONS], make)


def _regions(path: Path) -> dict[str, str]:
    """Return the regions of each image as lines of the release's prompt."""
    content = read_json(path)
    try:
        return {
            str(image): "\n".join(
                "{} X:{} Y:{} Width:{} Height:{}".format(box["caption"], *box["bbox"][:4]) for box in boxes
            )
            for image, boxes in content.items()
        }
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        msg = f"{path}: expected an object of image ids with lists of regions (caption, bbox)"
        raise DataError(msg) from error


def _write_requests(rows: Sequence[AnsweredQuestion], path: Path) -> int:
    lacking = next((r for r in rows if not r.question.fields["regions"]), None)
    if lacking is not None:
        msg = f"GAVIE's judge reads regions, and image '{lacking.question.image}' has none; give files={{'regions': …}}"
        raise DataError(msg)
    return record_files.write_lines(
        path,
        (
            {"id": r.question.id, "image_id": r.question.image, "bounding box": r.question.fields["regions"],
             "instruction": r.question.text, "answer1": r.text, "rate": _RATED}
            for r in rows
        ),
    )  # fmt: skip


def _verdict(record: Record) -> dict[str, float] | None:
    if "reply" in record.values:
        return read_ratings(record_files.reply_of(record, "reply"))
    if "verdict" in record.values and record.values["verdict"] is None:
        return None
    values: dict[str, Any] = dict(zip(RATINGS, record.numbers(*RATINGS), strict=True))
    wrong = next((name for name, value in values.items() if not 0 <= value <= 10), None)
    if wrong is not None:
        msg = f"{record.where}: field '{wrong}' is {values[wrong]:g}, but must be from 0 to 10"
        raise DataError(msg)
    return values


def _score(scoring: Scoring) -> BenchmarkScore:
    rows = [r for r in scoring.rows if r.verdict is not None]
    groups = [r.question.group for r in rows]
    figures = {name: average([r.verdict[name] for r in rows], groups, 0, 10) for name in RATINGS}
    unread = len(scoring.rows) - len(rows)
    notes = [f"{unread} answers without a readable verdict, left out"] if unread else []
    answers = [r.row(None, correct=None) for r in scoring.rows]
    return score_of("gavie", scoring, answers, figures, unparsed=unread, notes=notes)


GAVIE = Benchmark(
    "GAVIE",
    "Liu et al. 2023, arXiv 2306.14565; FuxiaoLiu/LRV-Instruction, commit 5101024",
    ("judged",),
    (),
    {
        QUESTIONS: "evaluation_set.json: image_id, question",
        REGIONS: "vg_annotation.json: image id to regions (caption, bbox); needed to write requests",
    },
    _read,
    _score,
    AnswerLayout(
        ("answer", "response", "text"), ids=("id",), question=("instruction", "question"), image=("image_id",)
    ),
    optional=(REGIONS,),
    judge=Judge(_write_requests, lambda path: record_files.verdicts(path, _verdict, ids=("id",))),
)
