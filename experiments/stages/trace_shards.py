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
from typing import Any

from experiments.config import RunConfig
from experiments.run import stage_cache
from experiments.run.context import ACTIVATIONS, Context
from experiments.run.folder import RECEIPT, SHARDS, Receipt, begun_under, write_text
from experiments.run.live_table import Board
from experiments.stages.trace import check_parts, merge, told, trace_into, unfinished
from groundscope.core.errors import StoreError


def whole(config: RunConfig) -> RunConfig:
    """Return the configuration of the run that a part belongs to: the same for all its parts."""
    return replace(config, trace=replace(config.trace, shard=None)) if config.trace.shard is not None else config


def trace_part(context: Context, board: Board, key: str, about: Mapping[str, Any]) -> Receipt | None:
    """Trace one part; return the receipt of the whole where it was the last, else None. `about` as for `RunFolder.seal`.

    Raises
    ------
    ConfigError
        Where the folder was begun in another number of parts.
    """
    options, folder = context.config.trace, context.folder
    place, runs = ACTIVATIONS, Path(context.config.root)
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


def _begun(root: Path, key: str) -> bool:
    return begun_under(root) == key and not (root / RECEIPT).exists()
