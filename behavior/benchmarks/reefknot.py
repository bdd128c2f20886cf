"""Reefknot: relation hallucination, perceptive and cognitive, in three tasks (Zheng et al. 2024, arXiv 2408.09429).

Rule of JackChen-seu/Reefknot, ``neok_code/utils.py``, commit 3811890 (no longer in the newest). What the release
does:

- yes/no: the answer is yes if the text contains ``yes`` anywhere in lower case, also in *eyes*; otherwise no;
- in pairs, which are consecutive lines, the second answer is no if it contains ``no`` anywhere, also in *know*;
  otherwise yes;
- choice: the first character, in upper case, is compared with the label; leading spaces count, and an empty answer,
  at which the release stops with an error, is wrong;
- R is the mean of 1 - hallucination rate over the three tasks; it is left out unless all three have answers;
- the judge of the third task (open questions) was not released: its answers count if a verdict file judges them.

Answer files hold the questions too (``query_prompt``, ``label``, ``type``, ``response``); give one file, or a folder
with one file for each task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from behavior.benchmarks import record_files
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import groups_of, score_of, share, summed
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Judge, Scoring
from concepts.reading.record import Record
from groundscope.core.errors import DataError
from groundscope.core.statistics import Estimate

_TASKS = {"yes/no": "yes/no", "multi-choice": "choice", "multichoice": "choice", "vqa": "judged", "open": "judged"}
_KINDS = {
    "perception": "perception",
    "perceptive": "perception",
    "cognition": "cognitive",
    "cognitive": "cognitive",
    "": "",
}
_TEXT = ("response",)


def read_yes(text: str) -> str:
    """Return ``yes`` if a text contains it, else ``no``, as the release reads single answers and first answers of pairs.

    >>> from behavior.benchmarks.reefknot import read_yes
    >>> read_yes("It has eyes."), read_yes("Perhaps")
    ('yes', 'no')
    """
    return "yes" if "yes" in text.strip().lower() else "no"


def read_no(text: str) -> str:
    """Return ``no`` if a text contains it, else ``yes``, as the release reads second answers of pairs.

    >>> from behavior.benchmarks.reefknot import read_no
    >>> read_no("I know it"), read_no("Perhaps")
    ('no', 'yes')
    """
    return "no" if "no" in text.strip().lower() else "yes"


def _question(number: int, record: Record) -> BenchmarkQuestion:
    task = record_files.label_of(record, "type", _TASKS)
    label = record.text("label").strip()
    if task == "yes/no" and label.lower() not in {"yes", "no"}:
        msg = f"{record.where}: field 'label' is '{label[:20]}', neither yes nor no"
        raise DataError(msg)
    kind = record_files.text_or_empty(record, "relation_type").strip().lower()
    return BenchmarkQuestion(
        f"{task}/{number}",
        record_files.text_or_empty(record, "image_id"),
        record.text("query_prompt"),
        label.lower() if task == "yes/no" else label,
        task,
        level="relation",
        kind=_KINDS.get(kind, kind),
        candidates={"yes/no": ("yes", "no"), "choice": ("A", "B", "C", "D")}.get(task, ()),
        fields={"line": number},
        where=record.where,
    )


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        msg = f"folder '{path}' has no .jsonl file"
        raise DataError(msg)
    return files


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    return [q for file in _files(files[QUESTIONS]) for q in record_files.read_questions(file, _question)]


def _read_answers(path: Path, _: Mapping[str, Path]) -> list[AnsweredQuestion]:
    return [row for file in _files(path) for row in record_files.read_answered(file, _question, _TEXT)]


def _read_answer(row: AnsweredQuestion) -> str | None:
    if row.question.task == "yes/no":
        return read_yes(row.text)
    return row.text[:1].upper() if row.question.task == "choice" and row.text[:1].upper() in "ABCD" else None


def _is_right(row: AnsweredQuestion) -> bool | None:
    if row.question.task == "yes/no":
        return read_yes(row.text) == row.question.answer
    if row.question.task == "choice":
        return row.text[:1].upper() == row.question.answer.upper() if row.text else False
    return row.verdict


def _score(scoring: Scoring) -> BenchmarkScore:
    figures = _figures(scoring.rows)
    kinds = sorted({r.question.kind for r in scoring.rows if r.question.kind})
    parts = {kind: _figures([r for r in scoring.rows if r.question.kind == kind]) for kind in kinds}
    answers = [r.row(_read_answer(r) or None, correct=_is_right(r)) for r in scoring.rows]
    notes = []
    yes_no = [r for r in scoring.rows if r.question.task == "yes/no"]
    if len(yes_no) % 2:
        notes.append("the last yes-no answer has no partner and is in no pair")
    open_ = [r for r in scoring.rows if r.question.task == "judged"]
    unjudged = sum(r.verdict is None for r in open_)
    if unjudged:
        notes.append(f"{unjudged} open answers without a verdict; the release has no judge for them")
    words = [r.text.lower().split() for r in yes_no]
    unparsed = sum(not {"yes", "no"} & {w.strip(".,!?*\"'") for w in ws} for ws in words)
    unparsed += sum(r.question.task == "choice" and _read_answer(r) is None for r in scoring.rows)
    return score_of("reefknot", scoring, answers, figures, parts=parts, unparsed=unparsed, notes=notes)


def _figures(rows: Sequence[AnsweredQuestion]) -> dict[str, Estimate]:
    figures: dict[str, Estimate] = {}
    rates: list[Estimate] = []
    for task, name in (("yes/no", "yes_no"), ("choice", "choice"), ("judged", "open")):
        judged = [r for r in rows if r.question.task == task and _is_right(r) is not None]
        if not judged:
            continue
        right = share([bool(_is_right(r)) for r in judged], groups_of(judged))
        figures[f"{name}_accuracy"] = right
        rates.append(right)
        if task == "yes/no":
            figures["yes_ratio"] = share([read_yes(r.text) == "yes" for r in judged], groups_of(judged))
            figures |= _pairs(judged)
    if len(rates) == 3:
        figures["R"] = summed(rates, 3)
    return figures


def _pairs(rows: Sequence[AnsweredQuestion]) -> dict[str, Estimate]:
    """Return the figures of pairs: consecutive answers, each read by its own rule."""
    firsts, seconds = rows[: len(rows) - len(rows) % 2 : 2], rows[1::2]
    if not firsts:
        return {}
    first = [read_yes(r.text) == r.question.answer for r in firsts]
    second = [read_no(r.text) == r.question.answer for r in seconds]
    groups = groups_of(firsts)
    return {
        "pair_first_accuracy": share(first, groups),
        "pair_second_accuracy": share(second, groups),
        "pair_accuracy": share([a and b for a, b in zip(first, second, strict=True)], groups),
    }


def _write_requests(rows: Sequence[AnsweredQuestion], path: Path) -> int:
    return record_files.write_lines(
        path,
        (
            {"id": r.question.id, "image_id": r.question.image, "query_prompt": r.question.text, "label": r.question.answer,
             "response": r.text}
            for r in rows
            if r.question.task == "judged"
        ),
    )  # fmt: skip


REEFKNOT = Benchmark(
    "Reefknot",
    "Zheng et al. 2024, arXiv 2408.09429; JackChen-seu/Reefknot, commit 3811890",
    ("yes/no", "choice", "judged"),
    ("relation",),
    {QUESTIONS: "YESNO.jsonl, Multichoice.jsonl or VQA.jsonl, or a folder with them"},
    _read,
    _score,
    AnswerLayout(_TEXT, question=("query_prompt",), image=("image_id",)),
    judge=Judge(
        _write_requests,
        lambda path: record_files.verdicts(
            path, lambda r: record_files.yes_no_verdict(r, "verdict", "reply"), ids=("id",)
        ),
    ),
    read_answers=_read_answers,
    answers_hold_questions=True,
    unjudged=("release",),
)
