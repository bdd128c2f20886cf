"""The layouts of answer files: the benchmark's own, and those of evaluation tools. An open table.

A format reads a record as an id and a text, or does not fit. If two formats fit a file and read it differently, the
file is refused and both are named; formats that read the same id and the same text are one reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from behavior.answer_files import IDS, QUESTIONS
from behavior.benchmarks.specification import AnswerLayout
from concepts.reading.record import Record, as_record, is_text
from concepts.reading.records import read_records
from groundscope.core.errors import DataError
from groundscope.core.registry import Registry

_IMAGES = ("image", "image_source", "image_path", "image_id", "filename")
_PLAIN_IDS = ("id", "question_id", "index")
_PLAIN_TEXTS = ("response", "output", "model_answer", "prediction", "caption")


@dataclass(frozen=True)
class Reading:
    """One record as a format reads it.

    Examples
    --------
    >>> from behavior.benchmarks.answer_formats import Reading
    >>> Reading("17", "Yes.").question is None
    True
    """

    id: str | None
    """None for a record without an id, which is matched by its place."""
    text: str
    question: str | None = None
    image: str | None = None
    where: str = ""
    seconds: float | None = None


AnswerFormat = Callable[[Record, AnswerLayout], Reading | None]
"""Function of a record and the benchmark's own layout; None if the record does not have this format."""


def _release(record: Record, layout: AnswerLayout) -> Reading | None:
    text = _first(record, layout.text)
    if text is None or _is_question(record, text, layout):
        return None
    number = _identifier(record, layout)
    question, image = _text_of(record, layout.question, text), _text_of(record, layout.image)
    if number is None and question is None:
        return None
    return _reading(record, number, record.values[text], question, image)


def _lmms_eval(record: Record, layout: AnswerLayout) -> Reading | None:
    """Sample logs of lmms-eval: ``doc``, and the first of ``filtered_resps`` or ``resps``."""
    values = record.values
    name = next((n for n in ("filtered_resps", "resps") if n in values), None)
    if name is None or not isinstance(values.get("doc"), dict):
        return None
    doc = as_record(f"{record.where}, doc", values["doc"])
    number = _identifier(doc, layout)
    if number is None and (key := _first(doc, IDS)) is not None:
        number = doc.identifier(key)
    first = values[name]
    while isinstance(first, list):  # one response, or one response in a list for each question
        if not first:
            return None
        first = first[0]
    question = _text_of(doc, (*layout.question, *QUESTIONS, "text"))
    return _reading(record, number, first, question, _text_of(doc, (*layout.image, *_IMAGES)))


def _vlmevalkit(record: Record, layout: AnswerLayout) -> Reading | None:
    """Prediction and result tables of VLMEvalKit: ``index, …, prediction``; pandas reads an empty cell as ``nan``."""
    values = record.values
    if "index" not in values or "prediction" not in values or "doc" in values:
        return None
    text = values["prediction"]
    text = "nan" if text is None and record.table else text
    image = _text_of(record, ("image_path",))
    return _reading(record, record.identifier("index"), text, _text_of(record, ("question",)), image)


def _llava(record: Record, layout: AnswerLayout) -> Reading | None:
    """Answers of LLaVA's scripts: ``question_id, prompt, text``."""
    values = record.values
    if "question_id" not in values or not is_text(values.get("text")) or _is_question(record, "text", layout):
        return None
    return _reading(record, record.identifier("question_id"), values["text"], _text_of(record, ("prompt",)), None)


def _plain(record: Record, layout: AnswerLayout) -> Reading | None:
    """Read an id and one field with the answer: ``id, response``."""
    number, text = _first(record, _PLAIN_IDS), _first(record, _PLAIN_TEXTS)
    if number is None or text is None or "doc" in record.values:
        return None
    return _reading(record, record.identifier(number), record.values[text], _text_of(record, QUESTIONS), None)


ANSWER_FORMATS: Registry[AnswerFormat] = Registry(
    "answer format",
    {
        "release": _release,
        "lmms_eval": _lmms_eval,
        "vlmevalkit": _vlmevalkit,
        "llava": _llava,
        "plain": _plain,
    },
    group="groundscope.answer_formats",
    check=lambda entry: None if callable(entry) else "it must be a function (record, layout)",
    error=DataError,
)
"""Formats by name: built-in, registered, and of installed packages."""


