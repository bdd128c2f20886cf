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

from experiments.run.folder import RECEIPT, Receipt, RunFolder, read_receipt, write_json
from groundscope.core.locks import lock

SWEEPS = "sweeps"
"""Folder of sweeps inside a root; a sweep's jobs are runs in its folder."""


def runs_in(root: Path) -> Iterator[Path]:
    """Yield the folders of all runs of a root, those of sweeps after the others."""
    for pattern in ("*/run.json", f"{SWEEPS}/*/*/run.json"):
        yield from (marker.parent for marker in sorted(root.glob(pattern)))


def door(root: Path, stage: str, key: str, waiting: Callable[[str], None]) -> AbstractContextManager[None]:
    """Hold the right to make a stage; wait for who holds it."""
    return lock(root / ".locks" / f"{stage}-{key[:24]}", waiting=waiting, transient=True)


def take(root: Path, run: RunFolder, folder: str, key: str) -> Receipt | None:
    """Take a stage from another run of the root that has finished it under the same key; None where there is none."""
    for other in runs_in(root):
        source = other / folder
        if other == run.path or _key(source) != key:
            continue
        found = read_receipt(source)
        if found is None or found.key != key or not found.holds(source):
            continue
        target = run.begin(folder, key, anew=True)
        try:
            for name in found.files:
                _link(source / name, target / name)
        except OSError:  # somebody is clearing it away: make it here
            continue
        if not found.holds(target):
            continue
        taken = replace(found, origin=found.origin or str(other.relative_to(root)))
        write_json(target / RECEIPT, vars(taken))
        return taken
    return None


def _key(folder: Path) -> str:
    try:
        return (folder / ".key").read_text()
    except OSError:
        return ""


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
