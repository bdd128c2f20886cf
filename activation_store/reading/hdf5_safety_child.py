"""The child process that parses HDF5 files without a seal before the parent does, within time and memory limits."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from activation_store.format.columns import read_columns
from activation_store.format.digests import arrays_in, blocks, structure_digest, values_of
from activation_store.format.hdf5 import group_at
from activation_store.format.mapped_file import MappedFile
from activation_store.format.model_tensors import KIND as TENSORS_KIND
from activation_store.format.model_tensors import damaged_in
from activation_store.format.shard import (
    LAST_UNSEALED,
    entry_of,
    find_damage,
    open_unscreened,
    read_ids,
    read_json,
    read_rows,
    reading,
    version_of,
)
from activation_store.reading.rows import ArrayReader
from groundscope.core.errors import StoreError
from groundscope.core.files import DamagedFileError, file_digest

try:
    import resource
except ImportError:  # not a Unix: the only limit is the parent's waiting time
    resource = None


def main() -> None:
    """Read a request from standard input; print one JSON line per file."""
    request = json.load(sys.stdin)
    print("ready", flush=True)
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for job in request["jobs"]:
        path = Path(job["path"])
        _limit(job["seconds"], request["memory"] + 4 * path.stat().st_size)
        print(json.dumps(_answer(request["task"], path, request["kind"])), flush=True)


def _limit(seconds: float, memory: int) -> None:
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        with Path("/proc/self/statm").open(encoding="ascii") as file:
            memory += int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (OSError, ValueError):
        return  # no /proc on this system, or a lower limit exists


def _answer(task: str, path: Path, kind: str) -> dict[str, Any]:
    """Return the fields of an `Outcome`."""
    try:
        with open_unscreened(path, kind) as file, reading(path):
            if kind == TENSORS_KIND:
                return {"problem": None, "details": {"changed": damaged_in(file)} if task == "inspect" else None}
            version = version_of(file)
            if version > LAST_UNSEALED:
                return {"problem": f"{path}: damaged or truncated, its seal is missing", "damaged": True}
            if task == "screen":
                _parse(path, file)
            digest = structure_digest(path, file) if version > 1 else ""
            if task == "screen":
                return {"problem": None, "digest": digest}
            damage = [asdict(d) for d in find_damage(path, file)]
            entry = None if damage else asdict(entry_of(path, file, digest or file_digest(path)))
            return {"problem": None, "digest": digest, "details": {"damage": damage, "entry": entry}}
    except DamagedFileError as error:
        return {"problem": str(error).rpartition("; delete ")[0] or str(error), "damaged": True}
    except StoreError as error:
        if isinstance(error.__cause__, MemoryError):
            return {"problem": f"{path}: damaged, HDF5 takes more memory for it than its size allows", "damaged": True}
        return {"problem": str(error)}


def _parse(path: Path, file: Any) -> None:
    """Make the same HDF5 calls as reading, except for the values of arrays."""
    read_json(file, "schema")
    read_json(file, "provenance")
    read_rows(file)
    read_ids(file)
    read_columns(group_at(file, "examples"))
    source = MappedFile(path)
    for name, element in arrays_in(file):
        blocks(values_of(element))
        ArrayReader(path, name, element, source, str(element.attrs["dtype"]))
