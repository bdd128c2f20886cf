"""Read the answers of any model from a file and match them to questions; no model is needed.

Each evaluation tool writes its own layout. A record often also holds the question and the true answer, under field names
that other tools use for the model's answer. A record with two possible readings is refused; the message names both, and
`answer_field` selects one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from behavior.parsing import Parser, judge_text, named_parser, parser_for
from behavior.result import Answer, BehaviorResult, Cost
from concepts.loaders.pope import SPLITS, same_wording, splits_of
from concepts.reading.record import Record, as_record, is_text
from concepts.reading.records import read_records
from concepts.reading.text_files import sha256
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError
from groundscope.core.text import format_count

IDS = ("question_id", "questionId", "index", "id", "image_id")
"""Fields that may identify the question; the first one present is used."""
TEXTS = ("answer", "text", "response", "output", "prediction", "caption")
"""Fields that may hold the model's answer; a record with two of them is refused."""
OTHER_TEXTS = frozenset(
    (
        "pred", "preds", "pred_answer", "pred_text", "predict", "predicted", "predicted_answer", "prediction", "predictions",
        "prediction_text", "model_answer", "model_response", "model_output", "model_prediction", "model_pred", "llm_answer",
        "gpt_answer", "generated", "generated_answer", "generated_text", "generation", "generations", "completion", "reply",
        "response", "responses", "raw_response", "output", "outputs", "output_text", "raw_output", "answer_pred",
    )
)  # fmt: skip
"""Further names that tools give to the model's answer, compared in lower case: a second reading of a record that has one of
`TEXTS` too. They are read where `answer_field` names them."""
QUESTIONS = ("prompt", "question", "query")
"""Fields that may hold the question."""


@dataclass(frozen=True)
class AnswerRecord:
    """One record of an answer file."""

    id: str | None
    """None in files without ids, whose records are in the order of the questions."""
    text: str
    where: str
    """File and record, for error messages."""
    seconds: float | None = None
    split: str | None = None
    """POPE's split, if the record has one."""
    question: str | None = None
    """The question, if the record has it."""


@dataclass(frozen=True)
class AskedQuestion:
    """One question that an answer file must answer."""

    id: str
    aliases: tuple[str, ...] = ()
    """Other ids that an answer file may use for the question."""
    splits: tuple[str, ...] = ()
    """The splits that contain the question; they make an id that occurs in several splits unique."""
    text: str = ""
    """Wording of the question; empty if unknown."""
    image: str = ""


def read_answers(
    path: Path | str, answer_field: str | None = None, *, id_field: str | None = None
) -> tuple[AnswerRecord, ...]:
    """Read an answer file: JSON lines, one JSON list, or a table with a header row (``.tsv``, ``.csv``).

    Parameters
    ----------
    path
        Each record has an id (one of `IDS`), the model's answer (one of `TEXTS`), and optionally ``seconds``. Without
        ids, answers are matched by order. Supported layouts of other tools: LLaVA's answers (``question_id, prompt,
        text``), samples of lmms-eval (``doc, filtered_resps``: the first filtered response, the id of ``doc``), tables of
        VLMEvalKit (``index, prediction``; cells that pandas reads as missing become the text ``nan``), captions
        (``image_id, caption``).
    answer_field
        The field with the model's answer, for records with several candidate fields or a field with another name.
    id_field
        The field with the id; by default the first of `IDS` that is present.

    Raises
    ------
    DataError
        Names the file and record: for invalid or truncated JSON, a missing answer, an answer that is not text, an id
        that occurs twice or only in some records, a record with two possible readings (the message names both), or
        records that store the answer in different fields.
    """
    file = Path(path)
    answers: list[AnswerRecord] = []
    places: dict[tuple[str | None, str], str] = {}
    first_field: str | None = None
    for record in read_records(file):
        name, answer = _read(record, answer_field, id_field)
        if answer.id is not None:
            key = (answer.split, answer.id)
            if key in places:
                msg = f"{record.where}: id '{answer.id}' was already answered, at {places[key]}"
                raise DataError(msg)
            places[key] = record.where
        if answers and (answer.id is None) != (answers[0].id is None):
            msg = (
                f"{record.where}: some answers have an id and some have none; give an id to all answers or to no answer"
            )
            raise DataError(msg)
        if first_field is not None and name != first_field:
            msg = (
                f"{record.where}: the answer is in field '{name}', but earlier records have it in '{first_field}'; "
                "write all answers to the same field"
            )
            raise DataError(msg)
        first_field = name
        answers.append(answer)
    if not answers:
        msg = f"{file}: the file contains no answers"
        raise DataError(msg)
    return tuple(answers)


