"""R-Bench: hallucinated relationships, of whole images or of marked objects (Wu et al. 2024, arXiv 2406.16449).

Rule of mrwu-mac/R-Bench, ``eval.py``, commit d9d73c0. What the release does:

- yes or no by POPE's rule (`behavior.parsing.pope_release`): a text without no is yes;
- the label is no if it contains ``no`` in any case, so also ``unknown``; an empty label is yes;
- with the five lists of ids (``subsets``), figures are the mean over the lists; an id that a list has twice counts
  twice;
- .00001 is added to the denominators of precision, recall and F1, and to no other; the printed figures are rounded to
  .01 %, ours are not;
- questions without an answer are skipped.

Without lists, figures are over all questions; where they have a ``type`` (web questions: ``counterfactual``,
``illusion``), also by type. Two answers to one question are an error; with ``variant="last_answer"`` the last one
counts, as in the release.

At the instance level the objects are marked: `instance_question` and `mark_boxes` make what the model is asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from behavior.benchmarks import record_files
from behavior.benchmarks.image_cells import image_name
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import groups_of, score_of, share, with_value
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Scoring
from behavior.parsing import pope_release, yes_no
from concepts.reading.record import Record
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.statistics import Estimate
from groundscope.core.user_files import read_json

if TYPE_CHECKING:
    from PIL import Image

    from concepts.image_source import ImageSource

SUBSETS = "subsets"
_OFFSET = 0.00001
_LISTS = 5
MARKS = {"box": "bounding box", "mask": "mask"}


def instance_question(text: str, subject: str, object_: str, mark: str = "box") -> str:
    """Return an instance-level question as the release asks it: the marks are named after every occurrence of the objects.

    Parameters
    ----------
    text, subject, object_
        The fields ``text``, ``subject`` and ``object`` of a question.
    mark
        ``box`` or ``mask``.

    Examples
    --------
    >>> from behavior.benchmarks.r_bench import instance_question
    >>> instance_question("Is the man on the horse?", "Man", "Horse")
    'Is the man in red bounding box on the horse in green bounding box?'
    """
    if mark not in MARKS:
        msg = f"unknown mark '{mark}'; choose from {', '.join(MARKS)}"
        raise ConfigError(msg)
    for noun, color in ((subject.lower(), "red"), (object_.lower(), "green")):
        text = text.replace(noun, f"{noun} in {color} {MARKS[mark]}")
    return text


def mark_boxes(image: Image.Image, subject: Sequence[float], object_: Sequence[float]) -> Image.Image:
    """Return a copy of an image with the subject's box in red and the object's in green, 4 pixels wide.

    Parameters
    ----------
    image
        The image.
    subject, object_
        Boxes ``x0, y0, x1, y1`` as shares of width and height, the fields ``sub_box`` and ``obj_box``.

    Examples
    --------
    >>> from PIL import Image
    >>> from behavior.benchmarks.r_bench import mark_boxes
    >>> marked = mark_boxes(Image.new("RGB", (100, 100)), (0.1, 0.1, 0.5, 0.5), (0.4, 0.4, 0.9, 0.9))
    >>> marked.getpixel((10, 30)), marked.getpixel((90, 60))
    ((255, 0, 0), (0, 128, 0))
    """
    from PIL import ImageDraw

    result = image.convert("RGB")
    draw = ImageDraw.Draw(result)
    for box, color in ((subject, "red"), (object_, "green")):
        draw.rectangle([share * side for share, side in zip(box, result.size * 2, strict=True)], outline=color, width=4)
    return result


@dataclass(frozen=True)
class MarkedImage:
    """An image with the boxes of `mark_boxes`, as an image source.

    Examples
    --------
    >>> import groundscope as gs
    >>> from behavior.benchmarks.r_bench import MarkedImage
    >>> image = gs.scenes.dataset(10)[0].image
    >>> MarkedImage(image, (0.1, 0.1, 0.5, 0.5), (0.4, 0.4, 0.9, 0.9)).load().size
    (112, 112)
    """

    source: ImageSource
    subject: tuple[float, ...]
    object: tuple[float, ...]

    @property
    def identity(self) -> str:
        """The identity of the image, and the boxes."""
        return f"{self.source.identity} boxes {self.subject} {self.object}"

    def load(self) -> Image.Image:
        """Return the image with both boxes."""
        return mark_boxes(self.source.load(), self.subject, self.object)


def _present(question: BenchmarkQuestion, image: ImageSource) -> tuple[ImageSource, str]:
    """Mark the objects of an instance-level question in the image and in the text."""
    fields = question.fields
    if not {"subject", "object", "sub_box", "obj_box"} <= set(fields):
        return image, question.text
    boxes = [fields[name] for name in ("sub_box", "obj_box")]
    if not all(isinstance(b, list) and len(b) == 4 and all(isinstance(v, int | float) for v in b) for b in boxes):
        msg = f"{question.where}: 'sub_box' and 'obj_box' must be four shares x0, y0, x1, y1"
        raise DataError(msg)
    text = instance_question(question.text, str(fields["subject"]), str(fields["object"]))
    return MarkedImage(image, tuple(boxes[0]), tuple(boxes[1])), text


def _question(_: int, record: Record) -> BenchmarkQuestion:
    label = record.field("label")
    if not (label is None or isinstance(label, str)):
        msg = f"{record.where}: field 'label' must hold text, not {ascii(label)[:40]}"
        raise DataError(msg)
    answer = "no" if label and "no" in label.lower() else "yes"
    about = record_files.text_or_empty(record, "type")
    fields = {n: record.values[n] for n in ("subject", "object", "sub_box", "obj_box") if n in record.values}
    return BenchmarkQuestion(
        record.identifier("question_id"),
        image_name(record),
        record.text("text"),
        answer,
        "yes/no",
        level="relation" if not re.search(r"pope_obj", record.where.rpartition(":")[0]) else "object",
        kind=about,
        candidates=("yes", "no"),
        fields=fields,
        where=record.where,
    )


def _read(files: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    return record_files.read_questions(files[QUESTIONS], _question)


def read_subsets(path: Path) -> list[list[str]]:
    """Return the five lists of ids; `path` is the first of them, whose name ends in 1.

    Raises
    ------
    DataError
        For another name, a list that is missing, or one that is not a list of ids.
    """
    if not path.stem.endswith("1"):
        msg = f"{path}: give the first of the five lists of ids, whose name ends in 1 ({path.suffix or '.json'})"
        raise DataError(msg)
    lists = []
    for number in range(1, _LISTS + 1):
        file = path.with_name(f"{path.stem[:-1]}{number}{path.suffix}")
        if not file.is_file():
            msg = f"{file}: list {number} of the five lists of ids is missing"
            raise DataError(msg)
        ids = read_json(file)
        if (
            not isinstance(ids, list)
            or not ids
            or not all(isinstance(i, int | str) and not isinstance(i, bool) for i in ids)
        ):
            msg = f"{file}: expected a list of question ids"
            raise DataError(msg)
        lists.append([str(i) for i in ids])
    return lists


def _score(scoring: Scoring) -> BenchmarkScore:
    rows = {r.question.id: r for r in scoring.rows}
    notes: list[str] = []
    if SUBSETS in scoring.files:
        lists = read_subsets(scoring.files[SUBSETS])
        question_ids = {q.id for q in scoring.questions}
        other = next((i for ids in lists for i in ids if i not in question_ids), None)
        if other is not None:
            msg = (
                f"{scoring.files[SUBSETS]}: id '{other}' is not in the question file; the lists belong to another file"
            )
            raise DataError(msg)
        chosen = [[rows[i] for i in ids if i in rows] for ids in lists]
        if not all(chosen):
            msg = f"{scoring.files[SUBSETS]}: a list of ids has no answered question"
            raise DataError(msg)
        listed = {i for ids in lists for i in ids}
        pooled = [r for r in scoring.rows if r.question.id in listed]
        values = [_release(part) for part in chosen]
        mean = {name: sum(v[name] for v in values) / len(values) for name in values[0]}
        notes.append(f"mean over {_LISTS} lists of {', '.join(str(len(part)) for part in chosen)} answers")
    else:
        pooled = list(scoring.rows)
        mean = _release(pooled)
    figures = _estimates(pooled, mean)
    kinds = sorted({r.question.kind for r in scoring.rows if r.question.kind})
    parts = {}
    for kind in kinds:
        part = [r for r in scoring.rows if r.question.kind == kind]
        parts[kind] = _estimates(part, _release(part))
    answers = [r.row(p := pope_release(r.text), correct=p == r.question.answer) for r in scoring.rows]
    unparsed = sum(yes_no(r.text) is None for r in scoring.rows)
    return score_of("r_bench", scoring, answers, figures, parts=parts, unparsed=unparsed, notes=notes)


def _release(rows: Sequence[AnsweredQuestion]) -> dict[str, float]:
    """Return the figures of one list by the released formulas."""
    answered_yes = [pope_release(r.text) == "yes" for r in rows]
    true = [r.question.answer == "yes" for r in rows]
    hits = sum(s and t for s, t in zip(answered_yes, true, strict=True))
    precision, recall = hits / (sum(answered_yes) + _OFFSET), hits / (sum(true) + _OFFSET)
    return {
        "accuracy": sum(s == t for s, t in zip(answered_yes, true, strict=True)) / len(rows),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall + _OFFSET),
        "yes_ratio": sum(answered_yes) / len(rows),
    }


def _estimates(rows: Sequence[AnsweredQuestion], values: Mapping[str, float]) -> dict[str, Estimate]:
    answered_yes = [pope_release(r.text) == "yes" for r in rows]
    true = [r.question.answer == "yes" for r in rows]
    hits = [s and t for s, t in zip(answered_yes, true, strict=True)]
    groups = groups_of(rows)
    exact = {
        "accuracy": share([s == t for s, t in zip(answered_yes, true, strict=True)], groups),
        "precision": share(hits, groups, answered_yes),
        "recall": share(hits, groups, true),
        "f1": share([2 * h for h in hits], groups, [s + t for s, t in zip(answered_yes, true, strict=True)]),
        "yes_ratio": share(answered_yes, groups),
    }
    return {name: with_value(exact[name], value) for name, value in values.items()}


R_BENCH = Benchmark(
    "R-Bench",
    "Wu et al. 2024, arXiv 2406.16449; mrwu-mac/R-Bench, commit d9d73c0",
    ("yes/no",),
    ("object", "relation"),
    {
        QUESTIONS: "image-level_filterd.json, instance-level_filterd.json, nocaps_pope_obj_*_image.json or web questions",
        SUBSETS: "the first of the five lists of ids, such as image-level_ids_1.json",
    },
    _read,
    _score,
    AnswerLayout(("text",), ids=("question_id",), question=("prompt",)),
    variants={
        "release": "the released rule, errors included; two answers to one question are refused",
        "last_answer": "the same, and of several answers to one question the last counts",
    },
    optional=(SUBSETS,),
    repeated=("last_answer",),
    present=_present,
)
