"""Descriptions with marked spans: objects, attributes of objects, and relations of two objects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from concepts.concept import LEVELS, Level
from groundscope.core.errors import DataError
from groundscope.core.files import write_whole
from groundscope.core.text import nearest

Verdict = Literal["right", "wrong", "unknown"]
VERDICTS: tuple[Verdict, ...] = ("right", "wrong", "unknown")
"""What an annotation, a person or a judge says of a span; ``unknown``: it cannot be decided."""
Place = tuple[int, int]
"""First character of a span, and one after its last."""
ARGUMENTS: Mapping[str, int] = {"object": 0, "attribute": 1, "relation": 2}
"""Level to the number of objects that its spans refer to."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A part of a description that names an object, an attribute of one, or a relation of two.

    Raises
    ------
    DataError
        For an empty or negative span, an unknown level or verdict, or another number of arguments than the level has.

    Examples
    --------
    >>> from behavior.free_text import Span
    >>> text = "a red apple"
    >>> Span(2, 5, "attribute", ((6, 11),)).words(text)
    'red'
    """

    start: int
    """First character."""
    end: int
    """One after the last character."""
    level: Level
    arguments: tuple[Place, ...] = ()
    """Places of the objects: the owner of an attribute; subject and object of a relation."""
    verdict: Verdict | None = None
    """Whether the span is right; None if it was not judged."""
    reason: str = ""
    """Why, such as the annotation that decides; empty if unknown."""

    def __post_init__(self) -> None:
        problem = None
        if self.level not in LEVELS:
            problem = f"unknown level '{self.level}'; choose from {', '.join(LEVELS)}{nearest(str(self.level), LEVELS)}"
        elif any(not 0 <= start < end for start, end in (self.place, *self.arguments)):
            problem = "a span must begin at 0 or later and end after it begins"
        elif len(self.arguments) != ARGUMENTS[self.level]:
            count = ARGUMENTS[self.level]
            problem = f"a span of level {self.level} has {count} arguments, not {len(self.arguments)}"
        elif self.verdict is not None and self.verdict not in VERDICTS:
            problem = (
                f"unknown verdict '{self.verdict}'; choose from {', '.join(VERDICTS)}{nearest(self.verdict, VERDICTS)}"
            )
        if problem is not None:
            msg = f"span {self.start}-{self.end}: {problem}"
            raise DataError(msg)

    @property
    def place(self) -> Place:
        """First character and one after the last."""
        return self.start, self.end

    def words(self, text: str) -> str:
        """Return the words of the span in the text of its description."""
        return text[self.start : self.end]

    def record(self) -> dict[str, object]:
        """Return the fields as values that JSON can represent, without empty ones."""
        return {
            "start": self.start,
            "end": self.end,
            "level": self.level,
            **({"arguments": [list(place) for place in self.arguments]} if self.arguments else {}),
            **({"verdict": self.verdict} if self.verdict is not None else {}),
            **({"reason": self.reason} if self.reason else {}),
        }


@dataclass(frozen=True, slots=True)
class Description:
    """A text about an image, with its spans.

    Raises
    ------
    DataError
        If a span ends after the text, or an argument is no object span of the description.

    Examples
    --------
    >>> from behavior.free_text import Description, Span
    >>> Description("1", "a red apple", (Span(6, 11, "object"), Span(2, 5, "attribute", ((6, 11),)))).phrases()
    ('apple', 'red apple')
    """

    id: str
    """Id of the question that asks for the description, or of its image."""
    text: str
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        objects = {span.place for span in self.spans if span.level == "object"}
        for span in self.spans:
            problem = None
            if span.end > len(self.text):
                problem = f"ends after the text, which has {len(self.text)} characters"
            elif any(argument not in objects for argument in span.arguments):
                problem = "refers to a place that is no object span of the description"
            if problem is not None:
                msg = f"description '{self.id}': span {span.start}-{span.end} {problem}"
                raise DataError(msg)

    def of_level(self, level: Level) -> tuple[Span, ...]:
        """Return the spans of one level."""
        return tuple(span for span in self.spans if span.level == level)

    def phrases(self) -> tuple[str, ...]:
        """Return each span as a phrase: "apple", "red apple", "apple on table"."""
        return tuple(self.phrase(span) for span in self.spans)

    def phrase(self, span: Span) -> str:
        """Return a span with its objects, as a phrase."""
        arguments = [self.text[start:end] for start, end in span.arguments]
        words = span.words(self.text)
        if span.level == "relation":
            return f"{arguments[0]} {words} {arguments[1]}"
        return f"{words} {arguments[0]}" if span.level == "attribute" else words

    def with_spans(self, spans: Iterable[Span]) -> Description:
        """Return the description with other spans."""
        return replace(self, spans=tuple(spans))


def write_descriptions(descriptions: Iterable[Description], path: Path | str) -> None:
    """Write descriptions as JSON lines, one description a line, for people or a judge who add verdicts.

    A line has ``id``, ``text`` and ``spans``; a span has ``start``, ``end``, ``level``, ``arguments`` (places of its objects),
    ``verdict`` and ``reason``, the last three only if there are any.

    Raises
    ------
    DataError
        If two descriptions have the same id.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from behavior.free_text import parse_description, read_descriptions, write_descriptions
    >>> file = Path(tempfile.mkdtemp()) / "spans.jsonl"
    >>> write_descriptions([parse_description("A red apple.", id="1")], file)
    >>> read_descriptions(file)[0].phrases()
    ('apple', 'red apple')
    """
    rows = list(descriptions)
    _check_ids([row.id for row in rows], "descriptions")
    lines = [
        json.dumps({"id": row.id, "text": row.text, "spans": [span.record() for span in row.spans]}, ensure_ascii=False)
        for row in rows
    ]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, "".join(f"{line}\n" for line in lines).encode())


def read_descriptions(path: Path | str) -> tuple[Description, ...]:
    """Read a file in the layout of `write_descriptions`; other fields are ignored.

    Raises
    ------
    DataError
        Names the file and the line: for a missing file or field, a wrong type, a span outside its text, an unknown
        level or verdict, or an id that is there twice.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from behavior.free_text import read_descriptions
    >>> file = Path(tempfile.mkdtemp()) / "spans.jsonl"
    >>> span = '{"start": 2, "end": 5, "level": "object", "verdict": "wrong"}'
    >>> _ = file.write_text('{"id": "1", "text": "a dog", "spans": [%s]}' % span)
    >>> read_descriptions(file)[0].spans[0].verdict
    'wrong'
    """
    source = Path(path)
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read the descriptions '{path}': {error}"
        raise DataError(msg) from error
    rows: list[Description] = []
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"descriptions '{path}', line {line_number}"
        try:
            rows.append(_description(json.loads(line)))
        except json.JSONDecodeError as error:
            msg = f"{where}: not a JSON object: {error}"
            raise DataError(msg) from error
        except DataError as error:
            msg = f"{where}: {error}"
            raise DataError(msg) from error
    _check_ids([row.id for row in rows], f"descriptions '{path}'")
    return tuple(rows)


def _description(record: Any) -> Description:
    if not isinstance(record, dict):
        msg = "each line must be an object with the fields id, text and spans"
        raise DataError(msg)
    identity, text, spans = record.get("id"), record.get("text"), record.get("spans", [])
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    for name, value, kind in (("id", identity, str), ("text", text, str), ("spans", spans, list)):
        if not isinstance(value, kind):
            msg = f"field '{name}' must be {'a list' if kind is list else 'text'}, not {json.dumps(value)[:60]}"
            raise DataError(msg)
    return Description(str(identity), str(text), tuple(_span(span) for span in spans))


def _span(record: Any) -> Span:
    if not isinstance(record, dict):
        msg = f"a span must be an object with the fields start, end and level, not {json.dumps(record)[:60]}"
        raise DataError(msg)
    arguments = record.get("arguments", [])
    places = [(record.get("start"), record.get("end")), *(arguments if isinstance(arguments, list) else [None])]
    if not all(_is_place(place) for place in places):
        msg = "the places of a span (start, end, and arguments as pairs) must be whole numbers"
        raise DataError(msg)
    return Span(
        record["start"],
        record["end"],
        record.get("level"),  # type: ignore[arg-type]  # checked by Span
        tuple((a, b) for a, b in arguments),
        record.get("verdict"),
        str(record.get("reason", "")),
    )


def _is_place(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return all(isinstance(number, int) and not isinstance(number, bool) for number in value)


def _check_ids(ids: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    for identity in ids:
        if identity in seen:
            msg = f"{what}: the id '{identity}' is there twice; ids must be unique"
            raise DataError(msg)
        seen.add(identity)
