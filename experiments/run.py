"""The folder of a run: what each stage made, from what, and whether it still holds.

A stage leaves a receipt ``<folder>/stage.json`` naming its key (a digest of its options and of what it was made from)
and the SHA-256 of every file it wrote. It is skipped when the key is unchanged and the files are what the receipt says.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from concepts.errors import ConfigError

LAYOUT = 1
"""Version of the run folder; a folder of another version is refused."""
RECEIPT = "stage.json"
_PACKAGES = ("groundscope", "torch", "transformers", "nnsight", "transformer-lens", "scikit-learn", "numpy", "h5py")


def digest(value: object) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON and rename it into place, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(value, indent=1, default=str) + "\n")
    part.replace(path)


def environment() -> dict[str, Any]:
    """Return what the run depends on besides its options."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: installed(name) for name in _PACKAGES},
    }


@dataclass(frozen=True)
class Receipt:
    """What a finished stage left behind."""

    stage: str
    key: str
    files: Mapping[str, str]
    """Path inside the stage's folder to SHA-256."""
    seconds: float
    summary: str
    """One line for people."""

    @property
    def digest(self) -> str:
        """What later stages depend on: the digest of everything this stage made."""
        return digest(dict(self.files))


class RunFolder:
    """The folder of one run; held by one process at a time.

    Raises
    ------
    ConfigError
        Where the folder cannot be written, belongs to another version, or another process works in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        marker = path / "run.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if marker.exists():
                found = json.loads(marker.read_text()).get("layout")
                if found != LAYOUT:
                    msg = (
                        f"run folder '{path}' has layout {found}, this release writes {LAYOUT}: "
                        "give the run another name (name=…), or use the release that made it"
                    )
                    raise ConfigError(msg)
            else:
                write_json(marker, {"layout": LAYOUT})
        except (OSError, json.JSONDecodeError) as error:
            msg = f"run folder '{path}' cannot be used: {error}"
            raise ConfigError(msg) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out; raises `ConfigError` where one is at work."""
        import fcntl

        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                msg = f"another groundscope is at work in '{self.path}': wait for it, or choose another name=…"
                raise ConfigError(msg) from error
            yield

    def receipt(self, folder: str) -> Receipt | None:
        """Return the receipt of a stage that finished, or None."""
        path = self.path / folder / RECEIPT
        if not path.is_file():
            return None
        try:
            return Receipt(**json.loads(path.read_text()))
        except (json.JSONDecodeError, TypeError):
            return None

    def holds(self, folder: str, receipt: Receipt) -> bool:
        """Say whether the files of a receipt are there, byte for byte."""
        root = self.path / folder
        return all((root / name).is_file() and file_digest(root / name) == sha for name, sha in receipt.files.items())

    def finish(self, stage: str, folder: str, key: str, work: Callable[[Path], str]) -> Receipt:
        """Do a stage's work in its folder and write its receipt."""
        root = self.path / folder
        root.mkdir(parents=True, exist_ok=True)
        # The old receipt goes first: a stage that is killed now has none, and runs again.
        (root / RECEIPT).unlink(missing_ok=True)
        begun = root / ".key"
        if not begun.exists() or begun.read_text() != key:
            # What lies here was made from something else; only work begun under the same key is resumed.
            for old in root.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            begun.write_text(key)
        start = time.perf_counter()
        summary = work(root)
        files = {
            str(p.relative_to(root)): file_digest(p)
            for p in sorted(root.rglob("*"))
            if p.is_file() and p.name != RECEIPT and not p.name.startswith(".")
        }
        receipt = Receipt(stage, key, files, round(time.perf_counter() - start, 2), summary)
        write_json(root / RECEIPT, vars(receipt))
        return receipt
