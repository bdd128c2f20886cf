"""The folder of a run: the files of each stage, with a receipt that says what they were made from.

A finished stage has a receipt ``<folder>/stage.json`` with its key (a digest of its options, its inputs and the packages that
computed it), its environment, the SHA-256 of every file it wrote, and a digest of the receipt itself. The stage is skipped if
its key and its files are unchanged.

A folder may come from another person. Names in a receipt must be plain names below its folder, links are refused and never
followed, and only files that the stage wrote are ever removed.
"""

from __future__ import annotations

import fnmatch
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
from groundscope.core.document_digest import KEY, document_digest, take_digest, value_digest
from groundscope.core.errors import ConfigError
from groundscope.core.files import file_digest, write_text
from groundscope.core.locks import lock
from groundscope.core.paths import below, create_part, files_below, is_file, is_link, name_problem
from groundscope.core.user_files import read_text

__all__ = ["file_digest", "write_text"]


class Stopped(KeyboardInterrupt):
    """The user stopped a run; the argument is the folder for `groundscope resume=`."""


LAYOUT = 1
"""Version of the layout of run folders; folders of other versions are refused."""
MARKER = "run.json"
"""File that marks a folder as a run."""
RECEIPT = "stage.json"
FAILED = ".failed.json"
"""File with the error of a stage that failed, until it starts again."""
STARTED = ".key"
"""File with the key of a stage that was started."""
ILLUSTRATIONS = "illustrations/"
"""Folder, inside that of a stage, of what only the report shows."""
SHARDS = ".shards"
"""File with the number of parts of a trace that was started."""
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
"""Packages whose versions are part of the key of every stage."""
PLUGINS = "groundscope."
"""Prefix of the entry-point groups of plug-ins; their distributions are part of the key of every stage."""
OWN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "examples": ("discovery.json*", "held_out.json*"),
        "activations": ("*.h5", "manifest*.json", ".*.lock", ".lock"),
        "probes": ("plan.json", "left_out.json", "classes.json", "*@*/*"),
        "circuits": ("top.json", "*.safetensors", "controls/*", "illustrations/*"),
        "steering": ("sweep.json", "vector.safetensors", "exportable.safetensors", "control-*.safetensors"),
        "behavior": (
            "rates.json",
            "changes.json",
            "scores.json",
            "before.json",
            "after.json",
            "exportable.json",
            "guards.json",
            "twin.json",
            "random-direction.json",
            "shuffled-labels.json",
            "moved-to-other-heads.json",
            "derived-at-other-heads.json",
            "illustrations/*",
        ),
        "diagnosis": ("diagnoses.json", "left_out.json", "illustrations/*"),
        "representation": ("representation.json", "ceilings.safetensors", "information-*.safetensors"),
        "export": (
            "formats.json",
            "vector.*",
            "exportable.*",
            "baked.*",
            "*.pt",
            "*.pt.json",
            "README.md",
            "apply_*.py",
        ),
        "arena": ("arena.*", "pareto.svg", "chosen.json", "answers/*.json"),
        "card": ("card.*", "card_answers.csv", "asked/*", "asked/*/*"),
        "report": ("sections.json",),
    }
)
"""Folder of a stage to patterns of the files that it writes, which an interrupted stage may leave."""
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


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically; make the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def environment(threads: int | None = None) -> dict[str, Any]:
    """Return packages, plug-ins and machine; `threads` is the number of CPU threads that compute."""
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
    """Return the versions of the packages and plug-ins that compute results, which are part of the key of every stage."""
    return {"packages": {name: _installed(name) for name in _COMPUTING}, "plugins": plugins()}


