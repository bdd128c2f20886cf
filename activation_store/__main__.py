"""``python -m activation_store {info,verify} PATH``: look at a store, or check every byte of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from activation_store.integrity import Report, verify
from activation_store.store import ActivationStore
from concepts.errors import GroundscopeError

_LONGEST = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0 where all is well, 1 where verification found problems, 2 where there is no store."""
    parser = argparse.ArgumentParser(prog="python -m activation_store", description="Look at an activation store.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("info", "what is in it: sites, sizes, labels, provenance"),
        ("verify", "whether every byte is as it was sealed, and which examples are affected where not"),
    ):
        commands.add_parser(name, help=help_text).add_argument("path", help="folder of the store")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.command == "info":
            with ActivationStore(options.path) as store:
                show(store, console)
            return 0
        report = _verify(options.path, console)
    except GroundscopeError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]{escape(str(error))}[/red]", highlight=False)
        return 2
    console.print(escape(str(report)), style="green" if report.ok else "red", highlight=False, soft_wrap=True)
    return 0 if report.ok else 1


def show(store: ActivationStore, console: Console) -> None:
    """Print what is in a store."""
    size = sum(p.stat().st_size for p in store.path.iterdir() if p.is_file())
    state = "complete" if store.complete else "not complete: read as far as it is sealed"
    console.print(f"[bold]{escape(str(store.path))}[/bold]", highlight=False, soft_wrap=True)
    console.print(f"{len(store)} examples, {store.dtype}, {_size(size)}, {state}", highlight=False)
    console.print(f"digest {store.digest}", highlight=False, soft_wrap=True)
    console.print(_arrays(store))
    if len(store):
        for table in (_columns(store), _labels(store)):
            if table.row_count:
                console.print(table)
    if store.tensors:
        console.print(escape(f"tensors: {', '.join(store.tensors)}"), highlight=False)
    provenance = Table("field", "value", title="provenance", title_justify="left")
    for key, value in sorted(store.provenance.items()):
        provenance.add_row(escape(key), escape(_text(value)))
    if provenance.row_count:
        console.print(provenance)


def _arrays(store: ActivationStore) -> Table:
    table = Table("site", "tokens", "layers", "width", "heads", title="arrays", title_justify="left")
    for a in store.arrays:
        layers = f"{a.n_layers} ({a.layers[0]}-{a.layers[-1]})"
        row = (f"{a.stack}.{a.component}", a.tokens, layers, str(a.width), str(a.n_heads or ""))
        table.add_row(*map(escape, row))
    return table


def _columns(store: ActivationStore) -> Table:
    table = Table("column", "different", "most frequent", title="examples", title_justify="left")
    for name, values in store.columns.items():
        if name in store.labels:
            continue
        found, counts = np.unique(values.astype(str), return_counts=True)
        if len(found) == 1 and not found[0]:
            continue  # a standard column that was not given
        most = ", ".join(f"{found[i] or '(none)'} {counts[i]}" for i in np.argsort(-counts, kind="stable")[:4])
        table.add_row(escape(name), str(len(found)), escape(_text(most) if len(found) < len(values) else ""))
    return table


def _labels(store: ActivationStore) -> Table:
    table = Table("label", "true", "false", "undefined", title="labels", title_justify="left")
    for name in store.labels:
        values = store.columns[name]
        counts = (np.sum(values > 0), np.sum(values <= 0), np.sum(np.isnan(values)))
        table.add_row(escape(name), *(str(int(c)) for c in counts))
    return table


def _verify(path: str, console: Console) -> Report:
    with Progress(console=Console(stderr=True), transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("verifying", total=None)
        return verify(path, lambda done, total: progress.update(task, completed=done, total=total))


def _size(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
