"""CCEval: invented objects and coverage in detailed captions of 100 images (Zhai et al. 2023, arXiv 2310.01779).

Rule of bronyayang/HallE_Control, ``cceval.py``, commit d101291: a judge lists the objects that a caption names, those
that are not among the image's objects, and the image's objects that the caption leaves out. What the release does:

- the first 100 captions count, and the true objects are those at the same place, whatever the image's id;
- a list is the first ``[…]`` on one line of a reply, split at commas, without spaces and quotes, each object once;
- an empty list is one object ``''`` among the named ones, and none among the invented and the uncovered;
- objects in ``[brackets]`` in the caption are added to the denominator of CHAIR_i only;
- words are counted by splitting at single spaces; ``avg objects`` counts with the brackets, ``avg all objects``
  without;
- coverage is 1 - uncovered / different true objects; its main program computes one of the two in each call, with the
  two options swapped.

A verdict has ``objects``, ``hallucinated`` and optionally ``uncovered``, each a list or the judge's reply as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from behavior.benchmarks import record_files
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import groups_of, raw_mean, raw_ratio, score_of, share
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Judge, Scoring
from concepts.reading.record import Record, abbreviate, is_text
from groundscope.core.errors import DataError
from groundscope.core.statistics import Estimate
from groundscope.core.text import format_count
from groundscope.core.user_files import read_json

CAPTIONS = 100
"""Number of captions that count."""


def read_list(reply: str) -> list[str]:
    """Read a judge's list as the release does.

    >>> from behavior.benchmarks.cceval import read_list
    >>> read_list("Objects: ['cat', 'dog', cat] …"), read_list("[]"), read_list("none")
    (['cat', 'dog'], [''], [])
    """
    match = re.search(r"\[(.*?)\]", reply)
    return [] if match is None else list(dict.fromkeys(item.strip(" '") for item in match.group(1).split(",")))


@dataclass(frozen=True)
class _Lists:
    objects: frozenset[str]
    hallucinated: frozenset[str]
    uncovered: frozenset[str] | None


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    content = read_json(files[QUESTIONS])
    if not isinstance(content, dict) or not content:
        msg = f"{files[QUESTIONS]}: expected an object with a record for each place, from 1"
        raise DataError(msg)
    questions = []
    for place in range(1, min(len(content), CAPTIONS) + 1):
        where = f"{files[QUESTIONS]}: '{place}'"
        value = content.get(str(place))
        value = value if isinstance(value, dict) else {}
        objects = value.get("gt_objs")
        if not isinstance(objects, list) or not all(map(is_text, objects)):
            msg = f"{where}: expected a record with a list 'gt_objs'"
            raise DataError(msg)
        image = str(value.get("image_id") or value.get("img_id") or "")
        questions.append(
            BenchmarkQuestion(
                str(place), image, "", ", ".join(objects), "caption", level="object", kind="caption",
                fields={"objects": tuple(objects)}, where=where,
            )
        )  # fmt: skip
    return questions


def _read_answers(path: Path, files: Mapping[str, Path]) -> list[AnsweredQuestion]:
    """Return the first 100 captions, with the true objects at their place."""
    questions = {q.id: q for q in _read(files)}
    rows = []
    readings = record_files.read_answered(path, _place, ("text",))[:CAPTIONS]
    for reading in readings:
        question = questions.get(reading.question.id)
        if question is None:
            msg = f"{reading.where}: caption {reading.question.id} has no true objects at its place ({len(questions)} have)"
            raise DataError(msg)
        image = reading.question.image
        if question.image and image and question.image != image:
            msg = f"{reading.where}: the image is '{image}' here, but '{question.image}' at this place of the objects"
            raise DataError(msg)
        named = BenchmarkQuestion(
            question.id, image, "", question.answer, "caption", level="object", kind="caption", fields=question.fields,
            where=reading.where,
        )  # fmt: skip
        rows.append(AnsweredQuestion(named, reading.text, reading.where))
    return rows


def _place(number: int, record: Record) -> BenchmarkQuestion:
    return BenchmarkQuestion(str(number + 1), record.identifier("image_id"), "", "", "caption", where=record.where)


def _write_requests(rows: Sequence[AnsweredQuestion], path: Path) -> int:
    ordered = sorted(rows, key=lambda r: int(r.question.id))
    return record_files.write_list(
        path,
        (
            {
                "id": r.question.id,
                "image_id": r.question.image,
                "text": r.text,
                "gt_objs": list(r.question.fields["objects"]),
            }
            for r in ordered
        ),
    )


def _verdict(record: Record) -> _Lists:
    objects, hallucinated = _objects(record, "objects"), _objects(record, "hallucinated") - {""}
    uncovered = _objects(record, "uncovered") - {""} if "uncovered" in record.values else None
    return _Lists(objects, hallucinated, uncovered)


def _objects(record: Record, name: str) -> frozenset[str]:
    value = record.field(name)
    if is_text(value):
        return frozenset(read_list(value))
    if isinstance(value, list) and all(map(is_text, value)):
        return frozenset(value)
    msg = f"{record.where}: field '{name}' must hold a list of objects or a reply, not {abbreviate(value)}"
    raise DataError(msg)


def _score(scoring: Scoring) -> BenchmarkScore:
    rows = scoring.rows
    groups = groups_of(rows)
    brackets = [set(re.findall(r"\[(.*?)\]", r.text)) for r in rows]
    named = [r.verdict.objects for r in rows]
    named_counts = [len(objects | extra) for objects, extra in zip(named, brackets, strict=True)]
    invented = [len(r.verdict.hallucinated) for r in rows]
    wrong = [count > 0 for count in invented]
    figures = {
        "CHAIRs": share(wrong, groups),
        "CHAIRi": raw_ratio(invented, named_counts, groups),
        "CHAIRi_n": raw_ratio(invented, [len(objects) for objects in named], groups),
        "words": raw_mean([len(r.text.split(" ")) for r in rows], groups),
        "bracket_objects": raw_mean([len(extra) for extra in brackets], groups),
        "objects": raw_mean(named_counts, groups),
        "objects_without_brackets": raw_mean([len(objects) for objects in named], groups),
    }
    notes = []
    covered = [r for r in rows if r.verdict.uncovered is not None]
    if covered and len(covered) == len(rows):
        true = [len(set(r.question.fields["objects"])) for r in rows]
        uncovered = [len(r.verdict.uncovered) for r in rows]
        missed = raw_ratio(uncovered, true, groups)
        figures["coverage"] = Estimate(1 - missed.value, 1 - missed.high, 1 - missed.low, missed.n, missed.few_groups)
        figures["Uncovers"] = share([count > 0 for count in uncovered], groups)
    elif covered:
        notes.append(f"coverage left out: {format_count(len(rows) - len(covered), 'verdict')} without 'uncovered'")
    answers = [r.row(None, correct=not bad) for r, bad in zip(rows, wrong, strict=True)]
    return score_of("cceval", scoring, answers, figures, notes=notes)


CCEVAL = Benchmark(
    "CCEval",
    "Zhai et al. 2023, arXiv 2310.01779; bronyayang/HallE_Control, commit d101291",
    ("caption",),
    ("object",),
    {QUESTIONS: "vg_info_100.json: place, from 1, to a record with gt_objs"},
    _read,
    _score,
    AnswerLayout(("text",), ids=("id",), image=("image_id",)),
    judge=Judge(_write_requests, lambda path: record_files.verdicts(path, _verdict, ids=("id",))),
    read_answers=_read_answers,
)
