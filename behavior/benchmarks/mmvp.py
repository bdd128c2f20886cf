"""MMVP: pairs of images that CLIP confuses (Tong et al. 2024, arXiv 2401.06209).

Rule of tsb0601/MMVP, ``scripts/gpt_grader.py``, commit 7635005: a judge says whether each answer is right, and a pair
counts if both are. What the release does:

- only a reply that is exactly ``yes``, ignoring case, is right: ``Yes.`` is not;
- pairs are consecutive lines of the answer file, whatever their questions; a last line without a partner is ignored;
- question n is about the image ``MMVP Images/n.jpg``, and its prompt is the question, a space, and the options.

Variants: ``release`` needs verdicts; ``letter`` reads the option from the text (`read_option`), pairs questions 1 and
2, 3 and 4, … by their numbers, and also reports accuracy per question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from behavior.benchmarks import record_files
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import grouped, groups_of, incomplete_note, score_of, share
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Judge, Scoring
from concepts.reading.record import Record
from groundscope.core.errors import DataError

_TEXT = ("response",)
_OPTION = re.compile(r"\(([a-z])\)\s*([^()]*)", re.IGNORECASE)


def read_option(text: str, options: Mapping[str, str]) -> str | None:
    """Read the option that a text chooses; None if it chooses none or several.

    In this order: one letter in parentheses; a text that is a letter, or begins with one and a mark (``a.``, ``b:``); a text
    that contains exactly one option's words.

    >>> from behavior.benchmarks.mmvp import read_option
    >>> options = {"a": "Open", "b": "Closed"}
    >>> [read_option(text, options) for text in ("(a)", "B.", "They are closed", "a dog", "(a) or (b)")]
    ['a', 'b', 'b', None, None]
    """
    letters = {m.lower() for m in re.findall(r"\(([A-Za-z])\)", text) if m.lower() in options}
    if letters:
        return letters.pop() if len(letters) == 1 else None
    plain = text.strip().strip("*_`\"' ")
    start = re.match(r"(?:option\s+|answer\s*:\s*)?([A-Za-z])(?:[.):,\s]*$|[.):]\s)", plain, re.IGNORECASE)
    if start is not None and start.group(1).lower() in options:
        return start.group(1).lower()
    named = [
        key for key, words in options.items() if words and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.I)
    ]
    return named[0] if len(named) == 1 else None


def _options(text: str) -> dict[str, str]:
    return {letter.lower(): words.strip() for letter, words in _OPTION.findall(text)}


def _make(number: str, question: str, options: str, truth: str, where: str) -> BenchmarkQuestion:
    letters = _options(options)
    answer = truth.strip().strip("()").lower()
    if answer not in letters:
        msg = f"{where}: the right option '{truth[:20]}' is not among the options '{options[:60]}'"
        raise DataError(msg)
    candidates = tuple(f"({letter})" for letter in letters)
    prompt = f"{question} {options}"
    return BenchmarkQuestion(
        number,
        f"{number}.jpg",
        prompt,
        f"({answer})",
        "choice",
        candidates=candidates,
        fields={"options": letters},
        where=where,
    )


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    def make(number: int, record: Record) -> BenchmarkQuestion:
        index = record_files.text_or_empty(record, "Index", "lndex") or str(
            number + 1
        )  # the header of the release is misspelled
        return _make(
            index, record.text("Question"), record.text("Options"), record.text("Correct Answer"), record.where
        )

    return record_files.read_questions(files[QUESTIONS], make)


def _read_answers(path: Path, _: Mapping[str, Path]) -> list[AnsweredQuestion]:
    def make(__: int, record: Record) -> BenchmarkQuestion:
        prompt = record.text("prompt")
        start = prompt.find("(a)")
        question, options = (prompt[:start].strip(), prompt[start:]) if start >= 0 else (prompt, "")
        return _make(record.identifier("question_id"), question, options, record.text("answer"), record.where)

    return record_files.read_answered(path, make, _TEXT)


def _write_requests(rows: Sequence[AnsweredQuestion], path: Path) -> int:
    return record_files.write_lines(
        path,
        (
            {"question_id": r.question.id, "prompt": r.question.text, "answer": r.question.answer, "response": r.text}
            for r in rows
        ),
    )


def _score(scoring: Scoring) -> BenchmarkScore:
    rows = scoring.rows
    options = [read_option(r.text, r.question.fields["options"]) for r in rows]
    if scoring.variant == "release":
        right = [bool(r.verdict) for r in rows]
        ends = range(0, len(rows) - len(rows) % 2, 2)
        pairs = [(right[i] and right[i + 1], rows[i].question.group) for i in ends]
        shuffled = sum(not _partners(rows[i], rows[i + 1]) for i in ends)
        notes = [f"{shuffled} pairs are of other questions than 1 and 2, 3 and 4, …"] if shuffled else []
        notes += ["the last answer has no partner"] if len(rows) % 2 else []
    else:
        right = [o is not None and f"({o})" == r.question.answer for o, r in zip(options, rows, strict=True)]
        sets = grouped(zip(rows, right, strict=True), lambda pair: (_number(pair[0]) - 1) // 2)
        whole = [members for members in sets.values() if len(members) == 2]
        pairs = [(all(ok for _, ok in members), members[0][0].question.group) for members in whole]
        notes = list(incomplete_note(len(sets) - len(whole), "pair"))
    figures = {"pair_accuracy": share([ok for ok, _ in pairs], [group for _, group in pairs])}
    if scoring.variant != "release":
        figures["accuracy"] = share(right, groups_of(rows))
    answers = [
        r.row(None if o is None else f"({o})", correct=ok) for r, o, ok in zip(rows, options, right, strict=True)
    ]
    return score_of("mmvp", scoring, answers, figures, unparsed=sum(o is None for o in options), notes=notes)


def _number(row: AnsweredQuestion) -> int:
    if not row.question.id.isdecimal():
        msg = f"{row.where}: question_id '{row.question.id}' must be the number of the image"
        raise DataError(msg)
    return int(row.question.id)


def _partners(first: AnsweredQuestion, second: AnsweredQuestion) -> bool:
    a, b = first.question.id, second.question.id
    return a.isdecimal() and b.isdecimal() and int(a) % 2 == 1 and int(b) == int(a) + 1


MMVP = Benchmark(
    "MMVP",
    "Tong et al. 2024, arXiv 2401.06209; tsb0601/MMVP, commit 7635005",
    ("choice",),
    (),
    {QUESTIONS: "Questions.csv: Index, Question, Options, Correct Answer"},
    _read,
    _score,
    AnswerLayout(_TEXT, ids=("question_id",), question=("prompt",), image=()),
    variants={
        "release": "verdicts of a judge; pairs are consecutive answers",
        "letter": "the option read from the text; pairs by number, and accuracy per question",
    },
    judge=Judge(
        _write_requests,
        lambda path: record_files.verdicts(path, lambda r: record_files.yes_no_verdict(r, "reply", "verdict") is True),
    ),
    read_answers=_read_answers,
    answers_hold_questions=True,
    unjudged=("letter",),
    write=_write_requests,
)
