"""Print the contents of a store as tables in the terminal."""

from __future__ import annotations

import json

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from activation_store.format.columns import holds_lists
from activation_store.format.encoding import STORAGE
from activation_store.format.schema import ArrayInfo
from activation_store.reading.catalog import layer_range
from activation_store.reading.store import ActivationStore
from activation_store.row_input import describe_input
from groundscope.core.text import format_count

_LONGEST = 100


def print_store(store: ActivationStore, console: Console) -> None:
    """Print the contents of a store."""
    size = sum(p.stat().st_size for part in store.folders for p in part.path.iterdir() if p.is_file())
    state = "complete" if store.complete else "not complete: only the sealed shards are read"
    console.print(f"[bold]{escape(str(store.path))}[/bold]", highlight=False, soft_wrap=True)
    storage = f"{store.dtype}, {store.schema.compression or 'not compressed'}"
    shards = sum(len(part.shards) for part in store.folders)
    console.print(
        f"{format_count(len(store), 'example')} in {format_count(shards, 'shard')}, {storage}, {_size(size)}, {state}",
        highlight=False,
    )
    console.print(f"digest {store.digest}", highlight=False, soft_wrap=True)
    console.print(f"rows have seen {describe_input(store.input)}", highlight=False)
    console.print(_arrays(store))
    if len(store):
        for table in (_columns(store), _labels(store)):
            if table.row_count:
                console.print(table)
    if store.tensors:
        console.print(escape(f"tensors: {', '.join(store.tensors)}"), highlight=False)
    provenance = _table("provenance", "field", "value")
    for key, value in sorted(store.provenance.items()):
        provenance.add_row(escape(key), escape(_text(value)))
    if provenance.row_count:
        console.print(provenance)


def _arrays(store: ActivationStore) -> Table:
    table = _table("arrays", "site", "tokens", "shape", "layers", "heads", "on disk", "notes")
    for column in table.columns[:3]:
        column.no_wrap = True  # a truncated name or shape is useless; notes can wrap
    for a in store.schema.arrays:
        rows = disk = overflow = nonfinite = 0
        for shard in store.shards():
            array = shard.array(a)
            rows, disk = rows + array.rows, disk + array.bytes
            overflow, nonfinite = overflow + array.counts[0], nonfinite + array.counts[1]
        raw = rows * a.n_layers * a.width * STORAGE[store.schema.storage(a)].itemsize
        notes = (
            format_count(rows, "token") if a.ragged else "",
            f"{disk / raw:.0%} of raw" if raw and store.schema.compression else "",
            f"{overflow} overflowed" if overflow else "",
            f"{nonfinite} NaN or inf" if nonfinite else "",
        )
        row = (
            f"{a.stack}.{a.key[1]}",
            a.tokens,
            f"[{rows}, {a.n_layers}, {a.width}]",
            layer_range(a.layers),
            _heads(a),
            _size(disk),
            ", ".join(filter(None, notes)),
        )
        table.add_row(*map(escape, row))
    return table


def _heads(info: ArrayInfo) -> str:
    """Return the number and width of the heads, and their numbers if only some are stored."""
    if not info.n_heads:
        return ""
    return f"{info.n_heads} x {info.width // info.n_heads}" + (f": {layer_range(info.heads)}" if info.heads else "")


def _table(title: str, *columns: str) -> Table:
    # Without lines between columns, more columns fit.
    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def _columns(store: ActivationStore) -> Table:
    table = _table("examples", "column", "distinct", "most frequent")
    for name, values in store.columns.items():
        if name in store.labels:
            continue
        if holds_lists(values):
            table.add_row(
                escape(name), "", f"lists, {format_count(sum(len(items) for items in values), 'item')} in total"
            )
            continue
        distinct, counts = np.unique(values.astype(str), return_counts=True)
        if len(distinct) == 1 and not distinct[0]:
            continue  # a standard column that is empty
        names = ["(none)" if name in ("", "nan") else name for name in distinct.tolist()]
        most = ", ".join(f"{names[i]} {counts[i]}" for i in np.argsort(-counts, kind="stable")[:4])
        table.add_row(escape(name), str(len(distinct)), escape(_text(most) if len(distinct) < len(values) else ""))
    return table


def _labels(store: ActivationStore) -> Table:
    table = _table("labels", "label", "true", "false", "undefined")
    for name in store.labels:
        values = np.asarray(store.columns[name], dtype=np.float64)
        defined = values[~np.isnan(values)]
        missing = str(len(values) - len(defined))
        if np.isin(defined, (0, 1)).all():
            table.add_row(escape(name), str(int((defined == 1).sum())), str(int((defined == 0).sum())), missing)
        else:
            table.add_row(escape(name), f"{defined.min():g} to {defined.max():g}", "", missing)
    return table


def _size(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
