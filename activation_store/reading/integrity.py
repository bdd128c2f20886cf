"""Verify every byte of a store, and list the examples that damage affects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from activation_store.format.folder_checks import read_sealed
from activation_store.format.hdf5_safety import Outcome, examine_in_child
from activation_store.format.manifest import DamagedManifestError, Manifest, ShardEntry, read_manifest
from activation_store.format.model_tensors import damaged_tensors
from activation_store.format.schema import INDEX, MANIFEST, TENSORS, shard_numbers
from activation_store.format.seal import changed_blocks, read_seal, seal_digest, structure_is_whole
from activation_store.format.shard import (
    LAST_UNSEALED,
    SHARD_KIND,
    Damage,
    find_damage,
    open_shard,
    read_ids,
    reading,
    rebuild_advice,
)
from groundscope.core.errors import StoreError
from groundscope.core.files import DamagedFileError, file_digest, system_reason
from groundscope.core.progress import step_bar
from groundscope.core.short_repr import short_repr
from groundscope.core.text import format_count


@dataclass(frozen=True)
class Problem:
    """A problem of a store."""

    file: str
    kind: Literal["missing", "damaged", "unfinished", "duplicate"]
    message: str
    """The problem and its fix."""
    examples: tuple[str, ...] = ()
    """Ids of the affected examples, as far as they can be determined."""


@dataclass(frozen=True)
class IntegrityReport:
    """The result of a verification.

    Examples
    --------
    >>> from activation_store import IntegrityReport
    >>> report = IntegrityReport("activations", complete=True, shards=1, rows=512, problems=())
    >>> print(report)
    activations: intact: 512 examples in 1 shard, every byte verified
    """

    path: str
    complete: bool
    """Whether a manifest lists exactly the shards in the folder."""
    shards: int
    """Number of sealed shards that were checked."""
    rows: int
    """Number of undamaged examples."""
    problems: tuple[Problem, ...]

    __repr__ = short_repr

    @property
    def ok(self) -> bool:
        """Whether there is no problem: the store is complete and every byte unchanged."""
        return not self.problems

    @property
    def affected(self) -> tuple[str, ...]:
        """Ids of all affected examples, without repeats."""
        return tuple(dict.fromkeys(name for p in self.problems for name in p.examples))

    def __str__(self) -> str:
        if self.ok:
            return (
                f"{self.path}: intact: {format_count(self.rows, 'example')} in {format_count(self.shards, 'shard')}, "
                "every byte verified"
            )
        lines = [
            f"{self.path}: {format_count(len(self.problems), 'problem')}, {format_count(len(self.affected), 'example')} affected"
        ]
        for p in self.problems:
            names = f" (examples {_shortened(p.examples)})" if p.examples else ""
            lines.append(f"  {p.kind}: {p.message}{names}")
        return "\n".join(lines)


def verify(path: str | Path, *, progress: bool | None = None) -> IntegrityReport:
    """Read a whole store and compare every file with its digests.

    Every byte is verified before HDF5 parses the file, so that damage cannot hang or crash this process. If only blocks of
    values changed, only the examples in these blocks are reported. Files of layout versions 1 and 2, whose digests need
    HDF5, are read in a child process with limits on time and memory; if no manifest lists such a shard, only its
    own digests are checked: they cover the values of arrays and columns, not names and attributes.

    Parameters
    ----------
    path
        Folder of the store, finished or not.
    progress
        Whether to show a progress bar; by default only on a terminal.

    Raises
    ------
    StoreError
        If there is no store to verify, it has a newer layout version, or a file cannot be read (too many open
        files, no permission): that is not damage.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from activation_store import ArrayInfo, Schema, StoreWriter, verify
    >>> info = ArrayInfo("decoder", "resid_post", "last", n_layers=2, width=3)
    >>> table = {"id": ["a", "b"], "group": ["image1", "image2"], "question": ["Is it a cat?"] * 2}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with StoreWriter(folder, Schema((info,)), {"model": "example"}) as writer:
    ...         writer.append({info.key: np.ones((2, 2, 3), np.float32)}, {**table, "object:cat": [1, 0]})
    ...     verify(folder).ok
    True
    """
    try:
        return _verify(Path(path), progress)
    except OSError as error:
        msg = f"{error.filename or path}: cannot be read: {system_reason(error)}"
        raise StoreError(msg) from error


def _verify(folder: Path, progress: bool | None) -> IntegrityReport:
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    shards = {name for name in names if shard_numbers(name)}
    if not shards and MANIFEST not in names:
        msg = f"no activation store at {folder}: it has neither {MANIFEST} nor sealed shards"
        raise StoreError(msg)
    problems: list[Problem] = []
    parts = [_manifest(folder / name, problems) for name in sorted(names) if _is_manifest(name)]
    manifest = next((m for name, m in parts if name == MANIFEST), None)
    listed = {e.file: e for _, m in parts if m is not None for e in m.shards}
    rows = 0
    records = read_sealed(folder)
    total = sorted(shards | listed.keys(), key=lambda name: shard_numbers(name) or (0, 0))
    outcomes = _without_seal(folder, [name for name in total if name in shards], listed)
    ids: dict[str, tuple[str, ...]] = {}
    with step_bar("verifying", len(total), show=progress) as advance:
        for name in total:
            entry = listed.get(name)
            problem, shard_ids = _check_shard(
                folder / name, entry, outcomes.get(name), records.get(name) if entry is None else None
            )
            rows += len(shard_ids) - len(set(problem.examples) & set(shard_ids) if problem else ())
            ids[name] = shard_ids
            if problem:
                problems.append(problem)
            advance()
    problems.extend(_duplicates(ids))
    problems.extend(_check_tensors(folder, manifest))
    problems.extend(_check_index(folder, manifest))
    complete = manifest is not None and {e.file for e in manifest.shards} == shards
    if MANIFEST not in names:
        text = f"{MANIFEST} is missing: the run has not finished; run it again to the end"
        problems.append(Problem(MANIFEST, "unfinished", text))
    elif manifest is not None:
        for name in sorted(shards - {e.file for e in manifest.shards}):
            text = f"{name} is newer than the manifest: a later run has not finished; run it again to the end"
            problems.append(Problem(name, "unfinished", text))
    for name in sorted(names):
        if name.endswith(".part"):
            text = f"{name} was not sealed: its run is in progress or was killed; run it again to replace the file"
            problems.append(Problem(name, "unfinished", text))
    return IntegrityReport(str(folder), complete, len(shards), rows, tuple(problems))


def _is_manifest(name: str) -> bool:
    return name.startswith("manifest") and name.endswith(".json")


def _manifest(path: Path, problems: list[Problem]) -> tuple[str, Manifest | None]:
    try:
        return path.name, read_manifest(path)
    except DamagedManifestError as error:
        problems.append(Problem(path.name, "damaged", str(error)))
        return path.name, None


def _without_seal(folder: Path, names: list[str], listed: dict[str, ShardEntry]) -> dict[str, Outcome]:
    """Examine the shards of layout versions without a seal in one child process."""
    paths = [folder / name for name in names if name not in listed or listed[name].version <= LAST_UNSEALED]
    paths = [path for path in paths if seal_digest(path) is None]
    return {
        path.name: outcome for path, outcome in zip(paths, examine_in_child("inspect", paths, SHARD_KIND), strict=True)
    }


def _check_shard(
    path: Path, entry: ShardEntry | None, outcome: Outcome | None, record: str | None
) -> tuple[Problem | None, tuple[str, ...]]:
    """Return the problem of a shard, or None, and its example ids as far as they can be read.

    `outcome` is the result of a child process for a file without a seal, `record` the digest that an unfinished run recorded.
    """
    ids = entry.examples if entry else ()
    if not path.exists():
        text = f"{path.name} is missing; run the same trace again: sealed shards are kept, only its examples are traced"
        return Problem(path.name, "missing", text, ids), ids
    size = path.stat().st_size
    if entry is not None and size != entry.bytes:
        what = f"is truncated or replaced: {size} bytes instead of {entry.bytes}"
        return _damaged(path, what, ids), ids
    if outcome is not None:
        return _check_unsealed(path, entry, outcome)
    try:
        seal = read_seal(path)
    except DamagedFileError as error:
        return _damaged(path, f"has changed bytes in its seal ({error})", ids), ids
    if seal is None:
        return _damaged(path, "has changed bytes in its seal", ids), ids
    expected = entry.sha256 if entry else record
    if expected is not None and seal.digest != expected:
        return _damaged(path, "is not the shard that this store sealed under its name", ids), ids
    if not structure_is_whole(path, seal):
        return _damaged(path, "has changed bytes in its structure or its table of examples", ids), ids
    changed = changed_blocks(path, seal)
    if entry is not None and not changed:
        return None, ids
    # The structure is intact, so HDF5 can parse it to find the rows of the changed blocks.
    with open_shard(path) as file, reading(path):
        ids = read_ids(file)
        damage = find_damage(path, file) if changed else []
    if not changed:
        return None, ids
    return _damaged(path, _changed_in(damage), _examples(ids, damage)), ids


def _check_unsealed(path: Path, entry: ShardEntry | None, outcome: Outcome) -> tuple[Problem | None, tuple[str, ...]]:
    """Return the problem and the examples of a file of version 1 or 2, from the outcome of a child process."""
    ids = entry.examples if entry else ()
    if outcome.problem is not None:
        if not outcome.damaged:
            raise StoreError(outcome.problem)
        return _damaged(path, f"is {outcome.problem.removeprefix(f'{path}: ')}", ids), ids
    details = outcome.details or {}
    damage = [Damage(d["what"], None if d["rows"] is None else tuple(d["rows"])) for d in details["damage"]]
    if entry is None:
        if damage:
            return _damaged(path, _changed_in(damage), ()), ()
        return None, tuple(details["entry"]["examples"])
    digest = outcome.digest or file_digest(path)  # version 1 records the digest of the whole file
    if digest == entry.sha256 and not damage:
        return None, ids
    affected = _examples(ids, damage) if outcome.digest == entry.sha256 else ids
    return _damaged(path, _changed_in(damage), affected), ids


def _damaged(path: Path, what: str, examples: tuple[str, ...]) -> Problem:
    return Problem(path.name, "damaged", f"{path.name} {what}; {rebuild_advice(path.name)}", examples)


def _changed_in(damage: list[Damage]) -> str:
    where = ", ".join(d.what for d in damage) or "its metadata, not its values"
    return f"has changed bytes in {where}"


def _examples(ids: tuple[str, ...], damage: list[Damage]) -> tuple[str, ...]:
    """Return the examples whose rows are in damaged elements."""
    rows = sorted({row for d in damage for row in (range(len(ids)) if d.rows is None else d.rows)})
    return tuple(ids[row] for row in rows)


def _duplicates(ids: dict[str, tuple[str, ...]]) -> list[Problem]:
    """Return a problem for each shard that repeats examples of an earlier one."""
    out, where = [], {}
    for shard, names in ids.items():
        repeated = tuple(name for name in names if name in where)
        if repeated:
            text = (
                f"{shard} repeats the example '{repeated[0]}' of {where[repeated[0]]}: "
                f"one of the two shards is a copy or from another store; remove it and run the same trace again"
            )
            out.append(Problem(shard, "duplicate", text, repeated))
        where.update(dict.fromkeys(names, shard))
    return out


def _check_index(folder: Path, manifest: Manifest | None) -> list[Problem]:
    entry, path = manifest.index if manifest else None, folder / INDEX
    if entry is None:
        return []
    advice = "run the same trace again to rewrite it; no other data depends on it"
    if not path.exists():
        return [Problem(INDEX, "missing", f"{INDEX} is missing: {advice}")]
    if path.stat().st_size != entry.bytes or file_digest(path) != entry.sha256:
        return [Problem(INDEX, "damaged", f"{INDEX} has changed bytes: {advice}")]
    return []


def _check_tensors(folder: Path, manifest: Manifest | None) -> list[Problem]:
    path = folder / TENSORS
    entry = manifest.tensors if manifest else None
    if not path.exists():
        if entry is None:
            return []
        text = f"{TENSORS} is missing (it held {', '.join(entry.names)}); run the same trace again"
        return [Problem(TENSORS, "missing", text)]
    advice = f"delete {TENSORS} and run the same trace again"
    if entry is not None:
        whole = path.stat().st_size == entry.bytes and file_digest(path) == entry.sha256
        return [] if whole else [Problem(TENSORS, "damaged", f"{TENSORS} has changed bytes; {advice}")]
    try:
        names = damaged_tensors(folder)
    except DamagedFileError as error:
        return [Problem(TENSORS, "damaged", str(error))]
    return [Problem(TENSORS, "damaged", f"{TENSORS}: {', '.join(names)} changed; {advice}")] if names else []


def _shortened(names: tuple[str, ...], most: int = 6) -> str:
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])}, … {names[-1]}: {len(names)} in total"
