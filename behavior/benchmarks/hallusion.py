"""HallusionBench: language hallucination and visual illusion (Guan et al. 2023, arXiv 2310.14566).

Rule of tianyi-lab/HallusionBench, ``utils.py`` and ``evaluation.py``, commit 744007c. A judge compares each answer
with the reference (0 wrong, 1 right, 2 unclear), and with the answer to the original figure 0 of the same question
(same or not).

What the release does, and what may surprise:

- *easy* and *hard* are printed as accuracies per question, but count question pairs, those whose ``visual_input`` is
  not 2, and those where it is 2;
- figure 0 of the questions with supplementary figures (VS) has no image and is not a figure of the accuracy per
  figure; an unclear answer to it is right;
- shares of language hallucination (LH), visual illusion (VI) and mixed errors are among wrong answers, each
  attributed by the verdict on figure 0 and the verdict ``same``;
- the bias of yes is computed from correctness: a wrong answer counts as the opposite of the truth, also where it is
  unclear.

Variants: ``release`` needs verdicts; ``own`` reads yes or no from the text (`behavior.parsing.yes_no`), and calls two
answers the same if they are equal; ``vlmevalkit`` is the rule of open-compass/VLMEvalKit at e8e78f0, whose keys leave
out VD and VS and whose figures include figure 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from behavior.benchmarks import record_files
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import grouped, groups_of, incomplete_note, score_of, share
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Judge, Scoring
from behavior.parsing import vlmevalkit, yes_no
from concepts.reading.record import Record
from groundscope.core.errors import DataError
from groundscope.core.statistics import Estimate
from groundscope.core.text import format_count

WRONG, RIGHT, UNCLEAR = "0", "1", "2"
_KEY = ("category", "subcategory", "set_id", "figure_id", "question_id")
_CHECKS = ("gpt4v_output_gpt_check", "check", "verdict")
_TEXT = ("model_prediction",)


def read_check(reply: str) -> str:
    """Read a judge's reply as the release does: ``incorrect`` is wrong, else ``correct`` is right, else it is unclear.

    >>> from behavior.benchmarks.hallusion import read_check
    >>> read_check("Incorrect."), read_check("This is correct"), read_check("unclear")
    ('0', '1', '2')
    """
    text = reply.lower()
    return WRONG if "incorrect" in text else RIGHT if "correct" in text else UNCLEAR


def read_same(reply: str) -> bool:
    """Read a judge's comparison of two answers as the release does: it contains ``same``.

    >>> from behavior.benchmarks.hallusion import read_same
    >>> read_same("Same"), read_same("different")
    (True, False)
    """
    return "same" in reply.lower()


def _key(record: Record) -> str:
    return "_".join(record.identifier(name) for name in _KEY)


def _question(_: int, record: Record) -> BenchmarkQuestion:
    fields = {name: record.identifier(name) for name in (*_KEY, "visual_input")}
    if fields["category"] not in {"VD", "VS"} or fields["visual_input"] not in {"0", "1", "2"}:
        msg = f"{record.where}: 'category' must be VD or VS and 'visual_input' 0, 1 or 2"
        raise DataError(msg)
    own = [fields[name] for name in ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")]
    return BenchmarkQuestion(
        _key(record),
        record_files.text_or_empty(record, "filename"),
        record.text("question"),
        record_files.label_of(record, "gt_answer", {"1": "yes", "0": "no"}),
        "yes/no",
        kind=fields["subcategory"],
        split=fields["category"],
        candidates=("yes", "no"),
        aliases=("_".join(own),),
        fields=fields
        | {
            "gt_answer_details": record_files.text_or_empty(record, "gt_answer_details"),
            "record": record_files.short_cells(record),
        },
        where=record.where,
    )


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    return record_files.read_questions(files[QUESTIONS], _question)


def _read_answers(path: Path, _: Mapping[str, Path]) -> list[AnsweredQuestion]:
    return record_files.read_answered(path, _question, _TEXT)


def _write_requests(rows: Sequence[AnsweredQuestion], path: Path) -> int:
    return record_files.write_list(path, (dict(r.question.fields["record"]) | {_TEXT[0]: r.text} for r in rows))


def _read_verdict(record: Record) -> tuple[str, bool | None]:
    """Return the check (0, 1 or 2) and whether the answer is the same as that to figure 0; None if that is not recorded."""
    values = record.values
    same = values.get("same")
    if "reply" in values:
        check = read_check(record_files.reply_of(record, "reply"))
        compared = read_same(record_files.reply_of(record, "same_reply")) if "same_reply" in values else None
        return check, compared
    check = str(record.field(*_CHECKS))
    if check not in {WRONG, RIGHT, UNCLEAR} or str(same) not in {"None", "0", "1"}:
        msg = f"{record.where}: the check must be 0, 1 or 2, and 'same' 0 or 1"
        raise DataError(msg)
    return check, None if same is None else str(same) == "1"


def _read_verdicts(path: Path) -> list[tuple[str | None, Any, str]]:
    result: list[tuple[str | None, Any, str]] = []
    for number, verdict, where in record_files.verdicts(path, lambda r: (r, _read_verdict(r)), ids=("id", "index")):
        record, checked = verdict
        result.append((_key(record) if number is None and _KEY[0] in record.values else number, checked, where))
    return result


# -- the rule ---------------------------------------------------------------------------------------------------------


def attribution(row: Mapping[str, str], check: str, first: str | None, *, same: bool | None) -> str:
    """Return the kind of error of one answer: ``LH``, ``VI``, ``Mixed``, or an empty text if it is no error.

    Parameters
    ----------
    row
        The fields ``category``, ``figure_id`` and ``visual_input``.
    check, first
        The verdicts on the answer and on the answer to figure 0 of the same question.
    same
        Whether the two answers are the same.

    Examples
    --------
    >>> from behavior.benchmarks.hallusion import attribution
    >>> row = {"category": "VS", "figure_id": "1", "visual_input": "2"}
    >>> attribution(row, "0", "1", same=True), attribution(row, "0", "1", same=False), attribution(row, "1", "1", same=True)
    ('LH', 'VI', '')
    """
    supplement = row["category"] == "VS"
    if check == RIGHT:
        return ""
    if row["figure_id"] == "0":
        return "VI" if not supplement else "LH" if check == WRONG else ""
    if not supplement:
        return "Mixed" if first == RIGHT and check == WRONG and same else "VI"
    if first == WRONG:
        return "LH" if check == WRONG and same else "Mixed"
    if first == UNCLEAR:
        return "VI"
    return "LH" if check == WRONG and row["visual_input"] == "2" and same else "VI"


def _score(scoring: Scoring) -> BenchmarkScore:
    if scoring.variant == "vlmevalkit":
        return _vlmevalkit(scoring)
    rows = scoring.rows
    checks = [_own(row) if scoring.variant == "own" else row.verdict[0] for row in rows]
    first = {_pair(r): c for r, c in zip(rows, checks, strict=True) if r.question.fields["figure_id"] == "0"}
    original = {_pair(r): yes_no(r.text) for r in rows if r.question.fields["figure_id"] == "0"}
    own = scoring.variant == "own"
    same = [yes_no(r.text) == original.get(_pair(r)) if own else r.verdict[1] for r in rows]
    right = [_is_right(r, c) for r, c in zip(rows, checks, strict=True)]
    kinds = [
        attribution(r.question.fields, c, first.get(_pair(r)), same=s) if _pair(r) in first else ""
        for r, c, s in zip(rows, checks, same, strict=True)
    ]
    lacking = next(
        (
            r
            for r, s, k in zip(rows, same, kinds, strict=True)
            if s is None and k and r.question.fields["figure_id"] != "0"
        ),
        None,
    )
    if lacking is not None:
        msg = f"{lacking.where}: no field 'same', which the kinds of errors need; give it in every verdict, or in none"
        raise DataError(msg)
    figures, left_out = _figures(scoring, right, kinds)
    parts = {
        part: _figures(scoring, right, kinds, part)[0]
        for part in ("VD", "VS")
        if any(r.question.split == part for r in rows)
    }
    notes = incomplete_note(left_out, "question pair")
    if not own:
        agree = sum(_own(row) == check for row, check in zip(rows, checks, strict=True))
        notes += (f"a reading of yes or no agrees with {agree} of {format_count(len(rows), 'verdict')}",)
    answers = [r.row(yes_no(r.text), correct=ok) for r, ok in zip(rows, right, strict=True)]
    unparsed = sum(yes_no(r.text) is None for r in rows)
    return score_of("hallusion", scoring, answers, figures, parts=parts, unparsed=unparsed, notes=notes)


def _figures(
    scoring: Scoring, right: Sequence[bool], kinds: Sequence[str], part: str | None = None
) -> tuple[dict[str, Estimate], int]:
    chosen = [i for i, r in enumerate(scoring.rows) if part in (None, r.question.split)]
    rows = [scoring.rows[i] for i in chosen]
    ok = {scoring.rows[i].question.id: right[i] for i in chosen}
    groups = groups_of(rows)
    totals = {key: len(members) for key, members in grouped(scoring.questions, _pair_of).items()}
    complete = {key for key, members in grouped(rows, _pair).items() if len(members) == totals[key]}
    whole = [r for r in rows if _pair(r) in complete]

    def all_right(members: Sequence[AnsweredQuestion], key: Any) -> Estimate:
        sets = grouped(members, key)
        hits = [all(ok[r.question.id] for r in group) for group in sets.values()]
        return share(hits, [group[0].question.group for group in sets.values()])

    with_image = [r for r in rows if not (r.question.split == "VS" and r.question.fields["figure_id"] == "0")]
    figure_rows = [[ok[r.question.id] for r in group] for group in grouped(with_image, _figure).values()]
    images = [group[0].question.group for group in grouped(with_image, _figure).values()]
    wrong = [(kinds[i], scoring.rows[i].question.group) for i in chosen if kinds[i]]
    errors = [r for r in rows if not ok[r.question.id]]
    figures = {
        "accuracy": share([ok[r.question.id] for r in rows], groups),
        "pair_accuracy": all_right(whole, _pair),
        "figure_accuracy": share([all(f) for f in figure_rows], images),
        "figure_inconsistent": share([any(f) and not all(f) for f in figure_rows], images),
        "figure_wrong": share([not any(f) for f in figure_rows], images),
        "easy_accuracy": all_right([r for r in whole if r.question.fields["visual_input"] != "2"], _pair),
        "hard_accuracy": all_right([r for r in whole if r.question.fields["visual_input"] == "2"], _pair),
        **{
            name: share([kind == name for kind, _ in wrong], [group for _, group in wrong])
            for name in ("LH", "VI", "Mixed")
        },
        "false_yes_of_wrong": share([r.question.answer == "no" for r in errors], groups_of(errors)),
        "yes_bias": _yes_bias(rows, ok),
    }
    return figures, len(grouped(rows, _pair)) - len(complete)


def _yes_bias(rows: Sequence[AnsweredQuestion], ok: Mapping[str, bool]) -> Estimate:
    """Return the share of yes among answers minus that among truths, with a wrong answer as the opposite of the truth."""
    import numpy as np

    from behavior.comparison import change_estimate

    if not rows:
        return share([], [])
    changes = [0 if ok[r.question.id] else (1 if r.question.answer == "no" else -1) for r in rows]
    return change_estimate(np.array(changes), groups_of(rows))


def _vlmevalkit(scoring: Scoring) -> BenchmarkScore:
    rows = scoring.rows
    parsed = [vlmevalkit(r.text) for r in rows]
    ok = {r.question.id: p == r.question.answer for r, p in zip(rows, parsed, strict=True)}

    def figures(chosen: Sequence[AnsweredQuestion]) -> dict[str, Estimate]:
        result = {"accuracy": share([ok[r.question.id] for r in chosen], groups_of(chosen))}
        for name, last in (("figure_accuracy", "figure_id"), ("pair_accuracy", "question_id")):
            names = ("subcategory", "set_id", last)
            sets = grouped(chosen, lambda r, names=names: tuple(r.question.fields[n] for n in names)).values()
            result[name] = share([all(ok[r.question.id] for r in s) for s in sets], [s[0].question.group for s in sets])
        return result

    by_part = {r.question.split for r in rows} | {r.question.kind for r in rows}
    parts = {
        part: figures([r for r in rows if part in {r.question.split, r.question.kind}]) for part in sorted(by_part)
    }
    answers = [r.row(p, correct=ok[r.question.id]) for r, p in zip(rows, parsed, strict=True)]
    return score_of("hallusion", scoring, answers, figures(rows), parts=parts, unparsed=sum(p is None for p in parsed))


def _own(row: AnsweredQuestion) -> str:
    parsed = yes_no(row.text)
    return UNCLEAR if parsed is None else RIGHT if parsed == row.question.answer else WRONG


def _is_right(row: AnsweredQuestion, check: str) -> bool:
    fields = row.question.fields
    return check == RIGHT or (check == UNCLEAR and fields["category"] == "VS" and fields["figure_id"] == "0")


def _pair_of(question: BenchmarkQuestion) -> tuple[str, ...]:
    return tuple(question.fields[name] for name in ("category", "subcategory", "set_id", "question_id"))


def _pair(row: AnsweredQuestion) -> tuple[str, ...]:
    return _pair_of(row.question)


def _figure(row: AnsweredQuestion) -> tuple[str, ...]:
    return tuple(row.question.fields[name] for name in ("category", "subcategory", "set_id", "figure_id"))


HALLUSION = Benchmark(
    "HallusionBench",
    "Guan et al. 2023, arXiv 2310.14566; tianyi-lab/HallusionBench, commit 744007c",
    ("yes/no",),
    (),
    {QUESTIONS: "HallusionBench.json, a list of questions with category, set, figure and question"},
    _read,
    _score,
    AnswerLayout(
        _TEXT, identify=lambda r: _key(r) if all(n in r.values for n in _KEY) else str(r.values.get("index", ""))
    ),
    variants={
        "release": "verdicts of a judge, in a verdict file",
        "own": "yes or no read from the text; no judge",
        "vlmevalkit": "yes or no by VLMEvalKit, with its keys of figures and pairs",
    },
    judge=Judge(_write_requests, _read_verdicts),
    read_answers=_read_answers,
    answers_hold_questions=True,
    unjudged=("own", "vlmevalkit"),
)
