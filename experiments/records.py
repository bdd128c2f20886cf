"""The shapes of the JSON files of a run, and a reader that checks them.

A run folder may come from another person, be damaged, or be written by another release. `read_record` compares a file with its
shape and names the first difference in one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundscope.core.errors import ConfigError
from groundscope.core.user_files import read_json

MAX_BYTES = 1 << 28
"""Largest file that is read, in bytes: enough for the results of a large sweep."""


@dataclass(frozen=True)
class Optional:
    """A field that may be missing or null."""

    shape: Any


@dataclass(frozen=True)
class OneOf:
    """A field that holds either a list or an object."""

    shapes: Mapping[str, Any]
    """The shapes of ``list`` and ``object``; other values are compared with that of the list."""


TEXT, NUMBER, INTEGER, ANY = "text", "number", "integer", "any"
"""Simple shapes; `NUMBER` may be NaN. ``[shape]`` is a list, ``(shape, shape)`` a list of this length, a mapping an object with
these fields and possibly others, ``{"*": shape}`` an object with any keys."""
ESTIMATE = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "n": INTEGER}
PAIRS = {
    "method": TEXT,
    "made": INTEGER,
    "used": INTEGER,
    "set": TEXT,
    "outcomes": {"*": INTEGER},
    "excluded": INTEGER,
    "left_out": {"*": INTEGER},
    "placebo": Optional(
        {"used": INTEGER, "scale": Optional(NUMBER), "moved": Optional(NUMBER), "reason": Optional(TEXT)}
    ),
}
TOP_HEADS = {"heads": [TEXT], "left_out": {"*": TEXT}, "kinds": [TEXT], "pairs": Optional({"*": PAIRS})}
PLAN = [{"stack": TEXT, "component": TEXT, "tokens": TEXT, "concepts": [TEXT]}]
CLASS_SCORES = [
    {
        "grid": TEXT,
        "column": TEXT,
        "layer": Optional(INTEGER),
        "balanced_accuracy": Optional(NUMBER),
        "low": Optional(NUMBER),
        "high": Optional(NUMBER),
        "chance": Optional(NUMBER),
        "n": Optional(INTEGER),
    }
]
SWEEP = {
    "method": TEXT,
    "rule": TEXT,
    "chosen": {"strength": NUMBER, "*": NUMBER},
    "sweep": [{"strength": NUMBER, "*": NUMBER}],
    "curves": {"*": [{"strength": NUMBER, "cost": NUMBER, "harm": NUMBER, "*": NUMBER}]},
    "left_out": {"*": TEXT},
    "guards": Optional([TEXT]),
    "limits": Optional({"*": Optional(NUMBER)}),
    "exportable": Optional(
        {
            "method": TEXT,
            "site": TEXT,
            "name": TEXT,
            "chosen": {"strength": NUMBER, "*": NUMBER},
            "curves": {"*": [{"strength": NUMBER, "cost": NUMBER, "harm": NUMBER, "*": NUMBER}]},
        }
    ),
}
GUARDS = {
    "conditions": {"*": {"*": {"before": ESTIMATE, "after": ESTIMATE, "loss": ESTIMATE}}},
    "labels": {"*": TEXT},
    "limits": {"*": Optional(NUMBER)},
    "not_measured": {"*": TEXT},
}
"""The file of guards: by condition and guard, with the label and limit of each, and why others are missing."""
RATES = {"before": {"*": ESTIMATE}, "*": {"*": ESTIMATE}}
CHANGES = {"*": {"*": ESTIMATE}}
HEADLINE_RATES = {"*": {"*": {"value": NUMBER, "low": NUMBER, "high": NUMBER}}}
EXPORTS = {"written": {"*": TEXT}, "refused": {"*": TEXT}, "vectors": Optional({"*": TEXT})}
REASON = {"reason": TEXT}
ILLUSTRATIONS = {
    "examples": [{"example": TEXT, "size": (INTEGER, INTEGER), "answers": {"*": TEXT}, "image_mass": {"*": NUMBER}}],
    "reason": TEXT,
}
OUTLINES = {"list": [[NUMBER]], "object": {"size": (INTEGER, INTEGER), "counts": TEXT}}
BOX = {"x0": NUMBER, "y0": NUMBER, "x1": NUMBER, "y1": NUMBER}
EXAMPLE = {
    "id": TEXT,
    "image": TEXT,
    "question": TEXT,
    "answer": TEXT,
    "candidates": [TEXT],
    "level": TEXT,
    "kind": TEXT,
    "split": TEXT,
    "group": TEXT,
    "labels": {"*": ANY},
    "objects": [
        {
            "id": TEXT,
            "noun": TEXT,
            "box": Optional(BOX),
            "attributes": {"*": TEXT},
            "outline": Optional(OneOf(OUTLINES)),
        }
    ],
    "subject": Optional(TEXT),
    "prior_answer": Optional(TEXT),
    "prefix": Optional(TEXT),
    "mentions": Optional([{"noun": TEXT, "start": INTEGER, "stop": INTEGER, "present": ANY}]),
    "aliases": Optional([TEXT]),
    "further_images": Optional([TEXT]),
    "suffix": Optional(TEXT),
    "system": Optional(TEXT),
}
FAILURE = {"error": TEXT}
ENVIRONMENT = {"python": TEXT, "system": TEXT, "packages": {"*": Optional(TEXT)}}
JOB = {
    "job": INTEGER,
    "options": {"*": TEXT},
    "folder": TEXT,
    "status": TEXT,
    "seconds": Optional(NUMBER),
    "error": Optional(TEXT),
}
SWEEP_RECORD = {"command": [TEXT], "by": Optional([TEXT]), "jobs": Optional([JOB])}


def read_record(path: Path, shape: Any, *, limit: int = MAX_BYTES) -> Any:
    """Read a JSON file of a run.

    Raises
    ------
    ConfigError
        If it is missing, not a regular file, not JSON, or has another shape; the message names the file and the field.
    """
    try:
        return read_json(path, check=lambda value: problem(value, shape), limit=limit, error=ConfigError)
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror or error}"
        raise ConfigError(msg) from error


def problem(value: Any, shape: Any, at: str = "") -> str | None:
    """Return the first difference between a JSON value and the required shape; None if the value has this shape."""
    if isinstance(shape, Optional):
        return None if value is None else problem(value, shape.shape, at)
    if isinstance(shape, OneOf):
        return problem(value, shape.shapes["object" if isinstance(value, dict) else "list"], at)
    if isinstance(shape, str):
        return _simple(value, shape, at)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _wrong(value, "a list", at)
        return next((p for i, v in enumerate(value) if (p := problem(v, shape[0], f"{at}[{i}]"))), None)
    if isinstance(shape, tuple):
        if not isinstance(value, list) or len(value) != len(shape):
            return _wrong(value, f"a list of {len(shape)}", at)
        return next(
            (p for i, (v, s) in enumerate(zip(value, shape, strict=True)) if (p := problem(v, s, f"{at}[{i}]"))), None
        )
    return _fields(value, shape, at)


def _fields(value: Any, shape: Mapping[str, Any], at: str) -> str | None:
    if not isinstance(value, dict):
        return _wrong(value, "an object", at)
    for name, inner in shape.items():
        if name != "*" and name not in value:
            if isinstance(inner, Optional):
                continue
            return f"{at or 'the file'} has no field '{name}'; it was damaged or written by another release"
    for name, item in value.items():
        inner = shape.get(name, shape.get("*", ANY))
        if difference := problem(item, inner, f"{at}.{name}" if at else name):
            return difference
    return None


def _simple(value: Any, shape: str, at: str) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 1 << 62
    if shape == TEXT and not isinstance(value, str):
        return _wrong(value, "text", at)
    if shape == NUMBER and not whole and not (isinstance(value, float) and not math.isinf(value)):
        return _wrong(value, "a number", at)
    if shape == INTEGER and not whole:
        return _wrong(value, "an integer", at)
    return None


def _wrong(value: Any, expected: str, at: str) -> str:
    return f"{at or 'the file'} must be {expected}, not {type(value).__name__}; it was damaged or written by another release"