def _read(record: Record, answer_field: str | None, id_field: str | None) -> tuple[str, AnswerRecord]:
    """Return the field that holds the answer, and the record as an answer."""
    values = record.values
    doc = values.get("doc")
    if isinstance(doc, dict) and ("filtered_resps" in values or "resps" in values):
        name = answer_field or ("filtered_resps" if "filtered_resps" in values else "resps")
        about = as_record(f"{record.where}, doc", doc)
    else:
        name, about = answer_field or _answer_field(record), record
    number = _identifier(about, id_field, needed=about is not record)
    seconds = record.numbers("seconds")[0] if "seconds" in values else None
    if seconds is not None and seconds < 0:
        msg = f"{record.where}: field 'seconds' must be at least 0, not {seconds:g}"
        raise DataError(msg)
    question = next(
        (about.values[n] for n in QUESTIONS if n != name and is_text(about.values.get(n))),
        None,
    )
    splits = splits_of(about.values.get("category"))
    split = splits[0] if len(splits) == 1 else None
    return name, AnswerRecord(number, _text(record, name), record.where, seconds, split, question)


def _answer_field(record: Record) -> str:
    """Return the field with the model's answer; raises `DataError` if two readings are possible."""
    values = record.values
    names = [name for name in TEXTS if name in values]
    if not names:
        record.field(*TEXTS)  # raises, naming the fields
    if "index" in values and "prediction" in values:
        return "prediction"  # a table of VLMEvalKit, whose 'answer' is the truth
    if len(names) > 1:
        readings = " or ".join(f"field '{name}' ({_quote(values[name])})" for name in names)
        msg = (
            f"{record.where}: the model's answer may be {readings}; name the field that the model wrote, "
            f"for example answer_field='{names[-1]}'"
        )
        raise DataError(msg)
    (name,) = names
    other = next((n for n in values if n != name and n.lower() in OTHER_TEXTS and _may_answer(values[n])), None)
    if other is not None:
        msg = (
            f"{record.where}: the model's answer may be field '{name}' ({_quote(values[name])}) or field '{other}' "
            f"({_quote(values[other])}); name the one that the model wrote, as in answer_field='{other}'"
        )
        raise DataError(msg)
    second = _second_reading(name, values)
    if second is not None:
        reading, sign = second
        msg = (
            f"{record.where}: field '{name}' ({_quote(values[name])}) may be the model's answer, or {reading}, because "
            f"the record also has '{sign}'; if the model wrote it, pass answer_field='{name}'"
        )
        raise DataError(msg)
    return name


def _may_answer(value: object) -> bool:
    """Whether a value is text, or a list of texts."""
    return is_text(value) or (isinstance(value, list) and bool(value) and all(is_text(v) for v in value))


