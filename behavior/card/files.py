"""The files of an evaluation card: JSON with a schema, CSV, and a page."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from behavior.card.rows import CardAnswer, CardDifference, CardFigure, CardRow, ModelFacts
from groundscope.core import artifacts
from groundscope.core.errors import DataError
from groundscope.core.files import canonical_json, write_text, write_whole
from groundscope.core.statistics import Estimate

if TYPE_CHECKING:
    from behavior.card.card import EvaluationCard

FORMAT, VERSION = "groundscope.card", 1
C = TypeVar("C", bound="EvaluationCard")
_NUMBER = {"type": ["number", "null"]}
_ESTIMATE = {
    "type": "object",
    "required": ["value", "low", "high", "n", "few_groups"],
    "properties": {
        "value": _NUMBER,
        "low": _NUMBER,
        "high": _NUMBER,
        "n": {"type": "integer"},
        "few_groups": {"type": "boolean"},
    },
    "additionalProperties": False,
}
_ESTIMATES = {"type": "object", "additionalProperties": _ESTIMATE}
_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}


def _list(**properties: Any) -> dict[str, Any]:
    item = {"type": "object", "required": list(properties), "properties": properties, "additionalProperties": False}
    return {"type": "array", "items": item}


CARD_SCHEMA: Mapping[str, Any] = MappingProxyType(
    {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "groundscope evaluation card, version 1",
        "type": "object",
        "required": ["format", "version", "rows", "figures", "facts", "differences", "answers", "profiles", "provenance"],
        "properties": {
            "format": {"const": FORMAT},
            "version": {"const": VERSION},
            "rows": _list(
                model=_TEXT, benchmark=_TEXT, level=_TEXT, task=_TEXT, n=_COUNT, frequency=_ESTIMATE, severity=_ESTIMATES,
                yes_ratio={"anyOf": [_ESTIMATE, {"type": "null"}]}, unparsed=_COUNT,
            ),
            "figures": _list(model=_TEXT, benchmark=_TEXT, part=_TEXT, figure=_TEXT, value=_ESTIMATE),
            "facts": _list(
                model=_TEXT, benchmark=_TEXT, answers=_COUNT, missing=_COUNT, seconds_per_answer=_NUMBER,
                forwards_per_answer=_NUMBER, rates=_ESTIMATES, variant=_TEXT, notes={"type": "array", "items": _TEXT},
            ),
            "differences": _list(
                first=_TEXT, second=_TEXT, benchmark=_TEXT, level=_TEXT, profile=_TEXT, difference=_ESTIMATE
            ),
            "answers": _list(
                model=_TEXT, benchmark=_TEXT, id=_TEXT, group=_TEXT, level=_TEXT, kind=_TEXT, task=_TEXT,
                correct={"type": "boolean"}, given={"type": ["string", "null"]}, unparsed={"type": "boolean"},
            ),
            "profiles": {
                "type": "object",
                "additionalProperties": {"type": "object", "additionalProperties": {"type": "number"}},
            },
            "provenance": {"type": "object"},
        },
    }
)  # fmt: skip
"""JSON schema of ``card.json``; numbers that are not defined are null."""


def write_card(card: EvaluationCard, folder: Path) -> list[Path]:
    """Write the files of a card into a folder."""
    from behavior.card.page import card_page

    folder.mkdir(parents=True, exist_ok=True)
    content = {
        name: [_plain(asdict(item)) for item in getattr(card, name)]
        for name in ("rows", "figures", "facts", "differences", "answers")
    }
    content |= {"profiles": {k: dict(v) for k, v in card.profiles.items()}, "provenance": _plain(dict(card.provenance))}
    paths = [folder / name for name in ("card.json", "card.csv", "card_answers.csv", "card.html")]
    write_whole(paths[0], (canonical_json(artifacts.sign_document(FORMAT, VERSION, content)) + "\n").encode())
    write_text(paths[1], _csv(row_record(row) for row in card.rows))
    write_text(paths[2], _csv(asdict(answer) for answer in card.answers))
    write_text(paths[3], card_page(card))
    return paths


def read_card(cls: type[C], path: Path) -> C:
    """Read ``card.json``."""
    document = artifacts.read_document(
        path, FORMAT, "evaluation card", VERSION, error=DataError, advice="make the card again"
    )
    try:
        return cls(
            tuple(
                CardRow(
                    **{
                        **row,
                        "frequency": _estimate(row["frequency"]),
                        "severity": _estimates(row["severity"]),
                        "yes_ratio": None if row["yes_ratio"] is None else _estimate(row["yes_ratio"]),
                    }
                )
                for row in document["rows"]
            ),
            tuple(CardFigure(**{**figure, "value": _estimate(figure["value"])}) for figure in document["figures"]),
            tuple(
                ModelFacts(**{**fact, "rates": _estimates(fact["rates"]), "notes": tuple(fact["notes"])})
                for fact in document["facts"]
            ),
            tuple(CardDifference(**{**d, "difference": _estimate(d["difference"])}) for d in document["differences"]),
            tuple(CardAnswer(**answer) for answer in document["answers"]),
            document["profiles"],
            document["provenance"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        msg = f"evaluation card '{path}' is damaged: {error}; make the card again"
        raise DataError(msg) from error


def row_record(row: CardRow) -> dict[str, object]:
    """Return a row as flat values: each figure with its ends."""
    record: dict[str, object] = {
        name: getattr(row, name) for name in ("model", "benchmark", "level", "task", "n", "unparsed")
    }
    figures = {"frequency": row.frequency, **{f"severity_{name}": value for name, value in row.severity.items()}}
    for name, figure in figures.items():
        record |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
    yes = row.yes_ratio
    record |= {
        f"yes_ratio{end}": None if yes is None else getattr(yes, end.lstrip("_") or "value")
        for end in ("", "_low", "_high")
    }
    return record


def _csv(records: Iterable[Mapping[str, object]]) -> str:
    lines = list(records)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(lines[0]) if lines else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: "" if v is None else repr(v) if isinstance(v, float) else v for k, v in line.items()} for line in lines
    )
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _estimate(values: Mapping[str, Any]) -> Estimate:
    names = {f.name for f in fields(Estimate)}
    if set(values) != names:
        msg = f"an estimate has the fields {', '.join(values)}"
        raise ValueError(msg)
    numbers: dict[str, Any] = {key: math.nan if value is None else value for key, value in values.items()}
    return Estimate(**numbers)


def _estimates(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    return {name: _estimate(value) for name, value in values.items()}
