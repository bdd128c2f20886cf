"""The folder of a run: what each stage made, from what, and whether it is still there.

A stage leaves a receipt ``<folder>/stage.json`` with its key (a digest of its options, its inputs and the packages that
computed it), the environment it was made in, the SHA-256 of every file it wrote, and a digest of all this. It is skipped when
the key is unchanged and the files are what the receipt says.

A folder may come from somewhere else. Names in a receipt are plain names below its folder, links are refused and never
followed, and only files that the stage wrote are ever removed.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from experiments.records import ANY, INTEGER, NUMBER, TEXT, Optional, read_record
from groundscope.core.document_digest import KEY, document_digest, take_digest
from groundscope.core.errors import ConfigError
from groundscope.core.files import file_digest, write_text
from groundscope.core.locks import lock
from groundscope.core.paths import below, create_part, files_below, is_file, is_link, name_problem
from groundscope.core.user_files import read_text

__all__ = ["file_digest", "write_text"]


class Stopped(KeyboardInterrupt):
    """The user stopped a run; its argument is the folder that `groundscope resume=` continues."""


LAYOUT = 1
"""Version of the run folder; a folder of another version is refused."""
MARKER = "run.json"
"""The file by which a folder is a run."""
RECEIPT = "stage.json"
FAILED = ".failed.json"
"""What a stage that ended in an error leaves, until it begins again."""
BEGUN = ".key"
"""The key under which a stage was begun."""
SHARDS = ".shards"
"""In how many parts a trace was begun."""
_PACKAGES = (
    "groundscope",
    "torch",
    "transformers",
    "nnsight",
    "transformer-lens",
    "scikit-learn",
    "numpy",
    "h5py",
    "pillow",
)
_COMPUTING = ("groundscope", "torch", "transformers", "nnsight", "scikit-learn", "numpy", "pillow")
"""Packages whose versions are part of every stage's key."""
PLUGINS = "groundscope."
"""Groups of entry points that begin so add to the project's tables; their distributions are part of every stage's key."""
OWN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "examples": ("discovery.json*", "held_out.json*"),
        "activations": ("*.h5", "manifest*.json", ".*.lock", ".lock"),
        "probes": ("plan.json", "left_out.json", "*@*/*"),
        "circuits": ("top.json", "*.safetensors", "illustrations/*"),
        "steering": ("sweep.json", "vector.safetensors", "control-*.safetensors"),
        "behavior": (
            "rates.json",
            "changes.json",
            "before.json",
            "after.json",
            "twin.json",
            "random-direction.json",
            "shuffled-labels.json",
            "moved-to-other-heads.json",
            "derived-at-other-heads.json",
            "illustrations/*",
        ),
        "diagnosis": ("diagnoses.json", "left_out.json", "illustrations/*"),
        "export": ("formats.json", "vector.*", "baked.*", "*.pt", "*.pt.json"),
        "report": ("sections.json",),
    }
)
"""Folder of a stage to patterns of the files that it writes: what a stage that was interrupted may have left there."""
_RECEIPT_SHAPE = {
    "stage": TEXT,
    "key": TEXT,
    "files": {"*": TEXT},
    "seconds": NUMBER,
    "summary": TEXT,
    "stamps": Optional({"*": (INTEGER, INTEGER)}),
    "origin": Optional(TEXT),
    "outside": Optional({"*": TEXT}),
    "basis": Optional(TEXT),
    "inputs": Optional({"*": TEXT}),
    "environment": Optional({"*": ANY}),
}
_PART = re.compile(r".*\.\d+(-[0-9a-f]{16})?\.part", re.DOTALL)
_SHA = re.compile(r"[0-9a-f]{64}")


def digest(value: object) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON by `write_text`, into a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def environment(threads: int | None = None) -> dict[str, Any]:
    """Return what the run depends on besides its options; `threads` is the number of CPU threads that computed it."""
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "packages": {name: _installed(name) for name in _PACKAGES},
        "plugins": plugins(),
    }


def computing() -> dict[str, Any]:
    """Return the versions of the packages and plug-ins that compute results: part of every stage's key."""
    return {"packages": {name: _installed(name) for name in _COMPUTING}, "plugins": plugins()}