def _second_reading(name: str, values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return another possible reading of a field and the field that suggests it; None if it can only be an answer."""
    has_question = any(question in values for question in QUESTIONS)
    if name == "answer" and (has_question or "index" in values):
        reading, signs = "the true answer of a question table", ("image", "image_source", "category", "index")
    elif name == "text" and not has_question:
        reading, signs = "the question of a question file", ("image", "label", "category")
    elif name == "caption":
        reading, signs = "the reference of an annotation file", ("id", "label") if "image_id" in values else ("label",)
    else:
        return None
    sign = next((sign for sign in signs if sign in values), None)
    return None if sign is None else (reading, sign)


def _identifier(about: Record, id_field: str | None, *, needed: bool) -> str | None:
    if id_field is not None:
        return about.identifier(id_field)
    if needed or any(name in about.values for name in IDS):
        return about.identifier(*IDS)
    return None


def _text(record: Record, name: str) -> str:
    """Return the model's answer; empty text is a valid answer."""
    value: Any = record.field(name)
    if record.table:
        return "nan" if value is None else value  # str() of a missing cell in pandas
    if name in {"filtered_resps", "resps"}:
        first = value[0] if isinstance(value, list) and value else None
        value = first[0] if isinstance(first, list) and len(first) == 1 else first
    if not is_text(value):
        fields = f"'{name}'" if name not in TEXTS else " or ".join(map(repr, TEXTS))
        msg = f"{record.where}: field {fields} must hold text, not {_describe(value)}"
        raise DataError(msg)
    return value


def _describe(value: object) -> str:
    return ascii(value) if isinstance(value, str) else str(value)[:60]


def _quote(value: object) -> str:
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= 40 else f"{text[:37]}..."
    return repr(text) if is_text(text) else ascii(text)


def match_answers(
    answers: Iterable[AnswerRecord], questions: Sequence[AskedQuestion], path: Path | str
) -> dict[str, AnswerRecord]:
    """Match each question to its answer by id, or by order if the answers have no ids.

    Parameters
    ----------
    answers
        The answers; at least one.
    questions
        The questions. An id that two questions share identifies neither, unless their wording and image are the same.
    path
        The answer file, for error messages.

    Returns
    -------
    dict
        Id of a question to its answer, in the order of the questions.

    Raises
    ------
    DataError
        Names the record: for an answer without a question, a second answer to a question, or an answer that records a
        different question; also for a question without an answer.
    """
    records = list(answers)
    matches: dict[str, AnswerRecord] = {}
    if records[0].id is None:
        if len(records) != len(questions):
            msg = (
                f"{path}: {format_count(len(records), 'answer')} without ids for "
                f"{format_count(len(questions), 'question')}; give one answer per question, in the same order"
            )
            raise DataError(msg)
        matches = {question.id: record for question, record in zip(questions, records, strict=True)}
    else:
        names = _names(questions)
        for record in records:
            qualified = [f"{record.split}/{record.id}"] if record.split else []
            candidates = next((names[n] for n in (*qualified, str(record.id)) if names.get(n)), ())
            matching = [q for q in candidates if record.split is None or not q.splits or record.split in q.splits]
            duplicate = next((question for question in matching if question.id in matches), None)
            if not matching or duplicate is not None:
                if duplicate is not None:
                    what = "answers a question that was already answered"
                elif candidates:
                    what = f"has category '{record.split}', but its question is in split '{candidates[0].splits[0]}'"
                elif str(record.id) in names:
                    what = "matches several questions; use ids like '<split>/<id>', or add a field 'category'"
                else:
                    what = "matches no question"
                examples = ", ".join(question.id for question in questions[:3])
                msg = f"{record.where}: id '{record.id}' {what}; ids are {examples}, …"
                raise DataError(msg)
            matches.update((question.id, record) for question in matching)
        missing = [question.id for question in questions if question.id not in matches]
        if missing:
            msg = f"{path}: no answer to question '{missing[0]}' ({len(missing)} of {len(questions)} have none)"
            raise DataError(msg)
    for question in questions:
        _check_wording(question, matches[question.id])
    return {question.id: matches[question.id] for question in questions}


def _names(questions: Sequence[AskedQuestion]) -> dict[str, tuple[AskedQuestion, ...]]:
    """Map each id or alias to its questions; to an empty tuple if it matches several different questions."""
    names: dict[str, list[AskedQuestion]] = {}
    for question in questions:
        qualified = [f"{split}/{name}" for split in question.splits for name in (question.id, *question.aliases)]
        for name in dict.fromkeys((question.id, *question.aliases, *qualified)):
            names.setdefault(name, []).append(question)
    ids = {question.id for question in questions}
    unique: dict[str, tuple[AskedQuestion, ...]] = {}
    for name, sharing in names.items():
        exact = [question for question in sharing if question.id == name] if name in ids else sharing
        equivalent = bool(exact[0].text) and len({(question.text, question.image) for question in exact}) == 1
        unique[name] = tuple(exact) if len(exact) == 1 or equivalent else ()
    return unique


def _check_wording(question: AskedQuestion, record: AnswerRecord) -> None:
    """Refuse an answer whose recorded question differs from the matched one; a prompt without '?' is not compared."""
    recorded = record.question
    if recorded is None or "?" not in recorded or not question.text or same_wording(question.text, recorded):
        return
    subject, advice = (
        ("the question", "put the answers in the order of the questions")
        if record.id is None
        else (f"the question of id '{record.id}'", "the ids belong to another question file")
    )
    msg = (
        f"{record.where}: {subject} is {_quote(_first_line(recorded))} here, but {_quote(_first_line(question.text))} in the "
        f"question file; {advice}"
    )
    raise DataError(msg)


def _first_line(text: str) -> str:
    return re.split(r"[\r\n]", text.strip(), maxsplit=1)[0]


def load_answers(
    data: ConceptDataset,
    path: Path | str,
    *,
    parser: str | None = None,
    answer_field: str | None = None,
    id_field: str | None = None,
) -> BehaviorResult:
    r"""Read the answers to a dataset's questions from a file; no model is needed.

    Parameters
    ----------
    data
        The questions.
    path
        Answers as for `read_answers`. An id may omit the split prefix (``17`` matches ``random/17``) and the suffix
        ``/caption`` after an image id.
    parser
        Name of the parser of yes-no answers, one of `behavior.parsing.PARSERS`; by default that of the benchmark that
        `data` was loaded from (`behavior.parsing.parser_for`). Other candidates are matched as whole words.
    answer_field, id_field
        As for `read_answers`.

    Returns
    -------
    BehaviorResult
        The answers in the order of `data`. An answer that matches no candidate is wrong and counted in ``unparsed``.

    Raises
    ------
    DataError
        As for `read_answers` and `match_answers`.
    ConfigError
        For an unknown parser.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(10, splits=["random"])
    >>> path = Path(tempfile.mkdtemp()) / "answers.jsonl"
    >>> _ = path.write_text("".join(json.dumps({"id": e.id, "answer": "Yes."}) + "\n" for e in data))
    >>> gs.behavior.load_answers(data, path).rate("accuracy").value
    0.5
    """
    name = parser_for(data, parser)
    rule = named_parser(name)
    records = read_answers(path, answer_field, id_field=id_field)
    questions = [
        AskedQuestion(e.id, _aliases(e), (e.split,) if e.split in SPLITS else (), e.question, e.group) for e in data
    ]
    matches = match_answers(records, questions, path)
    rows = tuple(row_of(e, matches[e.id].text, rule) for e in data)
    times = [record.seconds for record in records if record.seconds is not None]
    seconds = sum(times) if len(times) == len(records) else None
    provenance = {
        "answers": str(path),
        "sha256": sha256(Path(path)),
        "data": data.name,
        "data_digest": data.digest,
        "parser": name,
    }
    return BehaviorResult(rows, Cost(seconds, None, len(rows)), provenance)


def _aliases(example: Example) -> tuple[str, ...]:
    short = example.id.removeprefix(f"{example.split}/")
    if example.kind == "caption":
        short = short.removesuffix("/caption")
    return (short,) if short != example.id else ()


def row_of(example: Example, text: str, rule: Parser) -> Answer:
    """Return the answer to a question, parsed from text by a rule."""
    parsed, correct = judge_text(example, text, rule)
    return Answer(
        id=example.id,
        group=example.group,
        split=example.split,
        level=example.level or "",
        kind=example.kind,
        question=example.question,
        answer=example.answer,
        candidates=example.candidates,
        given=parsed,
        correct=correct,
        prior_answer=example.prior_answer,
        text=text,
    )
