"""AMBER's discriminative part: an adapter to `behavior.amber` (Wang et al. 2023, arXiv 2311.07397).

``release`` and ``exact`` are those of `behavior.amber.score`: exactly ``Yes`` and ``No`` are answers, and no is the positive
class.
``vlmevalkit`` reads words as VLMEvalKit does, and reports the mean of the accuracies of existence, attribute and relation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from behavior import amber
from behavior.benchmarks.questions import BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import groups_of, score_of, share, summed
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Scoring
from behavior.parsing import amber_release, vlmevalkit
from behavior.result import BehaviorResult, Cost
from concepts.loaders.amber import annotations_by_id, read_annotation
from concepts.reading.records import read_json_records

ANNOTATIONS = "annotations"


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    queries: dict[str, tuple[str, str]] = {}
    if QUESTIONS in files:
        queries = {r.identifier("id"): (r.text("image"), r.text("query")) for r in read_json_records(files[QUESTIONS])}
    questions = []
    for number, record in annotations_by_id(files[ANNOTATIONS]).items():
        level, kind, truth = read_annotation(record)
        if kind == "caption" or (queries and number not in queries):
            continue
        image, text = queries.get(number, ("", ""))
        questions.append(
            BenchmarkQuestion(
                number,
                image,
                text,
                truth,
                "yes/no",
                level=level,
                kind=kind,
                candidates=("yes", "no"),
                where=record.where,
            )
        )
    return questions


def _score(scoring: Scoring) -> BenchmarkScore:
    parse = vlmevalkit if scoring.variant == "vlmevalkit" else amber_release
    parsed = [parse(r.text) for r in scoring.rows]
    answers = [r.row(p, correct=p == r.question.answer) for r, p in zip(scoring.rows, parsed, strict=True)]
    unparsed = sum(p is None for p in parsed)
    if scoring.variant == "vlmevalkit":
        parts = {}
        for level, name in amber.DIMENSIONS.items():
            rows = [(r, a) for r, a in zip(scoring.rows, answers, strict=True) if r.question.level == level]
            if rows:
                parts[name] = {"accuracy": share([bool(a.correct) for _, a in rows], groups_of(r for r, _ in rows))}
        values = [part["accuracy"] for part in parts.values()]
        figures = {"mean_accuracy": summed(values, len(values))}
        return score_of("amber", scoring, answers, figures, parts=parts, unparsed=unparsed)
    result = amber.score(BehaviorResult(tuple(answers), Cost(None, None, len(answers))), variant=scoring.variant)
    tables = {part: {name: getattr(scores, name) for name in amber.FIGURES} for part, scores in result.parts.items()}
    return score_of("amber", scoring, answers, tables.pop("all"), parts=tables, unparsed=unparsed)


AMBER = Benchmark(
    "AMBER, discriminative",
    "Wang et al. 2023, arXiv 2311.07397; junyangwang0410/AMBER, commit 534babf",
    ("yes/no",),
    ("object", "attribute", "relation"),
    {
        ANNOTATIONS: "annotations.json: id, type, truth",
        QUESTIONS: "query_discriminative.json: id, image, query; without it, intervals take each question as an image",
    },
    _read,
    _score,
    AnswerLayout(("response",), ids=("id",)),
    variants={
        "release": "as printed by the released script",
        "exact": "the unrounded ratios",
        "vlmevalkit": "VLMEvalKit's words, and the mean of three accuracies",
    },
    optional=(QUESTIONS,),
)
