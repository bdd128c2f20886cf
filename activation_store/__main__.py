"""``python -m activation_store {info,verify,repack,merge}``: inspect a store, verify its bytes, rewrite or merge it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from activation_store.merging import merge, repack
from activation_store.reading.integrity import verify
from activation_store.reading.store import ActivationStore
from activation_store.summary import print_store
from groundscope.core.errors import GroundscopeError
from groundscope.core.text import format_count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 on success, 1 if verification found problems, 2 if the command failed."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        return _run(options, console)
    except GroundscopeError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]{escape(str(error))}[/red]", highlight=False)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m activation_store", description="Inspect an activation store.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("info", "print its contents: sites, shapes, sizes, labels, provenance"),
        ("verify", "compare every byte with its digest, and list the examples affected by damage"),
    ):
        commands.add_parser(name, help=help_text).add_argument("path", help="folder of the store")
    repack_parser = commands.add_parser(
        "repack", help="rewrite it layer by layer, for the fastest reads of whole layers"
    )
    repack_parser.add_argument("path", help="folder of the store")
    repack_parser.add_argument("--out", help="folder of the new store; by default PATH-repacked")
    merge_parser = commands.add_parser("merge", help="write several stores of one model into one folder")
    merge_parser.add_argument("path", nargs="+", help="folders of the stores, in the order of their rows")
    merge_parser.add_argument("--out", required=True, help="folder of the new store")
    return parser


def _run(options: argparse.Namespace, console: Console) -> int:
    if options.command == "info":
        with ActivationStore(options.path) as store:
            print_store(store, console)
        return 0
    if options.command == "verify":
        report = verify(options.path)
        console.print(escape(str(report)), style="green" if report.ok else "red", highlight=False, soft_wrap=True)
        return 0 if report.ok else 1
    if options.command == "repack":
        source = Path(options.path)
        out = options.out or source.with_name(f"{source.name}-repacked")
        with ActivationStore(source) as store:
            result = repack(store, out)
    else:
        first, *others = options.path
        result = merge(ActivationStore(first).merge(*others), options.out)
    console.print(
        escape(f"{result.path}: {format_count(len(result), 'example')}, {format_count(len(result.arrays), 'array')}"),
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
