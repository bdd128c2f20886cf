"""Whether every byte of a store is still what was sealed, and if not, which examples are affected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from activation_store.format.manifest import DamagedManifestError, Manifest, ShardEntry, read_manifest
from activation_store.format.model_tensors import damaged_tensors
from activation_store.format.schema import INDEX, MANIFEST, TENSORS, shard_numbers
from activation_store.format.shard import find_damage, inspect, open_shard, reading, rebuild_advice, shard_digest
from groundscope.core.errors import StoreError
from groundscope.core.files import file_digest


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a store."""

    file: str
    kind: Literal["missing", "damaged", "unfinished"]
    message: str
    """What is wrong and what to do."""
    examples: tuple[str, ...] = ()
    """Ids of the affected examples, as far as anything still knows them."""


@dataclass(frozen=True)
class Report:
    """What verification found."""

    path: str
    complete: bool
    """Whether a manifest lists just the shards that are there."""
    shards: int
    """Sealed shards that were checked."""
    rows: int
    """Examples in the shards found whole."""
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing at all is wrong: complete, and every byte as it was sealed."""
        return not self.problems

    @property
    def affected(self) -> tuple[str, ...]:
        """Ids of all affected examples, each once."""
        return tuple(dict.fromkeys(name for p in self.problems for name in p.examples))

    def __str__(self) -> str:
        if self.ok:
            return f"{self.path}: whole: {self.rows} examples in {self.shards} shards, every byte as it was sealed"
        lines = [f"{self.path}: {len(self.problems)} problems, {len(self.affected)} examples affected"]
        for p in self.problems:
            names = f" (examples {_shortened(p.examples)})" if p.examples else ""
            lines.append(f"  {p.kind}: {p.message}{names}")
        return "\n".join(lines)


def verify(path: str | Path, progress: Callable[[int, int], None] | None = None) -> Report:
    """Read a store through and compare every file with the digests taken when it was sealed.

    A shard that a manifest lists is checked to the last byte, and where blocks of its values changed, only the examples
    in these are named. One that none lists yet, in a run that has not finished, is checked by the digests inside it:
    every value of arrays and columns, but not the names and attributes around them.

    Parameters
    ----------
    path
        Folder of the store, finished or not.
    progress
        Called after each shard with the number checked and their total.

    Raises
    ------
    StoreError
        Where there is no store to verify, or it is of a newer layout version.
    """
    folder = Path(path)
    there = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    shards = {name for name in there if shard_numbers(name)}
    if not shards and MANIFEST not in there:
        msg = f"no activation store at {folder}: it has neither {MANIFEST} nor sealed shards"
        raise StoreError(msg)
    problems: list[Problem] = []
    parts = [_manifest(folder / name, problems) for name in sorted(there) if _is_manifest(name)]
    manifest = next((m for name, m in parts if name == MANIFEST), None)
    listed = {e.file: e for _, m in parts if m is not None for e in m.shards}
    rows = 0
    total = sorted(shards | listed.keys(), key=lambda name: shard_numbers(name) or (0, 0))
    for done, name in enumerate(total, start=1):
        problem, n = _check_shard(folder / name, listed.get(name))
        rows += n
        if problem:
            problems.append(problem)
        if progress:
            progress(done, len(total))
    problems.extend(_check_tensors(folder, manifest))
    problems.extend(_check_index(folder, manifest))
    complete = manifest is not None and {e.file for e in manifest.shards} == shards
    if MANIFEST not in there:
        text = f"{MANIFEST} is not there: the run has not finished; run it again to the end"
        problems.append(Problem(MANIFEST, "unfinished", text))
    elif manifest is not None:
        for name in sorted(shards - {e.file for e in manifest.shards}):
            text = f"{name} is newer than the manifest: a later run has not finished; run it again to the end"
            problems.append(Problem(name, "unfinished", text))
    for name in sorted(there):
        if name.endswith(".part"):
            text = f"{name} was not sealed: its run is at work or was killed; running it again replaces the file"
            problems.append(Problem(name, "unfinished", text))
    return Report(str(folder), complete, len(shards), rows, tuple(problems))


def _is_manifest(name: str) -> bool:
    return name.startswith("manifest") and name.endswith(".json")


def _manifest(path: Path, problems: list[Problem]) -> tuple[str, Manifest | None]:
    try:
        return path.name, read_manifest(path)
    except DamagedManifestError as error:
        problems.append(Problem(path.name, "damaged", str(error)))
        return path.name, None


def _check_shard(path: Path, entry: ShardEntry | None) -> tuple[Problem | None, int]:
    """Return what is wrong with a shard (None where nothing is) and its intact rows."""
    ids = entry.examples if entry else ()
    if not path.exists():
        text = f"{path.name} is missing; run the same trace again: sealed shards are kept, only its examples are traced"
        return Problem(path.name, "missing", text, ids), 0
    if entry is None:
        # Not in any manifest: the digests kept inside the shard say whether its values are as they were.
        try:
            return None, inspect(path).rows
        except StoreError as error:
            return Problem(path.name, "damaged", str(error)), 0
    size = path.stat().st_size
    if size != entry.bytes:
        text = (
            f"{path.name} is truncated or replaced: {size} bytes instead of {entry.bytes}; {rebuild_advice(path.name)}"
        )
        return Problem(path.name, "damaged", text, ids), 0
    try:
        with open_shard(path) as file, reading(path):
            intact = shard_digest(path, file) == entry.sha256
            if intact and entry.version == 1:
                return None, entry.rows
            damage = find_damage(path, file)
    except StoreError:
        text = f"{path.name} has changed bytes in its structure; {rebuild_advice(path.name)}"
        return Problem(path.name, "damaged", text, ids), 0
    if intact and not damage:
        return None, entry.rows
    where = ", ".join(d.what for d in damage) or "what describes its values, not in them"
    if intact:
        # Only blocks of values are not what they were, and it is known which rows these hold.
        rows = sorted({row for d in damage for row in (range(entry.rows) if d.rows is None else d.rows)})
        ids = tuple(ids[row] for row in rows)
    text = f"{path.name} has changed bytes in {where}; {rebuild_advice(path.name)}"
    return Problem(path.name, "damaged", text, ids), 0 if not intact else entry.rows - len(ids)


def _check_index(folder: Path, manifest: Manifest | None) -> list[Problem]:
    entry, path = manifest.index if manifest else None, folder / INDEX
    if entry is None:
        return []
    advice = "nothing else needs it; run the same trace again, it is written anew"
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
    except StoreError as error:
        return [Problem(TENSORS, "damaged", str(error))]
    return [Problem(TENSORS, "damaged", f"{TENSORS}: {', '.join(names)} changed; {advice}")] if names else []


def _shortened(names: tuple[str, ...], most: int = 6) -> str:
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])}, … {names[-1]}: {len(names)} in all"
