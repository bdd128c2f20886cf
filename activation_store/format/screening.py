"""Whether HDF5 may parse a file: its digests first; files without a seal first in a child process with limits.

A sealed file (layout version 3, `activation_store.format.seal`) is compared with its own seal. A file of versions 1 and 2 has no
digest that can be checked without HDF5: a child process opens it first, with limits on time and memory, and does there with
HDF5 what this process will do. A child that hangs, crashes or fails means a damaged file. The results are remembered for a
file's identity (device, inode, size, time of change), so that each file is examined once.
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
"""Processor time that a child may take for a file, besides the time to read it."""
BYTES_PER_SECOND = 10e6
MEMORY = 2 << 30
"""Address space that a child may take, besides what it has at its start and four times the file."""
WAITING = 10.0
"""Factor on the time limit: how long the answer of a child is waited for, as other processes may take the processor."""
_MOST_REMEMBERED = 1 << 16
_CODE = "import sys,json;sys.path[:]=json.loads(sys.argv[1]);from activation_store.reading.screening_child import main;main()"

_remembered: dict[tuple[int, int, int, int], Outcome] = {}


@dataclass(frozen=True)
class Outcome:
    """What is known of a file."""

    problem: str | None
    """What is wrong with it, in a sentence; None where HDF5 may parse it."""
    damaged: bool = False
    """Whether the problem is that its bytes changed; otherwise it is a file of another kind or of a newer version."""
    digest: str = ""
    """What identifies its content: the digest of its seal; in version 2 the SHA-256 over all but its chunks; else empty."""
    sealed: bool = False
    details: Mapping[str, Any] | None = None
    """What the child returned for the task ``inspect``."""


def screen(paths: Sequence[Path], kind: str) -> list[Outcome]:
    """Return for each file whether HDF5 may parse it.

    Parameters
    ----------
    paths
        The files; those without a seal share a child process.
    kind
        The ``encoding-type`` that they must have.

    Raises
    ------
    StoreError
        Where one is not a regular file.
    OSError
        Where one cannot be read.
    """
    out: dict[Path, Outcome] = {}
    without_seal = []
    for path in dict.fromkeys(paths):
        identity = _identity(path)
        if identity in _remembered:
            out[path] = _remembered[identity]
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
        _remember(identity, out[path])
    if without_seal:
        for path, outcome in zip(without_seal, in_child("screen", without_seal, kind), strict=True):
            out[path] = outcome
    return [out[path] for path in paths]


def in_child(task: Task, paths: Sequence[Path], kind: str) -> list[Outcome]:
    """Let a child process with limits parse files; a hang or a crash there is an `Outcome` with a problem."""
    out: list[Outcome] = []
    while len(out) < len(paths):
        todo = paths[len(out) :]
        with _child(task, todo, kind) as lines:
            for path in todo:
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
            _remember(_identity(path), outcome)
    return out


def _limit(path: Path) -> float:
    """Return the processor time in seconds that a child may take for a file."""
    return SECONDS + path.stat().st_size / BYTES_PER_SECOND


@contextlib.contextmanager
def _child(task: Task, paths: Sequence[Path], kind: str) -> Iterator[queue.SimpleQueue[str]]:
    jobs = [{"path": str(p), "seconds": _limit(p)} for p in paths]
    request = json.dumps({"task": task, "kind": kind, "memory": MEMORY, "jobs": jobs})
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    command = [sys.executable, "-c", _CODE, json.dumps([p for p in sys.path if isinstance(p, str)])]
    # Its own standard error: HDF5 and a crashing libc write there, and none of it is for the user.
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
                msg = "a child process that checks files without a seal did not start"
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


def _remember(identity: tuple[int, int, int, int], outcome: Outcome) -> None:
    if len(_remembered) >= _MOST_REMEMBERED:
        _remembered.clear()
    _remembered[identity] = outcome
