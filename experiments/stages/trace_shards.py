"""A trace in parts: several processes, on one machine or many, fill one store.

``trace.shards=64 trace.shard=3`` traces the fourth of 64 runs of neighbouring examples, as a writer of its own, into the
run's ``activations``. The parts are cut where a trace in one piece would begin a new chunk of batches, so rows and values
are the same. A part that was killed goes on where its sealed files end; a part that is finished is not traced again. The
last to finish makes the store whole; ``trace.shards=64`` without a part does so too, or says which parts are missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_store.format.schema import MANIFEST, manifest_name
from experiments.config import RunConfig
from experiments.run import stage_cache
from experiments.run.context import Context
from experiments.run.folder import RECEIPT, SHARDS, Receipt, begun_under, write_text
from experiments.run.live_table import Board
from experiments.stages.table import TABLE, told, trace_into, traced
from groundscope.core.errors import ConfigError, StoreError
from groundscope.core.paths import is_file
from groundscope.core.user_files import read_text

if TYPE_CHECKING:
    from activation_store import ActivationStore


def whole(config: RunConfig) -> RunConfig:
    """Return the configuration of the run that a part belongs to: the same for all its parts."""
    return replace(config, trace=replace(config.trace, shard=None)) if config.trace.shard is not None else config


def unfinished(root: Path, shards: int) -> list[int]:
    """Return the parts of a store's folder that have not finished."""
    return [n for n in range(shards) if not (root / manifest_name(n)).exists()]


def trace_part(context: Context, board: Board, key: str, about: Mapping[str, Any]) -> Receipt | None:
    """Trace one part; return the receipt of the whole where it was the last, else None. `about` as for `RunFolder.seal`.

    Raises
    ------
    ConfigError
        Where the folder was begun in another number of parts.
    """
    options, folder = context.config.trace, context.folder
    place, runs = TABLE["trace"].folder, Path(context.config.root)
    root, number = folder.path / place, options.shard or 0
    with stage_cache.door(runs, "trace", key, lambda _: None):
        if not _begun(root, key):
            found = stage_cache.take(runs, folder, place, key)
            if found is not None:
                board.done("trace", "shared", f"{found.summary} (made by {found.origin})")
                return found
            folder.begin(place, key)
        check_parts(root, options.shards)
        write_text(root / SHARDS, str(options.shards))
    start = time.perf_counter()
    if number in unfinished(root, options.shards):
        try:
            store = trace_into(context, root, number)
            summary = f"{len(store)} examples in the store so far"
        except StoreError:
            # With fewer chunks than parts some parts are empty: such a part is finished, and there may be no shard to open.
            if number in unfinished(root, options.shards):
                raise
            summary = "no example is in this part"
    else:
        summary = "finished before"
    left = unfinished(root, options.shards)
    part = f"part {number} of {options.shards}"
    if left:
        board.done("trace", "part", f"{part}: {summary}, {len(left)} parts to go")
        return None
    with stage_cache.door(runs, "trace", key, lambda _: None):
        # Several parts may see that all are there: the first through the door writes the receipt.
        found = folder.receipt(place)
        if found is None:
            summary = told(merge(context, root), root)
            found = folder.seal("trace", place, key, summary, time.perf_counter() - start, about=about)
    board.done("trace", "whole", f"{part}, the last: {found.summary}")
    return found


def merge(context: Context, root: Path) -> ActivationStore:
    """Return the whole store of a trace in parts.

    Raises
    ------
    ConfigError
        Where parts are missing, or the folder was begun in another number of parts.
    """
    from activation_store import ActivationStore

    shards = context.config.trace.shards
    check_parts(root, shards)
    left = unfinished(root, shards)
    if left:
        which = ",".join(map(str, left[:20])) + (",…" if len(left) > 20 else "")
        msg = (
            f"{len(left)} of {shards} parts are not traced: {which}; trace them with groundscope -m "
            f"stages=[examples,trace] trace.shards={shards} trace.shard={which} and the options of this run"
        )
        raise ConfigError(msg)
    # The last part to finish writes the manifest; one that was killed just before is asked to do it again.
    store = ActivationStore(root) if (root / MANIFEST).exists() else trace_into(context, root, 0)
    wanted = len(traced(context)) - len(store.provenance.get("skipped", {}))
    if len(store) != wanted:
        msg = f"'{root}' holds {len(store)} of {wanted} examples: remove that folder and trace again"
        raise ConfigError(msg)
    return store


def check_parts(root: Path, shards: int) -> None:
    """Raise `ConfigError` where a folder was begun in another number of parts."""
    mark = root / SHARDS
    begun = read_text(mark, limit=64, error=ConfigError).strip() if is_file(mark) else ""
    if begun not in {"", str(shards)} and not (root / MANIFEST).exists():
        msg = (
            f"'{root}' was begun in {begun} parts, not {shards}: go on with trace.shards={begun}, "
            f"or remove that folder to start anew"
        )
        raise ConfigError(msg)


def _begun(root: Path, key: str) -> bool:
    return begun_under(root) == key and not (root / RECEIPT).exists()
