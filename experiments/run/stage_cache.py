"""Stages that several runs have in common are made once.

A stage's key says all it depends on, so two runs of one root folder whose stages have the same key have the same stage,
sweep or not. The second takes the files of the first as hard links (copies where the file system has none): each run's
folder stays whole by itself, can be moved or deleted alone, and the bytes lie on the disk once. While a stage is made, a
lock named by its key stands in ``<root>/.locks``; who wants the same waits for it and then takes what was made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from experiments.config import SWEEPS
from experiments.run.folder import MARKER, Receipt, RunFolder, begun_under, read_receipt, write_receipt
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.locks import lock
from groundscope.core.paths import below, create_part, is_file, is_link
from groundscope.core.user_files import open_regular


def runs_in(root: Path) -> Iterator[Path]:
    """Yield the folders of all runs of a root, those of sweeps after the others."""
    sweeps = root / SWEEPS
    for start, depth in ((root, 1), (sweeps, 2)):
        if start == root or not is_link(sweeps):
            yield from (folder for folder in sorted(_folders(start, depth)) if is_file(folder / MARKER))


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """Yield the folders so many levels below a folder; links are passed over."""
    if depth == 0:
        yield root
        return
    try:
        inner = [Path(entry.path) for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for folder in inner:
        yield from _folders(folder, depth - 1)


def door(root: Path, stage: str, key: str, waiting: Callable[[str], None]) -> AbstractContextManager[None]:
    """Hold the right to make a stage; wait for who holds it."""
    return lock(below(root, f".locks/{stage}-{key[:24]}", error=ConfigError), waiting=waiting, transient=True)


def take(root: Path, run: RunFolder, folder: str, key: str) -> Receipt | None:
    """Take a stage from another run of the root that has finished it under the same key; None where no run has.

    A run whose receipt, folder or files cannot be trusted (names or links that lead outside, files that changed) is passed over.
    """
    for other in runs_in(root):
        source = other / folder
        if other == run.path or begun_under(source) != key:
            continue
        found = _usable(source, key)
        if found is None:
            continue
        target = run.begin(folder, key, anew=True)
        try:
            for name in found.files:
                _link(below(source, name), below(target, name))
        except (OSError, DataError):  # another process is clearing it: make it here
            continue
        if not found.holds(target):
            continue
        taken = replace(found, origin=found.origin or str(other.relative_to(root)))
        write_receipt(target, taken)
        return taken
    return None


def _usable(source: Path, key: str) -> Receipt | None:
    """Return the receipt of another run's stage where it has this key and its files hold."""
    try:
        if is_link(source):
            return None
        found = read_receipt(source)
    except ConfigError:
        return None
    if found is None or found.key != key or found.outside or not found.holds(source):
        return None
    return found


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        part, file = create_part(target)
        try:
            with file, open_regular(source) as original:
                shutil.copyfileobj(original, file)
            shutil.copystat(source, part)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
