"""POPE in its released files, in LLaVA's form, and as rows of other tools: an adapter to `behavior.pope`.

Variants are the parsers of `behavior.parsing`: ``release`` is the rule of RUCAIBox/POPE at commit 3df3ba1 (a text
without no is yes), ``yes_no`` requires a yes, ``lmms_eval`` and ``vlmevalkit`` are the rules of these tools, with
their treatment of other texts. Answer files of the release are lines ``question, answer`` without ids: they are
matched by place where the questions agree line by line. The headline of ``llava_pope`` is ``mean_f1``, the mean of
the three splits; its question file has no labels, which are matched by image and the text before the line break
(`concepts.loaders.pope`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from behavior.benchmarks.questions import BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import score_of, summed
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Scoring
from behavior.parsing import PARSERS
from behavior.pope import score
from behavior.pope_scores import PopeScores
from concepts.loaders.pope import pope_questions
from groundscope.core.errors import DataError

LABELS = "labels"
_PARSERS = {"release": "pope_release", "yes_no": "yes_no", "lmms_eval": "lmms_eval", "vlmevalkit": "vlmevalkit"}
_FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    labels = None
    if LABELS in files:
        folder = files[LABELS]
        labels = sorted(folder.glob("*.json")) if folder.is_dir() else [folder]
        if not labels:
            msg = f"folder '{folder}' has no .json file with labels"
            raise DataError(msg)
    return [
        BenchmarkQuestion(
            q.id if q.splits == ("neutral",) else f"{q.splits[0]}/{q.id}",
            q.images[0],
            q.text,
            q.answer,
            "yes/no",
            level="object",
            kind="existence",
            split=q.splits[0],
            candidates=("yes", "no"),
            aliases=() if q.splits == ("neutral",) else (q.id,),
            fields={"splits": q.splits},
            where=q.where,
        )
        for q in pope_questions(files[QUESTIONS], labels)
    ]


def _score(name: str, scoring: Scoring) -> BenchmarkScore:
    parser = _PARSERS[scoring.variant]
    rows = [(r, split) for r in scoring.rows for split in r.question.fields["splits"]]

    def scores(split: str | None = None) -> PopeScores:
        chosen = [r for r, part in rows if split in (None, part)]
        return score(
            [r.text for r in chosen],
            [r.question.answer for r in chosen],
            [r.question.group for r in chosen],
            parser=parser,
        )

    whole = scores()
    splits = list(dict.fromkeys(split for _, split in rows))
    parts = {split: scores(split) for split in splits} if len(splits) > 1 else {}
    figures = {figure: getattr(whole, figure) for figure in _FIGURES}
    if parts:
        figures["mean_f1"] = summed([part.f1 for part in parts.values()], len(parts))
    parsed = [PARSERS[parser](r.text) for r in scoring.rows]
    answers = [r.row(p, correct=p == r.question.answer) for r, p in zip(scoring.rows, parsed, strict=True)]
    return score_of(
        name,
        scoring,
        answers,
        figures,
        parts={split: {f: getattr(part, f) for f in _FIGURES} for split, part in parts.items()},
        unparsed=whole.unparsed,
    )


def _score_pope(scoring: Scoring) -> BenchmarkScore:
    return _score("pope", scoring)


def _score_llava(scoring: Scoring) -> BenchmarkScore:
    return _score("llava_pope", scoring)


_VARIANTS = {
    "release": "POPE's rule: no if a word before the first period is No, no or not; otherwise yes",
    "yes_no": "the same, but yes must be said; a text with neither is wrong",
    "lmms_eval": "equality after lower case; others are wrong, and out of recall",
    "vlmevalkit": "VLMEvalKit's words; both or neither are wrong",
}

POPE = Benchmark(
    "POPE",
    "Li et al. 2023, arXiv 2305.10355; RUCAIBox/POPE, commit 3df3ba1",
    ("yes/no",),
    ("object",),
    {
        QUESTIONS: "coco_pope_random.json and the like, or a file of other tools that behavior.pope reads",
        LABELS: "label files for questions without labels, or the folder with them",
    },
    _read,
    _score_pope,
    AnswerLayout(("answer", "text"), ids=("question_id",), question=("question",), text_alone=True),
    variants=_VARIANTS,
    optional=(LABELS,),
)
LLAVA_POPE = Benchmark(
    "POPE in LLaVA's form",
    "Liu et al. 2023, arXiv 2310.03744; haotian-liu/LLaVA, commit c121f04",
    ("yes/no",),
    ("object",),
    {
        QUESTIONS: "llava_pope_test.jsonl: question_id, image, text, category",
        LABELS: "the folder with coco_pope_{random,popular,adversarial}.json of RUCAIBox/POPE, commit e3e39262",
    },
    _read,
    _score_llava,
    AnswerLayout(("text",), ids=("question_id",), question=("prompt",)),
    variants=_VARIANTS,
)