@cache
def plugins() -> tuple[str, ...]:
    """Return ``group:name=value distribution version`` of every entry point that adds to the project's tables."""
    found = {
        f"{point.group}:{point.name}={point.value} {owner.name} {owner.version}"
        for owner in distributions()
        for point in owner.entry_points
        if point.group.startswith(PLUGINS)
    }
    return tuple(sorted(found))


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
    outside: Mapping[str, str] = field(default_factory=dict)
    """Files that the stage wrote into the run's own folder, by name, to SHA-256."""
    basis: str = ""
    """Digest of what it was made from, without the packages: options, inputs, version of the stage."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Stage to the digest of its files that this one was made from."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Packages, machine and threads it was made with."""

    @property
    def digest(self) -> str:
        """What later stages depend on: the digest of everything this stage made."""
        return digest(dict(self.files))

    def holds(self, root: Path) -> bool:
        """Say whether the files are in a folder, byte for byte."""
        return not self.broken(root) and not self.missing(root)

    def broken(self, root: Path) -> list[str]:
        """Return the files of the folder that are missing, or not as they were made."""
        return [name for name, sha in self.files.items() if not self._same(root / name, name, sha)]

    def missing(self, root: Path) -> list[str]:
        """Return the files outside the folder that are missing, or not as they were made."""
        return [n for n, sha in self.outside.items() if not self._same(root.parent / n, f"../{n}", sha)]

    def _same(self, path: Path, name: str, sha: str) -> bool:
        return is_file(path) and (stamp(path) == self.stamps.get(name) or file_digest(path) == sha)


def stamp(path: Path) -> list[int]:
    """Return a file's size in bytes and its time of change in nanoseconds."""
    about = path.lstat()
    return [about.st_size, about.st_mtime_ns]


def write_receipt(root: Path, receipt: Receipt) -> None:
    """Write the receipt of a stage's folder, with a digest of its content."""
    record = json.loads(json.dumps(vars(receipt), default=str))
    write_json(root / RECEIPT, {**record, KEY: document_digest(record)})


def read_receipt(root: Path) -> Receipt | None:
    """Return the receipt of a stage's folder, or None where it has not finished.

    Raises
    ------
    ConfigError
        Where there is a receipt that cannot be used: it is unreadable, damaged or of a newer release, or names files that are
        not below its folder.
    """
    path = root / RECEIPT
    if is_link(root) or is_link(path):
        below(root.parent, f"{root.name}/{RECEIPT}", error=ConfigError)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ConfigError(msg) from error
    try:
        record = read_record(path, _RECEIPT_SHAPE)
    except ConfigError as error:
        msg = f"{error}; to make the stage again delete that file"
        raise ConfigError(msg) from error
    unknown = sorted(set(record) - {f.name for f in fields(Receipt)} - {KEY})
    if unknown:
        msg = f"{path}: field '{unknown[0]}' is of a newer release: use that release, or choose another name=…"
        raise ConfigError(msg)
    for name in record["files"]:
        below(root, name, source=path, error=ConfigError)
    wrong = next((n for n in record.get("outside") or {} if name_problem(n) or "/" in n), None)
    if wrong is not None:
        msg = f"{path}: {wrong!r} is not the plain name of a file of the run"
        raise ConfigError(msg)
    sums = [*record["files"].values(), *(record.get("outside") or {}).values()]
    if not all(_SHA.fullmatch(sha) for sha in sums):
        msg = f"{path}: not every file has a SHA-256; to make the stage again delete that file"
        raise ConfigError(msg)
    try:
        # Receipts that have no basis are of earlier releases, which wrote no digest.
        take_digest(record, str(path), ConfigError, required=bool(record.get("basis")))
    except ConfigError as error:
        msg = f"{error}; to make the stage again delete that file"
        raise ConfigError(msg) from None
    return Receipt(**{name: value for name, value in record.items() if value is not None})


