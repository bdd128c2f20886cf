"""Safe paths: names from files that must stay below a folder, links, and temporary names.

A name from a file may be absolute, may leave the folder by ``..``, or may pass through a symbolic link. `below` is the
only function that converts such a name to a path; code that deletes or writes files uses it, and lists folders with
`files_below`, which reports links instead of following them.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from groundscope.core.errors import DataError, GroundscopeError

MAX_NAME_BYTES = 255
"""Longest component of a path on common file systems, in bytes of UTF-8."""


def name_problem(name: object) -> str | None:
    """Return why `name` is not a plain relative name (``a`` or ``a/b``), or None if it is one."""
    if not isinstance(name, str):
        return f"a name must be text, not {type(name).__name__}"
    if not name:
        return "the name is empty"
    if "\0" in name:
        return "the name contains a NUL character"
    if name.startswith("/") or (os.name == "nt" and ("\\" in name or ":" in name)):
        return "the name is absolute"
    parts = name.split("/")
    if any(part in {"", ".", ".."} for part in parts):
        return "the name contains '..', '.' or an empty part"
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        return "the name is not valid UTF-8"
    return f"a part of the name is longer than {MAX_NAME_BYTES} bytes" if longest > MAX_NAME_BYTES else None


def below(root: Path, name: object, *, source: object = None, error: type[GroundscopeError] = DataError) -> Path:
    """Return the path of a plain relative name below a folder; no part of it may be a symbolic link.

    Parameters
    ----------
    root
        The folder; may itself be a link.
    name
        A relative name with ``/`` between its parts.
    source
        The file that contains the name, for the message.
    error
        The class of the exception.

    Returns
    -------
    Path
        ``root / name``; it need not exist.

    Raises
    ------
    GroundscopeError
        An `error` for a name that is absolute, empty, contains ``..``, ``.`` or NUL, is not UTF-8, is too long, or passes
        through a link.
    """
    origin = f"{source}: " if source is not None else ""
    problem = name_problem(name)
    if problem is not None or not isinstance(name, str):
        msg = f"{origin}{str(name)[:200]!r} is not a name below '{root}': {problem}"
        raise error(msg)
    path = root
    for part in name.split("/"):
        path = path / part
        if is_link(path):
            msg = f"{origin}'{path}' is a symbolic link, which is not followed; replace it by the file or folder"
            raise error(msg)
    return path


def is_link(path: Path) -> bool:
    """Whether a path itself is a symbolic link, with any target."""
    try:
        return stat.S_ISLNK(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether a path itself is a regular file, not a link, FIFO or device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def files_below(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield every entry below a folder except folders: its name relative to `root`, with ``/``, and its `lstat`.

    Links are reported, not followed; entries that disappear or cannot be listed are skipped. Sorted.
    """
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(root / prefix if prefix else root) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in listed:
            name = f"{prefix}{entry.name}"
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if stat.S_ISDIR(status.st_mode):
                pending.append(f"{name}/")
            else:
                yield name, status


def create_part(path: Path, owner: str = "") -> tuple[Path, IO[bytes]]:
    """Create a file next to `path` under a random name, and open it for writing.

    It never opens an existing file or link.

    Parameters
    ----------
    path
        The final name.
    owner
        Part of the temporary name that identifies the process.

    Returns
    -------
    path, binary file
        The temporary name, which ends in ``.part``, and the open file.
    """
    part = part_path(path, owner)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return part, os.fdopen(os.open(part, flags, 0o666), "wb")


def part_path(path: Path, owner: str = "") -> Path:
    """Return a random temporary name for a file; it contains `owner`, to identify the process later."""
    ending = f".{owner}{os.getpid()}-{secrets.token_hex(8)}.part"
    # Names are limited to 255 bytes; the temporary name may be truncated, since it will be renamed.
    stem = path.name.encode()[: MAX_NAME_BYTES - len(ending.encode())].decode(errors="ignore")
    return path.with_name(f"{stem}{ending}")
