"""Cache of finished stages: a stage that several runs have in common runs once.

The key of a stage contains everything it depends on, so stages of two runs below one root with the same key are equal, in a
sweep or not. The second run takes the files of the first as hard links, or as copies where the file system has no links: each
run folder is complete and can be moved or deleted alone, and the bytes are on the disk once. A lock in ``<root>/.locks``, named
after the key, is held while a stage is made; a process that needs the same stage waits for it and takes the result.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from experiments.config import SWEEPS
from experiments.run.folder import MARKER, Receipt, RunFolder, read_receipt, started_key, write_receipt
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.locks import lock
from groundscope.core.paths import below, create_part, is_file, is_link
from groundscope.core.user_files import open_regular


def runs_in(root: Path) -> Iterator[Path]:
    """Yield the folders of all runs below a root, runs of sweeps last."""
    sweeps = root / SWEEPS
    for start, depth in ((root, 1), (sweeps, 2)):
        if start == root or not is_link(sweeps):
            yield from (folder for folder in sorted(_folders(start, depth)) if is_file(folder / MARKER))


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """Yield the folders at a depth below a folder; links are not followed."""
    if depth == 0:
        yield root
        return
    try:
        inner = [Path(entry.path) for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for folder in inner:
        yield from _folders(folder, depth - 1)


def stage_lock(root: Path, stage: str, key: str, waiting: Callable[[str], None]) -> AbstractContextManager[None]:
    """Hold the lock of a stage and key; `waiting` is called with the holder if another process has it."""
    return lock(below(root, f".locks/{stage}-{key[:24]}", error=ConfigError), waiting=waiting, transient=True)


def take(root: Path, run: RunFolder, folder: str, key: str) -> Receipt | None:
    """Take a stage from another run below the root that finished it with the same key; None if there is no such run.

    Runs with an invalid receipt, folder or file (paths or links that lead outside, changed files) are skipped.
    """
    for other in runs_in(root):
        source = other / folder
        if other == run.path or started_key(source) != key:
            continue
        receipt = _usable(source, key)
        if receipt is None:
            continue
        target = run.begin(folder, key, clear=True)
        try:
            for name in receipt.files:
                _link(below(source, name), below(target, name))
        except (OSError, DataError):  # another process is clearing the source: make the stage here
            continue
        if not receipt.holds(target):
            continue
        own_receipt = replace(receipt, origin=receipt.origin or str(other.relative_to(root)))
        write_receipt(target, own_receipt)
        return own_receipt
    return None


def _usable(source: Path, key: str) -> Receipt | None:
    """Return the receipt of a stage of another run if it has this key and its files are unchanged."""
    try:
        if is_link(source):
            return None
        receipt = read_receipt(source)
    except ConfigError:
        return None
    if receipt is None or receipt.key != key or receipt.outside or not receipt.holds(source):
        return None
    return receipt


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