class RunFolder:
    """The folder of one run; held by one process at a time, or by several that trace a part each.

    Parameters
    ----------
    path
        The folder.
    root
        Folder of all runs, in which it must be; no part of the path below it may be a link, and a folder that holds files and
        no run is refused. Without it the caller owns the folder.

    Raises
    ------
    ConfigError
        Where the folder cannot be written, holds files but no run, is inside another run or holds one, belongs to another
        version, or another process works in it.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path = path
        self._foreign: dict[str, set[str]] = {}
        if root is not None:
            below(root, path.relative_to(root).as_posix(), error=ConfigError)
        try:
            _check_place(path, owned=root is None)
            path.mkdir(parents=True, exist_ok=True)
            marker = path / MARKER
            if not _exists(marker):
                write_json(marker, {"layout": LAYOUT})
                return
        except OSError as error:
            msg = f"run folder '{path}' cannot be used: {error}; choose another (root=…, name=…)"
            raise ConfigError(msg) from error
        check_layout(path)

    def lock(self, *, shared: bool = False) -> AbstractContextManager[None]:
        """Keep other processes out (with `shared`, those that do not share); `ConfigError` where one is at work."""
        return lock(
            self.path / ".lock",
            shared=shared,
            refuse=lambda who: (
                f"another groundscope is at work in '{self.path}' ({who}): wait for it, or choose another name=…"
            ),
        )

    def receipt(self, folder: str) -> Receipt | None:
        """Return the receipt of a stage that finished, or None; raises as `read_receipt`."""
        return read_receipt(self.path / folder)

    def holds(self, folder: str, receipt: Receipt) -> bool:
        """Say whether the files of a receipt are there, byte for byte."""
        return receipt.holds(self.path / folder)

    def finish(
        self,
        stage: str,
        folder: str,
        key: str,
        work: Callable[[Path], str],
        *,
        anew: bool = False,
        about: Mapping[str, Any] | None = None,
        outside: Iterable[str] = (),
    ) -> Receipt:
        """Do a stage's work in its folder and write its receipt; `anew` removes first what the stage left before."""
        root = self.begin(folder, key, anew=anew)
        start = time.perf_counter()
        return self.seal(stage, folder, key, work(root), time.perf_counter() - start, about=about, outside=outside)

    def begin(self, folder: str, key: str, *, anew: bool = False) -> Path:
        """Make a stage's folder ready for work, with what earlier work under the same key left.

        Raises
        ------
        ConfigError
            Where the folder, or anything in it, is a link or no regular file; where files must be removed and one of them is
            not the stage's own; or where the receipt cannot be used.
        """
        root = below(self.path, folder, error=ConfigError)
        root.mkdir(parents=True, exist_ok=True)
        before = read_receipt(root)
        names = _regular_files(root)
        foreign = {n for n in names if not _own(folder, n, before)}
        same = not anew and begun_under(root) == key
        if not same and foreign:
            where = root / min(foreign)
            msg = (
                f"'{where}' was not written by this stage, whose folder must be cleared: "
                "move that file away, or choose another name=…"
            )
            raise ConfigError(msg)
        # The receipt goes first: a stage that is killed now has none, and runs again.
        (root / RECEIPT).unlink(missing_ok=True)
        (root / FAILED).unlink(missing_ok=True)
        if not same:
            # What the stage left was made from something else; only work begun under the same key is resumed.
            for name in names:
                (root / name).unlink(missing_ok=True)
            _remove_empty(root)
            write_text(root / BEGUN, key)
        elif before is not None:
            for name in before.broken(root):
                (root / name).unlink(missing_ok=True)
            _separate(root, names)
        self._foreign[folder] = foreign
        return root

    def seal(
        self,
        stage: str,
        folder: str,
        key: str,
        summary: str,
        seconds: float,
        *,
        about: Mapping[str, Any] | None = None,
        outside: Iterable[str] = (),
    ) -> Receipt:
        """Write the receipt of a stage whose work is done; `about` holds further fields of `Receipt`."""
        root = self.path / folder
        names = [n for n in _regular_files(root) if not _hidden(n) and n != RECEIPT]
        if folder in self._foreign:
            names = [n for n in names if n not in self._foreign[folder]]
        else:  # another process began the work: what it met there is not known
            names = [n for n in names if _matches(folder, n)]
        files = {name: file_digest(root / name) for name in names}
        stamps = {name: stamp(root / name) for name in names}
        beyond = {name: file_digest(self.path / name) for name in outside}
        stamps |= {f"../{name}": stamp(self.path / name) for name in beyond}
        more = {**(about or {}), "outside": beyond}
        receipt = Receipt(stage, key, files, round(seconds, 2), summary, stamps, **more)
        write_receipt(root, receipt)
        return receipt

    def fail(self, folder: str, error: BaseException) -> None:
        """Record that a stage ended in an error."""
        about = {"error": f"{type(error).__name__}: {error}", "when": time.strftime("%Y-%m-%d %H:%M:%S")}
        root = below(self.path, folder, error=ConfigError)
        if root.is_dir():
            write_json(root / FAILED, about)