@cache
def plugins() -> tuple[str, ...]:
    """Return ``group:name=value distribution version`` of every entry point of a plug-in."""
    points = {
        f"{point.group}:{point.name}={point.value} {owner.name} {owner.version}"
        for owner in distributions()
        for point in owner.entry_points
        if point.group.startswith(PLUGINS)
    }
    return tuple(sorted(points))


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Receipt:
    """The record of a finished stage."""

    stage: str
    key: str
    files: Mapping[str, str]
    """Path inside the stage's folder to SHA-256."""
    seconds: float
    summary: str
    """The result in one line."""
    stamps: Mapping[str, list[int]] = field(default_factory=dict)
    """Path to size and modification time; a file with the same two is not digested again."""
    origin: str = ""
    """Folder of the run that it was taken from; empty if it was made here."""
    outside: Mapping[str, str] = field(default_factory=dict)
    """Name to SHA-256 of files that the stage wrote into the folder of the run."""
    basis: str = ""
    """Digest of options, inputs and version of the stage, without packages."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Stage to the digest of its files from which this stage was made."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Packages, machine and threads."""

    @property
    def digest(self) -> str:
        """Digest of the files of results, on which later stages depend; illustrations are for the report only."""
        return value_digest({name: sha for name, sha in self.files.items() if not name.startswith(ILLUSTRATIONS)})

    @property
    def full_digest(self) -> str:
        """Digest of all files, on which the report depends."""
        return value_digest(dict(self.files))

    def holds(self, root: Path) -> bool:
        """Return whether all files are unchanged."""
        return not self.broken(root) and not self.missing(root)

    def broken(self, root: Path) -> list[str]:
        """Return the files in the folder of the stage that are missing or changed."""
        return [name for name, sha in self.files.items() if not self._same(root / name, name, sha)]

    def missing(self, root: Path) -> list[str]:
        """Return the files in the folder of the run that are missing or changed."""
        return [n for n, sha in self.outside.items() if not self._same(root.parent / n, f"../{n}", sha)]

    def _same(self, path: Path, name: str, sha: str) -> bool:
        return is_file(path) and (stamp(path) == self.stamps.get(name) or file_digest(path) == sha)


def stamp(path: Path) -> list[int]:
    """Return size in bytes and modification time in nanoseconds of a file."""
    about = path.lstat()
    return [about.st_size, about.st_mtime_ns]


def write_receipt(root: Path, receipt: Receipt) -> None:
    """Write the receipt of a stage into its folder, with a digest of the receipt."""
    record = json.loads(json.dumps(vars(receipt), default=str))
    write_json(root / RECEIPT, {**record, KEY: document_digest(record)})


def read_receipt(root: Path) -> Receipt | None:
    """Return the receipt in the folder of a stage; None if the stage has not finished.

    Raises
    ------
    ConfigError
        If the receipt is unreadable, damaged or of a newer release, or names files that are not below its folder.
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
        msg = f"{error}; to run the stage again, delete that file"
        raise ConfigError(msg) from error
    unknown = sorted(set(record) - {f.name for f in fields(Receipt)} - {KEY})
    if unknown:
        msg = (
            f"{path}: field '{unknown[0]}' is of a newer release: use that release, or choose another run name, name=…"
        )
        raise ConfigError(msg)
    for name in record["files"]:
        below(root, name, source=path, error=ConfigError)
    wrong = next((n for n in record.get("outside") or {} if name_problem(n) or "/" in n), None)
    if wrong is not None:
        msg = f"{path}: {wrong!r} is not the plain name of a file of the run"
        raise ConfigError(msg)
    sums = [*record["files"].values(), *(record.get("outside") or {}).values()]
    if not all(_SHA.fullmatch(sha) for sha in sums):
        msg = f"{path}: not every file has a SHA-256; to run the stage again, delete that file"
        raise ConfigError(msg)
    try:
        # Receipts without a basis are of earlier releases, which wrote no digest.
        take_digest(record, str(path), ConfigError, required=bool(record.get("basis")))
    except ConfigError as error:
        msg = f"{error}; to run the stage again, delete that file"
        raise ConfigError(msg) from None
    return Receipt(**{name: value for name, value in record.items() if value is not None})


class RunFolder:
    """The folder of one run. One process at a time may use it, or several that trace a part each.

    Parameters
    ----------
    path
        The folder; made if it is missing.
    root
        Folder of all runs, which must contain `path`. No part of the path below it may be a link, and a folder with other
        files is refused. None if the caller guarantees that the folder may be used.

    Raises
    ------
    ConfigError
        If the folder cannot be written, contains other files or another run, is inside another run, or has another layout
        version.
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
        """Lock the folder; raise `ConfigError` if another process has the lock. Several processes may have a `shared` lock."""
        return lock(
            self.path / ".lock",
            shared=shared,
            refuse=lambda who: (
                f"another groundscope process is running in '{self.path}' ({who}): "
                "wait for it, or choose another run name, name=…"
            ),
        )

    def receipt(self, folder: str) -> Receipt | None:
        """Return the receipt of a stage that finished, or None; raises as `read_receipt`."""
        return read_receipt(self.path / folder)

    def holds(self, folder: str, receipt: Receipt) -> bool:
        """Return whether the files of a receipt are unchanged."""
        return receipt.holds(self.path / folder)

    def finish(
        self,
        stage: str,
        folder: str,
        key: str,
        work: Callable[[Path], str],
        *,
        clear: bool = False,
        about: Mapping[str, Any] | None = None,
        outside: Iterable[str] = (),
    ) -> Receipt:
        """Run a stage in its folder and write its receipt; `clear` first removes the files of earlier work."""
        root = self.begin(folder, key, clear=clear)
        start = time.perf_counter()
        return self.seal(stage, folder, key, work(root), time.perf_counter() - start, about=about, outside=outside)

    def begin(self, folder: str, key: str, *, clear: bool = False) -> Path:
        """Prepare the folder of a stage; keep the files of interrupted work with the same key unless `clear`.

        Raises
        ------
        ConfigError
            If the folder or an entry of it is a link or not a regular file, if files must be removed that the stage did not
            write, or if the receipt cannot be used.
        """
        root = below(self.path, folder, error=ConfigError)
        root.mkdir(parents=True, exist_ok=True)
        before = read_receipt(root)
        names = _regular_files(root)
        foreign = {n for n in names if not _own(folder, n, before)}
        same = not clear and started_key(root) == key
        if not same and foreign:
            where = root / min(foreign)
            msg = (
                f"'{where}' was not written by this stage, and the folder must be cleared: "
                "move that file away, or choose another run name, name=…"
            )
            raise ConfigError(msg)
        # The receipt is removed first: a stage that is killed from here on has none, and runs again.
        (root / RECEIPT).unlink(missing_ok=True)
        (root / FAILED).unlink(missing_ok=True)
        if not same:
            # Earlier files have another key; only work with the same key is resumed.
            for name in names:
                (root / name).unlink(missing_ok=True)
            _remove_empty(root)
            write_text(root / STARTED, key)
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
        """Record that a stage failed."""
        about = {"error": f"{type(error).__name__}: {error}", "when": time.strftime("%Y-%m-%d %H:%M:%S")}
        root = below(self.path, folder, error=ConfigError)
        if root.is_dir():
            write_json(root / FAILED, about)


