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
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from groundscope.core.errors import ConfigError
from groundscope.core.locks import lock


class Stopped(KeyboardInterrupt):
    """The user stopped a run; its argument is the folder that `groundscope resume=` goes on with."""


LAYOUT = 1
"""Version of the run folder; a folder of another version is refused."""
RECEIPT = "stage.json"
FAILED = ".failed.json"
"""What a stage that ended in an error leaves, until it is begun again."""
_PACKAGES = ("groundscope", "torch", "transformers", "nnsight", "transformer-lens", "scikit-learn", "numpy", "h5py")


def digest(value: object) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file and rename it into place, so that a reader never sees half of it, whoever writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write JSON by `write_text`."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


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
    stamps: Mapping[str, list[int]] = field(default_factory=dict)
    """Path to size and time of change: a file that has both still is not digested again."""
    origin: str = ""
    """Folder of the run that it was taken from, where it was not made here."""

    @property
    def digest(self) -> str:
        """What later stages depend on: the digest of everything this stage made."""
        return digest(dict(self.files))

    def holds(self, root: Path) -> bool:
        """Say whether the files are in a folder, byte for byte."""
        return not self.broken(root)

    def broken(self, root: Path) -> list[str]:
        """Return the files that are not there, or not as they were made."""
        return [name for name, sha in self.files.items() if not self._same(root / name, name, sha)]

    def _same(self, path: Path, name: str, sha: str) -> bool:
        return path.is_file() and (stamp(path) == self.stamps.get(name) or file_digest(path) == sha)


def stamp(path: Path) -> list[int]:
    """Return a file's size in bytes and its time of change in nanoseconds."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def read_receipt(root: Path) -> Receipt | None:
    """Return the receipt of a stage's folder, or None where it has not finished."""
    try:
        return Receipt(**json.loads((root / RECEIPT).read_text()))
    except (OSError, json.JSONDecodeError, TypeError):
        return None


class RunFolder:
    """The folder of one run; held by one process at a time, or by several that trace a part each.

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
            msg = f"run folder '{path}' cannot be used: {error}; choose another (root=…, name=…)"
            raise ConfigError(msg) from error

    def lock(self, *, shared: bool = False) -> AbstractContextManager[None]:
        """Keep other processes out (with `shared`, those that do not say the same); `ConfigError` where one is at work."""
        return lock(
            self.path / ".lock",
            shared=shared,
            refuse=lambda who: (
                f"another groundscope is at work in '{self.path}' ({who}): wait for it, or choose another name=…"
            ),
        )

    def receipt(self, folder: str) -> Receipt | None:
        """Return the receipt of a stage that finished, or None."""
        return read_receipt(self.path / folder)

    def holds(self, folder: str, receipt: Receipt) -> bool:
        """Say whether the files of a receipt are there, byte for byte."""
        return receipt.holds(self.path / folder)

    def finish(self, stage: str, folder: str, key: str, work: Callable[[Path], str], *, anew: bool = False) -> Receipt:
        """Do a stage's work in its folder and write its receipt; with `anew`, without what lies there."""
        root = self.begin(folder, key, anew=anew)
        start = time.perf_counter()
        return self.seal(stage, folder, key, work(root), time.perf_counter() - start)

    def begin(self, folder: str, key: str, *, anew: bool = False) -> Path:
        """Make a stage's folder ready for work, with what earlier work under the same key left."""
        root = self.path / folder
        root.mkdir(parents=True, exist_ok=True)
        before = read_receipt(root)
        # The old receipt goes first: a stage that is killed now has none, and runs again.
        (root / RECEIPT).unlink(missing_ok=True)
        (root / FAILED).unlink(missing_ok=True)
        begun = root / ".key"
        if anew or not begun.exists() or begun.read_text() != key:
            # What lies here was made from something else; only work begun under the same key is resumed.
            for old in root.iterdir():
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            write_text(begun, key)
        elif before is not None:
            for name in before.broken(root):
                (root / name).unlink(missing_ok=True)
            _separate(root)
        return root

    def seal(self, stage: str, folder: str, key: str, summary: str, seconds: float) -> Receipt:
        """Write the receipt of a stage whose work is done."""
        root = self.path / folder
        paths = {
            str(p.relative_to(root)): p
            for p in sorted(root.rglob("*"))
            if p.is_file() and p.name != RECEIPT and not p.name.startswith(".")
        }
        files = {name: file_digest(p) for name, p in paths.items()}
        stamps = {name: stamp(p) for name, p in paths.items()}
        receipt = Receipt(stage, key, files, round(seconds, 2), summary, stamps)
        write_json(root / RECEIPT, vars(receipt))
        return receipt

    def fail(self, folder: str, error: BaseException) -> None:
        """Leave word of a stage that ended in an error."""
        about = {"error": f"{type(error).__name__}: {error}", "when": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(self.path / folder / FAILED, about)


def _separate(root: Path) -> None:
    """Give files that other runs share a copy of their own, before work may write into them."""
    for path in [p for p in root.rglob("*") if p.is_file() and p.stat().st_nlink > 1]:
        own = path.with_name(f".{path.name}.part")
        shutil.copy2(path, own)
        own.replace(path)
