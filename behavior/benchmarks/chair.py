"""CHAIR on COCO captions: an adapter to `behavior.chair` (Rohrbach et al. 2018, arXiv 1809.02156).

Captions are records ``image_id, caption``; the true objects are those of the instances, and of the human captions
where that file is given, as in the release. Figures comparable with published ones need both files and the release's
``synonyms.txt``. Only images with a caption count; an image that the instances do not have is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from behavior.benchmarks import record_files
from behavior.benchmarks.questions import AnsweredQuestion, BenchmarkQuestion, BenchmarkScore
from behavior.benchmarks.rates import score_of
from behavior.benchmarks.specification import QUESTIONS, AnswerLayout, Benchmark, Scoring
from behavior.chair import COCO_CATEGORIES, COCO_PHRASES, COCO_SYNONYMS, read_synonyms, score_captions
from behavior.result import BehaviorResult, Cost
from concepts.annotated_object import AnnotatedObject
from concepts.image_source import NoImage
from concepts.reading.json_stream import stream
from concepts.reading.record import Record
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError

CAPTIONS, SYNONYMS = "captions", "synonyms"
_TEXTS = ("caption", "text")


def _read_answers(path: Path, files: Mapping[str, Path]) -> list[AnsweredQuestion]:
    rows = record_files.read_answered(path, _image, _TEXTS)
    image_ids = {r.question.id for r in rows}
    objects = _objects(files[QUESTIONS], image_ids)
    captions = _captions(files[CAPTIONS], image_ids) if CAPTIONS in files else {}
    result = []
    for row in rows:
        number = row.question.id
        if number not in objects:
            msg = f"{row.where}: image '{number}' is not in '{files[QUESTIONS]}'; give the instances of the captioned images"
            raise DataError(msg)
        question = BenchmarkQuestion(
            number, number, "", "\n".join(captions.get(number, ())), "caption", level="object", kind="caption",
            fields={"objects": tuple(objects[number])}, where=row.where,
        )  # fmt: skip
        result.append(AnsweredQuestion(question, row.text, row.where))
    return result


def _image(_: int, record: Record) -> BenchmarkQuestion:
    number = record.identifier("image_id")
    return BenchmarkQuestion(number, number, "", "", "caption", where=record.where)


def _objects(path: Path, image_ids: set[str]) -> dict[str, list[str]]:
    """Return the categories of each wanted image."""
    names: dict[str, str] = {}
    categories_of: dict[str, list[str]] = {}
    categories: dict[str, list[str]] = {}
    for entry in stream(path):
        if entry.key == "images":
            number = entry.record().identifier("id")
            if number in image_ids:
                categories_of[number] = []
        elif entry.key == "categories":
            names[entry.record().identifier("id")] = entry.record().text("name")
        elif entry.key == "annotations":
            record = entry.record()
            number = record.identifier("image_id")
            if number in image_ids:
                categories.setdefault(number, []).append(record.identifier("category_id"))
    for number, ids in categories.items():
        unknown = next((i for i in ids if i not in names), None)
        if unknown is not None or number not in categories_of:
            what = f"category {unknown}" if unknown is not None else f"image {number}"
            msg = f"{path}: an annotation is of {what}, which the file does not have; use the instances as released"
            raise DataError(msg)
        categories_of[number] = list(dict.fromkeys(names[i] for i in ids))
    return categories_of


def _captions(path: Path, image_ids: set[str]) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for entry in stream(path):
        if entry.key == "annotations":
            record = entry.record()
            if record.identifier("image_id") in image_ids:
                captions.setdefault(record.identifier("image_id"), []).append(" ".join(record.text("caption").split()))
    return captions


def _no_questions(_: Mapping[str, Path]) -> list[BenchmarkQuestion]:
    msg = "CHAIR has no question file: generate captions of the images, and pass them as answers"
    raise DataError(msg)


def _to_ask(files: Mapping[str, Path], _: Path) -> list[BenchmarkQuestion]:
    """Return a request for each image of the instances; its text is that of the caller."""
    questions = []
    for entry in stream(files[QUESTIONS]):
        if entry.key == "images":
            record = entry.record()
            questions.append(
                BenchmarkQuestion(
                    record.identifier("id"), record.text("file_name"), "", "", "caption", level="object", kind="caption",
                    where=record.where,
                )
            )  # fmt: skip
    return questions


def _score(scoring: Scoring) -> BenchmarkScore:
    synonyms = read_synonyms(scoring.files[SYNONYMS]) if SYNONYMS in scoring.files else COCO_SYNONYMS
    rows = scoring.rows
    examples = tuple(
        Example(
            r.question.id, NoImage(), "Describe the image.", r.question.answer, (), "object", "caption", "caption", r.question.id,
            objects=tuple(AnnotatedObject(str(i), noun, None) for i, noun in enumerate(r.question.fields["objects"])),
        )
        for r in rows
    )  # fmt: skip
    texts = tuple(r.row(None, correct=None) for r in rows)
    scores = score_captions(
        BehaviorResult(texts, Cost(None, None, len(texts))),
        ConceptDataset("captions", examples),
        synonyms,
        vocabulary=COCO_CATEGORIES,
        phrases=COCO_PHRASES,
        variant=scoring.variant,
    )
    wrong = {c.id: bool(c.hallucinated) for c in scores.captions}
    answers = [r.row(None, correct=not wrong[r.question.id]) for r in rows]
    notes = [] if CAPTIONS in scoring.files else ["true objects are those of the instances alone"]
    figures = {"chair_i": scores.chair_i, "chair_s": scores.chair_s, "recall": scores.recall}
    return score_of("chair", scoring, answers, figures, notes=notes)


CHAIR = Benchmark(
    "CHAIR",
    "Rohrbach et al. 2018, arXiv 1809.02156; LisaAnne/Hallucination",
    ("caption",),
    ("object",),
    {
        QUESTIONS: "instances_val2014.json: images, annotations, categories",
        CAPTIONS: "captions_val2014.json, whose objects count as true too",
        SYNONYMS: "synonyms.txt of the release; without it, behavior.chair.COCO_SYNONYMS",
    },
    _no_questions,
    _score,
    AnswerLayout(_TEXTS, ids=("image_id",)),
    variants={"release": "parsed and counted as the released scorer", "paper": "an object counts once per caption"},
    optional=(CAPTIONS, SYNONYMS),
    read_answers=_read_answers,
    to_ask=_to_ask,
)
