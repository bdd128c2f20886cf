"""Decide whether HDF5 can parse a file safely: by its digests, or in a child process with limits.

A sealed file (layout version 3, `activation_store.format.seal`) is compared with its seal. A file of versions 1 and 2 has no
digest that can be checked without HDF5: a child process opens it first, with limits on time and memory, and makes the same
HDF5 calls as this process will. If the child hangs, crashes or fails, the file is damaged. Outcomes are cached by file
identity (device, inode, size, modification time), so that each file is examined once.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from activation_store.format.seal import read_seal, structure_is_whole
from groundscope.core.errors import StoreError
from groundscope.core.files import DamagedFileError

Task = Literal["screen", "inspect"]
"""``screen``: parse the structure; ``inspect``: also compare all values with the digests inside the file."""
SECONDS = 1.5
"""Processor time limit of a child per file, in seconds, in addition to the time to read it."""
BYTES_PER_SECOND = 10e6
MEMORY = 2 << 30
"""Address space limit of a child, in bytes, in addition to its use at start and four times the file size."""
WAITING = 10.0
"""Factor on the time limit: how long the parent waits for a child, because other processes can use the processor."""
_MAX_CACHED = 1 << 16
_CODE = "import sys,json;sys.path[:]=json.loads(sys.argv[1]);from activation_store.reading.hdf5_safety_child import main;main()"

_outcomes: dict[tuple[int, int, int, int], Outcome] = {}


@dataclass(frozen=True)
class Outcome:
    """The result of examining a file."""

    problem: str | None
    """Description of the problem; None if HDF5 can parse the file."""
    damaged: bool = False
    """Whether the problem is changed bytes; otherwise it is a file of another kind or of a newer version."""
    digest: str = ""
    """Identifies the content: the digest of the seal; in version 2 the SHA-256 over all bytes but the chunks; else empty."""
    sealed: bool = False
    details: Mapping[str, Any] | None = None
    """The child's result for the task ``inspect``."""


def screen(paths: Sequence[Path], kind: str) -> list[Outcome]:
    """Return for each file whether HDF5 can parse it.

    Parameters
    ----------
    paths
        The files; those without a seal share a child process.
    kind
        The required ``encoding-type``.

    Raises
    ------
    StoreError
        If one is not a regular file.
    OSError
        If one cannot be read.
    """
    out: dict[Path, Outcome] = {}
    without_seal = []
    for path in dict.fromkeys(paths):
        identity = _identity(path)
        if identity in _outcomes:
            out[path] = _outcomes[identity]
            continue
        try:
            seal = read_seal(path)
            if seal is None:
                without_seal.append(path)
                continue
            whole = structure_is_whole(path, seal)
            problem = None if whole else f"{path}: damaged, its structure or table of examples has changed bytes"
            out[path] = Outcome(problem, not whole, seal.digest, sealed=True)
        except DamagedFileError as error:
            out[path] = Outcome(str(error), damaged=True, sealed=True)
        _store_outcome(identity, out[path])
    if without_seal:
        for path, outcome in zip(without_seal, examine_in_child("screen", without_seal, kind), strict=True):
            out[path] = outcome
    return [out[path] for path in paths]


def examine_in_child(task: Task, paths: Sequence[Path], kind: str) -> list[Outcome]:
    """Parse files in a child process with limits; a hang or crash there becomes an `Outcome` with a problem."""
    out: list[Outcome] = []
    while len(out) < len(paths):
        remaining = paths[len(out) :]
        with _child(task, remaining, kind) as lines:
            for path in remaining:
                line = _next(lines, WAITING * _limit(path))
                if not line:
                    text = (
                        f"{path}: damaged: reading it crashes HDF5, or takes more time or memory than its size allows"
                    )
                    out.append(Outcome(text, damaged=True))
                    break
                out.append(Outcome(**json.loads(line)))
    for path, outcome in zip(paths, out, strict=True):
        if task == "screen" or outcome.problem is not None:
            _store_outcome(_identity(path), outcome)
    return out


def _limit(path: Path) -> float:
    """Return the processor time limit of a child for a file, in seconds."""
    return SECONDS + path.stat().st_size / BYTES_PER_SECOND


@contextlib.contextmanager
def _child(task: Task, paths: Sequence[Path], kind: str) -> Iterator[queue.SimpleQueue[str]]:
    jobs = [{"path": str(p), "seconds": _limit(p)} for p in paths]
    request = json.dumps({"task": task, "kind": kind, "memory": MEMORY, "jobs": jobs})
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    command = [sys.executable, "-c", _CODE, json.dumps([p for p in sys.path if isinstance(p, str)])]
    # Discard standard error: HDF5 and a crashing libc write messages there that do not help the user.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
    ) as process:
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018  # for the type checker
        threads = (
            threading.Thread(target=_write, args=(process.stdin, request), daemon=True),
            threading.Thread(target=_read, args=(process.stdout, lines), daemon=True),
        )
        for thread in threads:
            thread.start()
        try:
            if not _next(lines, WAITING * SECONDS):
                msg = "the child process that checks files without a seal did not start; try again"
                raise StoreError(msg)
            yield lines
        finally:
            process.kill()
            process.wait()
            for thread in threads:
                thread.join()


def _write(pipe: IO[str], text: str) -> None:
    with contextlib.suppress(OSError), pipe:
        pipe.write(text)


def _read(pipe: IO[str], lines: queue.SimpleQueue[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in pipe:
            lines.put(line)
    lines.put("")


def _next(lines: queue.SimpleQueue[str], seconds: float) -> str:
    try:
        return lines.get(timeout=seconds)
    except queue.Empty:
        return ""


def _identity(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _store_outcome(identity: tuple[int, int, int, int], outcome: Outcome) -> None:
    if len(_outcomes) >= _MAX_CACHED:
        _outcomes.clear()
    _outcomes[identity] = outcome
