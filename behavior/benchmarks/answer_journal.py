"""A journal of written answers: one line for each batch, so that an interrupted benchmark resumes where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundscope.core.errors import DataError

FORMAT, VERSION = "groundscope.asked", 1


@dataclass
class AnswerJournal:
    """Answers of one model to one set of questions, with their cost.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from behavior.benchmarks.answer_journal import AnswerJournal
    >>> path = Path(tempfile.mkdtemp()) / "answers.asked.jsonl"
    >>> AnswerJournal.resume(path, {"model": "tiny"}).add({"q1": "yes"}, seconds=0.5, forwards=2)
    >>> AnswerJournal.resume(path, {"model": "tiny"}).texts
    {'q1': 'yes'}
    """

    path: Path
    texts: dict[str, str] = field(default_factory=dict)
    """Id of a question to the text that the model wrote."""
    seconds: float = 0.0
    forwards: int = 0

    @classmethod
    def resume(cls, path: Path, identity: Mapping[str, Any]) -> AnswerJournal:
        """Return the journal of a file, which is created if it does not exist; an incomplete last line is removed.

        Raises
        ------
        DataError
            If the file is not a journal, or its answers are of another model, other questions or other settings.
        """
        head = {"format": FORMAT, "version": VERSION, "identity": json.loads(json.dumps(dict(identity)))}
        journal = cls(path)
        lines = _complete_lines(path)
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((json.dumps(head) + "\n").encode())
            return journal
        try:
            first, *batches = map(json.loads, lines)
            recorded = first["identity"] if first["format"] == FORMAT else None
            for batch in batches:
                journal.texts |= {str(number): str(text) for number, text in batch["answers"].items()}
                journal.seconds += float(batch["seconds"])
                journal.forwards += int(batch["forwards"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            msg = f"'{path}' is not a journal of answers, or is damaged; delete it, or choose another answer file"
            raise DataError(msg) from error
        if recorded != head["identity"]:
            stored = head["identity"]
            other = [n for n in dict.fromkeys((*stored, *(recorded or ()))) if stored.get(n) != (recorded or {}).get(n)]
            msg = (
                f"'{path}' has answers with another {', '.join(other)}; choose another answer file, or delete the journal to "
                "ask again"
            )
            raise DataError(msg)
        return journal

    def add(self, texts: Mapping[str, str], *, seconds: float, forwards: int) -> None:
        """Append the answers of one batch, and wait until they are on the disk."""
        line = json.dumps({"answers": dict(texts), "seconds": seconds, "forwards": forwards}) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.texts |= texts
        self.seconds += seconds
        self.forwards += forwards


def _complete_lines(path: Path) -> list[bytes]:
    """Return the lines of a file that end in a line break, and remove an incomplete last line."""
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return data[:end].splitlines()
