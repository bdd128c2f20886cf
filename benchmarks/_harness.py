"""Shared by all benchmarks: command-line options, timing, progress lines, figures, tables, and the JSON record.

A figure is a dictionary with ``value``, ``goal`` (a bound such as ``<= 2``; empty without a goal), ``holds`` (whether the
value satisfies the goal) and ``n`` (repetitions, examples or fits behind the value). A benchmark prints its figures as a
table and, as its last line, as one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import operator
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from groundscope.core.progress import Advance, watched

if TYPE_CHECKING:
    from rich.progress import Progress

Figure = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"
TERMINAL_INTERVAL, FILE_INTERVAL = 5.0, 30.0
"""Seconds between two progress lines on a terminal, and in a file or pipe."""
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq,
}  # fmt: skip


# -- options ---------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose option ``--save`` is off by default.

    nnsight adds a method `save` to every object, and argparse sets no default for an attribute that exists.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().parse_known_args(args, argparse.Namespace(save=False) if namespace is None else namespace)


def option_parser(
    description: str | None,
    *,
    quick: str = "fewer repetitions, about a minute",
    save: bool = False,
    device: bool = False,
    dtypes: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """Return a parser with the options that benchmarks have in common.

    Parameters
    ----------
    description
        The module docstring, printed by ``--help``.
    quick
        Help text of ``--quick``, which every benchmark has.
    save
        Whether the benchmark has ``--save``.
    device
        Whether the benchmark has ``--device``.
    dtypes
        Choices of ``--dtype``; the first is the default.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    if save:
        parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    if device:
        parser.add_argument("--device", default="cpu", help="device of the model: cpu (default), cuda or cuda:N")
    if dtypes:
        parser.add_argument("--dtype", default=dtypes[0], choices=dtypes, help=f"default: {dtypes[0]}")
    return parser


# -- timing ----------------------------------------------------------------------------------------------------------------


def time_call(work: Callable[[], object], device: object = "cpu") -> float:
    """Return the seconds that a call takes, until the device has finished."""
    start = time.perf_counter()
    work()
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize(str(device))
    return time.perf_counter() - start


def alternate(
    baseline: Callable[[], object], candidate: Callable[[], object], n: int, device: object = "cpu"
) -> list[tuple[float, float]]:
    """Time both calls `n` times in alternating order, after one warm-up; return seconds (baseline, candidate)."""
    pairs = []
    for repetition in range(n + 1):
        if repetition % 2:
            second, first = time_call(candidate, device), time_call(baseline, device)
        else:
            first, second = time_call(baseline, device), time_call(candidate, device)
        pairs.append((first, second))
    return pairs[1:]


# -- progress --------------------------------------------------------------------------------------------------------------


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Advance]:
    """Print a line about the running work to standard error, at the start and then at regular intervals.

    Lines are printed with or without a terminal. Progress bars of the library are not drawn in the context; the state
    of the newest one is part of the line.

    Parameters
    ----------
    label
        Describes the work.
    total
        Number of steps; None if the work has no countable steps.

    Yields
    ------
    Advance
        Call it after each finished step.
    """
    displays: list[Progress] = []
    start, finished, done = time.perf_counter(), threading.Event(), 0

    def print_line() -> None:
        parts = [label if total is None else f"{label}: {done} of {total}", f"{time.perf_counter() - start:.0f} s"]
        tasks = [task for display in displays[-1:] for task in display.tasks if not task.finished]
        if tasks:
            parts.append(f"{tasks[-1].description} {tasks[-1].completed:.0f} of {tasks[-1].total or '?'}")
        # Written without Python's buffers and their locks: a process forked at this moment would inherit a locked buffer.
        with suppress(OSError):
            os.write(2, f"[{time.strftime('%H:%M:%S')}] {', '.join(parts)}\n".encode())

    def print_lines() -> None:
        while not finished.wait(TERMINAL_INTERVAL if sys.stderr.isatty() else FILE_INTERVAL):
            print_line()

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done
        done += steps
        if note:
            print(note, file=sys.stderr)

    print_line()
    thread = threading.Thread(target=print_lines, daemon=True)
    thread.start()
    try:
        with watched(displays.append):
            yield advance
    finally:
        finished.set()
        thread.join()


# -- figures ---------------------------------------------------------------------------------------------------------------


def figure(value: float, goal: str = "", n: int = 1, **details: Any) -> Figure:
    """Return a figure; floats are rounded to four significant digits, and `holds` refers to the rounded value.

    Parameters
    ----------
    value
        What was measured.
    goal
        A comparison and a bound, optionally with a unit: ``<= 2 GB``. Empty if there is no goal; then `holds` is true.
    n
        Repetitions, examples or fits behind the value.
    details
        Further fields.
    """
    value = value if isinstance(value, int) else float(f"{value:.4g}")
    holds = True
    if goal:
        sign, bound, *_ = goal.split()
        holds = bool(COMPARISONS[sign](value, float(bound)))
    return {"value": value, "goal": goal, "holds": holds, "n": n, **details}


def wide_console() -> Console:
    """Return a console for standard output that does not cut tables at 80 columns if the output is a file or pipe."""
    return Console(width=None if sys.stdout.isatty() else 160)


def print_figures(figures: Mapping[str, Figure], title: str = "") -> None:
    """Print a table of figures: value, goal, whether the goal is met, and `n`."""
    table = Table("figure", "value", "goal", "holds", "n", title=title or None)
    for name, entry in figures.items():
        goal = str(entry.get("goal", ""))
        table.add_row(name, str(entry["value"]), goal, str(entry["holds"]) if goal else "", str(entry["n"]))
    wide_console().print(table)


def describe_device(*packages: str, device: str = "cpu", dtype: str = "") -> str:
    """Return the device and the versions of some packages as one line.

    With torch among the packages, a CPU is described with torch's number of threads; otherwise with its number of cores.
    """
    if "torch" in packages:
        import torch

        cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu
    else:
        name = f"{platform.machine()}, {os.cpu_count()} cores"
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return ", ".join([name, *([dtype] if dtype else []), *versions])


def finish(
    benchmark: str, device: str, figures: Mapping[str, Figure], *, save: bool = False, **details: Any
) -> dict[str, Any]:
    """Print the record of a benchmark as one line of JSON, and write it to ``benchmarks/results`` if `save`; return it."""
    record = {"benchmark": benchmark, "device": device, **details, "figures": dict(figures)}
    if save:
        save_record(record)
    print(json.dumps(record))
    return record


def save_record(record: Mapping[str, Any]) -> None:
    """Write a record to ``benchmarks/results/<benchmark>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{record['benchmark']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
