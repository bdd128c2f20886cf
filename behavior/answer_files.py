"""Answers that were made elsewhere, by any model, closed ones included: read from a file and scored like our own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from behavior.parsing import Parser, named_parser, read_answer
from behavior.result import Answer, BehaviorResult, Cost
from concepts.reading.records import Record, read_records, sha256
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import DataError

IDS = ("question_id", "id", "image_id")
TEXTS = ("answer", "text", "response", "output", "caption")
"""Names of the fields of an answer file; the first that is there counts."""


@dataclass(frozen=True)
class Given:
    """What was answered to one question."""

    id: str | None
    """None in files without ids, whose order is that of the questions."""
    text: str
    where: str
    seconds: float | None = None


def read_answers(path: Path | str) -> tuple[Given, ...]:
    """Read an answer file: JSON lines or one JSON list, each with an id and a text.

    Parameters
    ----------
    path
        Fields are ``question_id`` or ``id``, and ``answer``, ``text``, ``response`` or ``output``, or the ``image_id`` and
        ``caption`` that scorers of captions read; ``seconds`` is optional. Without any id the order counts.

    Raises
    ------
    DataError
        Naming file and record: broken or cut JSON, no text, an id that was there before or is there in some only.
    """
    file = Path(path)
    found: list[Given] = []
    seen: dict[str, str] = {}
    for record in read_records(file):
        number = record.identifier(*IDS) if any(name in record.values for name in IDS) else None
        if number is not None:
            if number in seen:
                msg = f"{record.where}: id '{number}' was already answered, at {seen[number]}"
                raise DataError(msg)
            seen[number] = record.where
        if (number is None) != (found[0].id is None if found else number is None):
            msg = f"{record.where}: some answers have an id and some have none; give one to each, or to none"
            raise DataError(msg)
        seconds = record.numbers("seconds")[0] if "seconds" in record.values else None
        found.append(Given(number, _text(record), record.where, seconds))
    if not found:
        msg = f"{file}: there is no answer in it"
        raise DataError(msg)
    return tuple(found)


def _text(record: Record) -> str:
    """Return what was answered; nothing at all is an answer too."""
    text = record.field(*TEXTS)
    if not isinstance(text, str):
        msg = f"{record.where}: field {' or '.join(map(repr, TEXTS))} must hold text, not {str(text)[:60]}"
        raise DataError(msg)
    return text


def matched(given: Iterable[Given], ids: Mapping[str, str], path: Path | str) -> dict[str, Given]:
    """Give each question its answer.

    Parameters
    ----------
    given
        The answers.
    ids
        Id of a question, in the order of the questions, to another name that a file may have for it (or the id itself).
    path
        The answers' file, for messages.

    Raises
    ------
    DataError
        Where a question has no answer, or an answer no question.
    """
    answers = list(given)
    if answers[0].id is None:
        if len(answers) != len(ids):
            msg = f"{path}: {len(answers)} answers without ids for {len(ids)} questions: give one for each, in their order"
            raise DataError(msg)
        return dict(zip(ids, answers, strict=True))
    names = {short: number for number, short in ids.items()} if len({*ids.values()}) == len(ids) else {}
    names |= {number: number for number in ids}
    found: dict[str, Given] = {}
    for answer in answers:
        number = names.get(str(answer.id))
        if number is None or number in found:
            what = "is not that of a question" if number is None else "answers a question that was already answered"
            msg = f"{answer.where}: id '{answer.id}' {what}; ids are {', '.join(list(ids)[:3])}, …"
            raise DataError(msg)
        found[number] = answer
    missing = [number for number in ids if number not in found]
    if missing:
        msg = f"{path}: no answer to question '{missing[0]}' ({len(missing)} of {len(ids)} have none)"
        raise DataError(msg)
    return found


def answered_elsewhere(data: ConceptDataset, path: Path | str, parser: str = "strict") -> BehaviorResult:
    """Read the answers to a dataset from a file; no model is needed.

    Parameters
    ----------
    data
        What was asked.
    path
        Answers as for `read_answers`; an id may leave out the split in front (``random/17`` is also ``17``), and that of a
        caption is also the image's (``17/caption`` is also ``17``).
    parser
        How yes-no answers are read, one of `behavior.parsing.PARSERS`; other candidates are looked for as whole words.

    Returns
    -------
    BehaviorResult
        The answers in the order of `data`. What is none of the candidates is wrong, and counted in ``unparsed``.

    Raises
    ------
    DataError
        As `read_answers`, and where questions and answers do not belong together.
    ConfigError
        For an unknown parser.
    """
    rule = named_parser(parser)
    given = read_answers(path)
    found = matched(given, {e.id: _short(e) for e in data}, path)
    rows = tuple(row_of(e, found[e.id].text, rule) for e in data)
    times = [answer.seconds for answer in given if answer.seconds is not None]
    seconds = sum(times) if len(times) == len(given) else None
    provenance = {
        "answers": str(path),
        "sha256": sha256(Path(path)),
        "data": data.name,
        "data_digest": data.digest,
        "parser": parser,
    }
    return BehaviorResult(rows, Cost(seconds, None, len(rows)), provenance)


def _short(example: Example) -> str:
    """Return the other name of a question in answer files."""
    short = example.id.removeprefix(f"{example.split}/")
    return short.removesuffix("/caption") if example.kind == "caption" else short


def row_of(example: Example, text: str, rule: Parser) -> Answer:
    """Return the answer to a question as a text gives it."""
    given = read_answer(text, example.candidates, rule) if example.candidates else None
    return Answer(
        id=example.id,
        group=example.group,
        split=example.split,
        level=example.level,
        kind=example.kind,
        question=example.question,
        answer=example.answer,
        candidates=example.candidates,
        given=given,
        correct=given == example.answer if example.candidates else None,
        prior_answer=example.prior_answer,
        text=text,
    )
