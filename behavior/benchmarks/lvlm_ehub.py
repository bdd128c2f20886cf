r"""LVLM-eHub: its part on object hallucination, POPE's questions on COCO (Xu et al. 2023, arXiv 2306.09265).

Rule of OpenGVLab/Multi-Modality-Arena, ``LVLM_evaluation/utils/tools.py``: an answer is right if the label is among
its words after the steps of the VQA evaluation. What the release does:

- an answer with both words is right whatever the label; ``nope`` and ``not`` are not no;
- each mark of ``; / [ ] " { } ( ) = + \ _ - > < @ ` , ? !`` is deleted if the text has it next to a space anywhere,
  or a comma between digits anywhere; otherwise it becomes a space;
- the first 32 periods that no digit follows are deleted (the guard against a digit before them has a typo, and has no
  effect);
- the label is normalized in the same way; accuracy is the only figure.

Its contractions and number words change no answer to a question whose label is yes or no, and are left out here.
Answer files hold the questions: ``question, answer, gt_answers, image_path``. `capability_means` averages a result
table of any of its tasks by the benchmark's six capabilities.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from behavior.benchmarks import record_files
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import groups_of, score_of, share
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Scoring
from behavior.parsing import yes_no
from concepts.loaders.pope import pope_questions
from concepts.reading.record import Record
from groundscope.core.errors import DataError
from groundscope.core.text import nearest
from groundscope.core.user_files import read_json

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIODS = 32
CAPABILITIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "visual perception": (
            "ImageNet", "CIFAR10", "CIFAR100", "OxfordIIITPet", "Flowers102", "MSCOCO_OC", "MSCOCO_MCI", "VCR1_OC", "VCR1_MCI",
        ),
        "visual knowledge acquisition": (
            "IIIT5K", "SVT", "IC13", "IC15", "SVTP", "CUTE80", "COCO-Text", "Total-Text", "WordArt", "CTW", "HOST", "WOST",
            "SROIE", "FUNSD", "POIE", "NoCaps", "Flickr", "MSCOCO_caption", "WHOOPSCaption",
        ),
        "visual reasoning": (
            "TextVQA", "DocVQA", "OCRVQA", "STVQA", "ScienceQA", "OKVQA", "GQA", "VizWiz", "VQAv2", "VQAv1", "Visdial", "IconQA",
            "VSR", "WHOOPSVQA", "SNLI-VE",
        ),
        "visual commonsense": ("ImageNetVC", "VCR"),
        "object hallucination": ("MSCOCO_pope", "MSCOCO_pope_popular", "MSCOCO_pope_adversarial"),
        "embodied intelligence": ("MetaWorld", "FrankaKitchen", "Minecraft", "VirtualHome", "MinecraftPolicy"),
    }
)  # fmt: skip
"""Capability to its tasks, by the names of the release's code, which does not assign them: this is our reading of the paper."""


def normalize(text: str) -> str:
    r"""Return a text after the release's steps.

    >>> from behavior.benchmarks.lvlm_ehub import normalize
    >>> normalize("Yes, there\tis. No!"), normalize("yes,no")
    ('yes there is no', 'yes no')
    """
    plain = text.replace("\n", " ").replace("\t", " ").strip()
    digits = re.search(r"\d,\d", plain) is not None
    result = plain
    for mark in _MARKS:
        deleted = digits or f"{mark} " in plain or f" {mark}" in plain
        result = result.replace(mark, "" if deleted else " ")
    result = re.sub(r"\.(?!\d)", "", result, count=_PERIODS)
    return " ".join(word for word in result.lower().split() if word not in {"a", "an", "the"})