def read_answer_file(
    path: Path,
    layout: AnswerLayout,
    *,
    name: str | None = None,
    answer_field: str | None = None,
    id_field: str | None = None,
    last: bool = False,
) -> list[Reading]:
    """Read an answer file: JSON lines, one JSON list, or a table with a header row.

    Parameters
    ----------
    path
        The file.
    layout
        The benchmark's own layout.
    name
        An entry of `ANSWER_FORMATS`; None for the only one that fits.
    answer_field, id_field
        Fields that hold the answer and the id, instead of those of the benchmark's own layout; they select the format
        ``release``.
    last
        Whether the last of several answers to a question counts, at the place of the first; else they are an error.

    Raises
    ------
    DataError
        Names the file and record: if no format fits, two formats fit and read different things, an id occurs twice, only
        some records have an id, or an answer is not text.
    """
    if answer_field is not None or id_field is not None:
        ids = layout.ids if id_field is None else (id_field,)
        layout = AnswerLayout(
            layout.text if answer_field is None else (answer_field,),
            ids,
            layout.question,
            layout.image,
            layout.identify if id_field is None else None,
            layout.text_alone,
        )
        name = name or "release"
    readings: list[Reading] = []
    places: dict[str, str] = {}
    for record in read_records(path):
        if name is None:
            name = _only_format(record, layout)
        reading = ANSWER_FORMATS[name](record, layout)
        if reading is None:
            expected = ", ".join(layout.text)
            msg = f"{record.where}: not a record of format '{name}' (answer in {expected}); all records must have one format"
            raise DataError(msg)
        if readings and (reading.id is None) != (readings[0].id is None):
            msg = f"{record.where}: only some answers have an id; give an id to all answers or to no answer"
            raise DataError(msg)
        if reading.id is not None and reading.id in places:
            if last:
                first = next(i for i, other in enumerate(readings) if other.id == reading.id)
                readings[first] = reading
                continue
            msg = f"{record.where}: question '{reading.id}' was already answered, at {places[reading.id]}"
            raise DataError(msg)
        if reading.id is not None:
            places[reading.id] = record.where
        readings.append(reading)
    if not readings:
        msg = f"{path}: the file contains no answers"
        raise DataError(msg)
    return readings


def _only_format(record: Record, layout: AnswerLayout) -> str:
    """Return the name of the format that fits a record; raises `DataError` if none or several fit."""
    fits: dict[tuple[str | None, str], str] = {}
    for name, entry in ANSWER_FORMATS.usable().items():
        reading = entry(record, layout)
        if reading is not None:
            fits.setdefault((reading.id, reading.text), name)
    if len(fits) == 1:
        return next(iter(fits.values()))
    if fits:
        readings = " or ".join(
            f"'{name}' (id {number}, answer {_quote(text)})" for (number, text), name in fits.items()
        )
        msg = f"{record.where}: the file may have the format {readings}; name one, as in format='{next(iter(fits.values()))}'"
        raise DataError(msg)
    fields = ", ".join(map(repr, record.values)) or "no fields"
    own = ", ".join(layout.text)
    msg = (
        f"{record.where}: no answer format fits; the benchmark's own has the answer in {own}, others are "
        f"{', '.join(n for n in ANSWER_FORMATS if n != 'release')}; the record has {fields}"
    )
    raise DataError(msg)


def _is_question(record: Record, name: str, layout: AnswerLayout) -> bool:
    """Whether a field named like an answer holds the question of a question file instead: ``text`` next to a label."""
    others = any(q in record.values for q in layout.question if q != name)
    return name in {"text", "question"} and not others and any(sign in record.values for sign in ("label", "category"))


def _identifier(record: Record, layout: AnswerLayout) -> str | None:
    if layout.identify is not None:
        return layout.identify(record)
    key = _first(record, layout.ids)
    return None if key is None else record.identifier(key)


def _first(record: Record, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in record.values), None)


def _text_of(record: Record, names: tuple[str, ...], besides: str = "") -> str | None:
    """Return the first of these fields that holds text."""
    values = record.values
    return next((str(values[n]) for n in names if n != besides and _is_name(values.get(n))), None)


def _is_name(value: object) -> bool:
    return (is_text(value) and bool(value.strip())) or (isinstance(value, int) and not isinstance(value, bool))


def _reading(record: Record, number: str | None, text: object, question: str | None, image: str | None) -> Reading:
    if not is_text(text):
        msg = f"{record.where}: the answer must be text, not {ascii(text)[:60]}"
        raise DataError(msg)
    values: Mapping[str, object] = record.values
    seconds = record.numbers("seconds")[0] if "seconds" in values and not record.table else None
    return Reading(number, text, question, image, record.where, seconds)


def _quote(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
