"""A trace in parts: several processes, on one machine or many, write one store.

``trace.shards=64 trace.shard=3`` traces the fourth of 64 parts of consecutive examples into the folder ``activations`` of the
run. Parts are cut at chunks of batches, as a trace in one process cuts them, so rows and values are the same. A part that was
killed continues after its complete files; a finished part is not traced again. The last part to finish completes the store;
``trace.shards=64`` without a part does so too, or names the missing parts.
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
from experiments.run.folder import RECEIPT, SHARDS, Receipt, started_key, write_text
from experiments.run.live_table import LiveTable
from experiments.stages.trace import check_parts, describe, merge, trace_into, unfinished
from groundscope.core.errors import StoreError
from groundscope.core.text import format_count


def whole(config: RunConfig) -> RunConfig:
    """Return the configuration of the run that a part belongs to, the same for all its parts."""
    return replace(config, trace=replace(config.trace, shard=None)) if config.trace.shard is not None else config


def trace_part(context: Context, table: LiveTable, key: str, about: Mapping[str, Any]) -> Receipt | None:
    """Trace one part.

    Parameters
    ----------
    context, table
        The run and its live table.
    key, about
        Key of the stage and further fields of its receipt.

    Returns
    -------
    Receipt or None
        The receipt of the stage if this part was the last, else None.

    Raises
    ------
    ConfigError
        If the trace was started with another number of parts.
    """
    options, folder = context.config.trace, context.folder
    place, runs = ACTIVATIONS, Path(context.config.root)
    root, number = folder.path / place, options.shard or 0
    with stage_cache.stage_lock(runs, "trace", key, lambda _: None):
        if not (started_key(root) == key and not (root / RECEIPT).exists()):
            receipt = stage_cache.take(runs, folder, place, key)
            if receipt is not None:
                table.finish("trace", "shared", f"{receipt.summary} (made by {receipt.origin})")
                return receipt
            folder.begin(place, key)
        check_parts(root, options.shards)
        write_text(root / SHARDS, str(options.shards))
    start = time.perf_counter()
    if number in unfinished(root, options.shards):
        try:
            store = trace_into(context, root, number)
            summary = f"{format_count(len(store), 'example')} in the store so far"
        except StoreError:
            # With fewer chunks than parts some parts are empty: such a part is finished, and there may be no shard to open.
            if number in unfinished(root, options.shards):
                raise
            summary = "no example is in this part"
    else:
        summary = "finished before"
    missing = unfinished(root, options.shards)
    part = f"part {number} of {options.shards}"
    if missing:
        table.finish("trace", "part", f"{part}: {summary}, {format_count(len(missing), 'part')} to do")
        return None
    with stage_cache.stage_lock(runs, "trace", key, lambda _: None):
        # Several parts may find the trace complete: the first to hold the lock writes the receipt.
        receipt = folder.receipt(place)
        if receipt is None:
            summary = describe(merge(context, root), root)
            receipt = folder.seal("trace", place, key, summary, time.perf_counter() - start, about=about)
    table.finish("trace", "complete", f"{part}, the last: {receipt.summary}")
    return receipt