def capability_means(results: Path | str) -> dict[str, float]:
    """Return the mean score of each capability from a result table, ``{"<task>": score, …}``, as the release writes it.

    Raises
    ------
    DataError
        For a task that has no capability, or a score that is not a number.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from behavior.benchmarks.lvlm_ehub import capability_means
    >>> path = Path(tempfile.mkdtemp()) / "result.json"
    >>> _ = path.write_text('{"MSCOCO_pope": 0.9, "MSCOCO_pope_popular": 0.7, "VSR": 0.5}')
    >>> capability_means(path)
    {'visual reasoning': 0.5, 'object hallucination': 0.8}
    """
    content = read_json(results)
    if not isinstance(content, dict) or not content:
        msg = f"{results}: expected an object of scores by task"
        raise DataError(msg)
    names = {task: capability for capability, tasks in CAPABILITIES.items() for task in tasks}
    scores: dict[str, list[float]] = {capability: [] for capability in CAPABILITIES}
    for task, score in content.items():
        if task not in names:
            msg = f"{results}: task '{task}' has no capability{nearest(task, names)}"
            raise DataError(msg)
        if isinstance(score, bool) or not isinstance(score, int | float):
            msg = f"{results}: the score of '{task}' must be a number"
            raise DataError(msg)
        scores[names[task]].append(float(score))
    return {capability: sum(values) / len(values) for capability, values in scores.items() if values}


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    return [
        BenchmarkQuestion(
            f"{split}/{q.id}" if split != "neutral" else q.id, q.images[0], q.text, q.answer, "yes/no", level="object",
            kind="existence", split=split, candidates=("yes", "no"), aliases=(q.id,), where=q.where,
        )
        for q in pope_questions(files[QUESTIONS])
        for split in q.splits
    ]  # fmt: skip


def _question_of_answer(number: int, record: Record) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        record_files.text_or_empty(record, "question_id") or str(number),
        Path(record.text("image_path")).name,
        record.text("question"),
        record_files.label_of(record, "gt_answers", {"yes": "yes", "no": "no"}),
        "yes/no",
        level="object",
        kind="existence",
        candidates=("yes", "no"),
        where=record.where,
    )


def _read_answers(path: Path, _: Mapping[str, Path]) -> list[AnsweredQuestion]:
    return record_files.read_answered(path, _question_of_answer, ("answer",))


def _write(rows: Sequence[AnsweredQuestion], path: Path) -> int:
    return record_files.write_lines(
        path,
        (
            {"question_id": r.question.id, "image_path": r.question.image, "question": r.question.text,
             "gt_answers": r.question.answer, "answer": r.text}
            for r in rows
        ),
    )  # fmt: skip


def _score(scoring: Scoring) -> BenchmarkScore:
    right = [re.search(rf"\b{normalize(r.question.answer)}\b", normalize(r.text)) is not None for r in scoring.rows]
    both = sum({"yes", "no"} <= set(normalize(r.text).split()) for r in scoring.rows)
    figures = {"accuracy": share(right, groups_of(scoring.rows))}
    splits = dict.fromkeys(r.question.split for r in scoring.rows)
    parts = {}
    if len(splits) > 1:
        for split in splits:
            chosen = [
                (ok, r.question.group) for ok, r in zip(right, scoring.rows, strict=True) if r.question.split == split
            ]
            parts[split] = {"accuracy": share([ok for ok, _ in chosen], [group for _, group in chosen])}
    answers = [r.row(yes_no(r.text), correct=ok) for r, ok in zip(scoring.rows, right, strict=True)]
    notes = [f"{both} answers have both words, and are right by the rule"] if both else []
    unparsed = sum(not {"yes", "no"} & set(normalize(r.text).split()) for r in scoring.rows)
    return score_of("lvlm_ehub", scoring, answers, figures, parts=parts, unparsed=unparsed, notes=notes)


LVLM_EHUB = Benchmark(
    "LVLM-eHub (object hallucination)",
    "Xu et al. 2023, arXiv 2306.09265; OpenGVLab/Multi-Modality-Arena, LVLM_evaluation/utils/tools.py",
    ("yes/no",),
    ("object",),
    {QUESTIONS: "a question file of POPE, as behavior.pope reads it"},
    _read,
    _score,
    AnswerLayout(("answer", "text"), ids=("question_id", "id"), image=("image_path", "image")),
    read_answers=_read_answers,
    answers_hold_questions=True,
    write=_write,
)
