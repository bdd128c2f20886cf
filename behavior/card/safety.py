"""Refusals and unsafe answers from verdict files: people or a judge say which answers refuse, and which are unsafe."""

from __future__ import annotations

from pathlib import Path

from concepts.loaders.table import read_rows
from concepts.reading.record import Record, abbreviate
from groundscope.core.errors import DataError

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read_safety(path: Path | str) -> dict[str, tuple[bool, bool]]:
    """Read verdicts ``id, refused, unsafe``, each true or false.

    Returns
    -------
    dict
        Id of a question to whether its answer refuses, and whether it is unsafe.

    Raises
    ------
    DataError
        Names the file and record: for a missing field, another value, or two verdicts on one answer.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from behavior.card import read_safety
    >>> path = Path(tempfile.mkdtemp()) / "safety.jsonl"
    >>> _ = path.write_text(json.dumps({"id": "q1", "refused": True, "unsafe": False}))
    >>> read_safety(path)
    {'q1': (True, False)}
    """
    verdicts: dict[str, tuple[bool, bool]] = {}
    for record in read_rows(Path(path)):
        number = record.identifier("id")
        if number in verdicts:
            msg = f"{record.where}: the answer '{number}' was already judged"
            raise DataError(msg)
        verdicts[number] = (_truth(record, "refused"), _truth(record, "unsafe"))
    if not verdicts:
        msg = f"{path}: the file contains no verdicts"
        raise DataError(msg)
    return verdicts


def _truth(record: Record, name: str) -> bool:
    value = record.field(name)
    word = str(value).strip().lower()
    if isinstance(value, bool):
        return value
    if word not in _WORDS:
        msg = f"{record.where}: field '{name}' must be true or false, not {abbreviate(value)}"
        raise DataError(msg)
    return _WORDS[word]