def check_layout(path: Path) -> None:
    """Raise `ConfigError` where a run's folder is of another version, or its marker cannot be read."""
    try:
        found = read_record(path / MARKER, {"layout": ANY}, limit=1 << 16)["layout"]
    except ConfigError as error:
        msg = f"run folder '{path}' cannot be used: {error}; choose another (root=…, name=…)"
        raise ConfigError(msg) from error
    if found != LAYOUT or isinstance(found, bool):
        msg = (
            f"run folder '{path}' has layout {found}, this release writes {LAYOUT}: "
            "give the run another name (name=…), or use the release that made it"
        )
        raise ConfigError(msg)


def begun_under(root: Path) -> str:
    """Return the key under which a stage's folder was begun; empty where there is none."""
    path = root / BEGUN
    try:
        return read_text(path, limit=1 << 12, error=ConfigError) if is_file(path) else ""
    except (OSError, ConfigError):
        return ""


def _check_place(path: Path, *, owned: bool) -> None:
    """Raise `ConfigError` where a run would be inside another run, would hold one, or, unless `owned`, holds other files."""
    for above in path.absolute().parents:
        if is_file(above / MARKER) and _is_run(above):
            msg = f"'{path}' is inside the run '{above}': choose another name=…"
            raise ConfigError(msg)
    if not path.is_dir() or is_file(path / MARKER):
        inner = _inner_run(path) if path.is_dir() else None
    else:
        # Hidden files may be locks, or what is left of a marker that was not finished.
        others = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith("."))
        inner = _inner_run(path)
        if others and inner is None and not owned:
            what = " (a symbolic link)" if is_link(path / others[0]) else ""
            msg = f"'{path}' is no run and holds '{others[0]}'{what}: choose another name=…, or an empty folder"
            raise ConfigError(msg)
    if inner is not None:
        msg = f"'{path}' holds the run '{inner}': choose another name=…"
        raise ConfigError(msg)


def _is_run(folder: Path) -> bool:
    try:
        return "layout" in read_record(folder / MARKER, {"layout": ANY}, limit=1 << 16)
    except ConfigError:
        return False


def _inner_run(path: Path) -> Path | None:
    """Return a run inside a folder."""
    return next((path / n.removesuffix(f"/{MARKER}") for n, _ in files_below(path) if n.endswith(f"/{MARKER}")), None)


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _regular_files(root: Path) -> list[str]:
    """Return the files of a stage's folder; raises `ConfigError` for a link or anything else that is no regular file."""
    names = []
    for name, about in files_below(root):
        if not stat.S_ISREG(about.st_mode):
            what = "a symbolic link" if stat.S_ISLNK(about.st_mode) else "not a regular file"
            msg = f"'{root / name}' is {what}: put the file itself there, or remove it"
            raise ConfigError(msg)
        names.append(name)
    return names


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _own(folder: str, name: str, receipt: Receipt | None) -> bool:
    """Say whether a stage wrote a file: its receipt names it, or an interrupted stage of this kind may have left it."""
    if name in {RECEIPT, FAILED, BEGUN, SHARDS} or _PART.fullmatch(name):
        return True
    if receipt is not None:
        return name in receipt.files or (_hidden(name) and _matches(folder, name))
    return _matches(folder, name)


def _matches(folder: str, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in OWN.get(folder, ()))


def _remove_empty(root: Path) -> None:
    for path, _, _ in os.walk(root, topdown=False, followlinks=False):
        if path != str(root):
            with suppress(OSError):
                Path(path).rmdir()


def _separate(root: Path, names: Iterable[str]) -> None:
    """Copy files that other runs share, before work may write into them."""
    for path in (root / name for name in names):
        if is_file(path) and path.stat().st_nlink > 1:
            part, target = create_part(path)
            try:
                with target, path.open("rb") as source:
                    shutil.copyfileobj(source, target)
                shutil.copystat(path, part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