def check_layout(path: Path) -> None:
    """Raise `ConfigError` if a folder is not a run, or a run of another layout version."""
    try:
        layout = read_record(path / MARKER, {"layout": ANY}, limit=1 << 16)["layout"]
    except ConfigError as error:
        msg = f"run folder '{path}' cannot be used: {error}; choose another (root=…, name=…)"
        raise ConfigError(msg) from error
    if layout != LAYOUT or isinstance(layout, bool):
        msg = (
            f"run folder '{path}' has layout {layout}, and this release supports {LAYOUT}: "
            "choose another run name, name=…, or use the release that made it"
        )
        raise ConfigError(msg)


def started_key(root: Path) -> str:
    """Return the key with which the stage in a folder was started; empty if it was not started."""
    path = root / STARTED
    try:
        return read_text(path, limit=1 << 12, error=ConfigError) if is_file(path) else ""
    except (OSError, ConfigError):
        return ""


def _check_place(path: Path, *, owned: bool) -> None:
    """Raise `ConfigError` if a folder is inside a run, contains a run or, unless `owned`, contains other files."""
    for above in path.absolute().parents:
        if is_file(above / MARKER) and _is_run(above):
            msg = f"'{path}' is inside the run '{above}': choose another run name, name=…"
            raise ConfigError(msg)
    if not path.is_dir() or is_file(path / MARKER):
        inner = _inner_run(path) if path.is_dir() else None
    else:
        # Hidden files may be locks or an unfinished marker.
        others = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith("."))
        inner = _inner_run(path)
        if others and inner is None and not owned:
            what = " (a symbolic link)" if is_link(path / others[0]) else ""
            msg = f"'{path}' is not a run and contains '{others[0]}'{what}: choose another run name, name=…, or an empty folder"
            raise ConfigError(msg)
    if inner is not None:
        msg = f"'{path}' contains the run '{inner}': choose another run name, name=…"
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
    """Return the files in the folder of a stage; raise `ConfigError` for a link or another entry that is not a regular file."""
    names = []
    for name, about in files_below(root):
        if not stat.S_ISREG(about.st_mode):
            what = "a symbolic link" if stat.S_ISLNK(about.st_mode) else "not a regular file"
            msg = f"'{root / name}' is {what}: replace it by the file itself, or remove it"
            raise ConfigError(msg)
        names.append(name)
    return names


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _own(folder: str, name: str, receipt: Receipt | None) -> bool:
    """Return whether a stage wrote a file: its receipt names it, or it is a file that an interrupted stage may leave."""
    if name in {RECEIPT, FAILED, STARTED, SHARDS} or _PART.fullmatch(name):
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
    """Replace hard links to files of other runs by copies, before the stage may write into them."""
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
