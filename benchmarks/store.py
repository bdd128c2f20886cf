"""Cost of the activation store compared with the bare disk: writing, reading layers, heads and rows, many files, compression.

    python benchmarks/store.py [--quick] [--only write,read,shards,overlap,size] [--folder DIR]

Writing is compared with ``os.write`` of the same bytes into as many files, each synced; both in turn. Reading is compared
with a numpy memmap of the same values as [L, N, D], copied out (float32, so that nothing hides in a conversion). Warm: the
files are in the page cache. Cold: the system is asked to drop them (``posix_fadvise``), and both are mapped again. All
variants of a figure take turns in a new random order for each repetition; a figure is the median of the ratios of each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import h5py
import numpy as np
from _store_common import Bench, Figure
from _store_read import measure_read, measure_shards
from _store_write import measure_overlap, measure_size, measure_write
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

GOALS = {
    "write_vs_raw": ">= 0.9",
    "layer_warm_vs_memmap": "<= 2.5",
    "layer_cold_vs_memmap": "<= 2.5",
    "head_warm_vs_memmap": "<= 2.5",
    "head_cold_vs_memmap": "<= 2.5",
    "repacked_layer_warm_vs_memmap": "<= 1.3",
    "repacked_layer_cold_vs_memmap": "<= 1.3",
    "repacked_head_warm_vs_memmap": "<= 1.3",
    "repacked_head_cold_vs_memmap": "<= 1.3",
    "random_256_rows_warm_ms": "<= 12",
    "store_64_shards_vs_one": "<= 1.3",
    "index_64_shards_vs_one_file": "<= 1.3",
    "background_vs_waiting": "<= 1.0",
}


MEASURES = {
    "write": measure_write,
    "read": measure_read,
    "shards": measure_shards,
    "overlap": measure_overlap,
    "size": measure_size,
}


def judge(figures: dict[str, Figure], n: int) -> None:
    """Add goal, whether it holds, and the number of repetitions."""
    for name, figure in figures.items():
        figure["value"] = round(figure["value"], 3)
        goal = GOALS.get(name, "")
        sign, _, bound = goal.partition(" ")
        holds = figure["value"] >= float(bound) if sign == ">=" else figure["value"] <= float(bound or "inf")
        figure |= {"goal": goal, "holds": holds, "n": n}


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small stores, few repetitions: about a minute")
    parser.add_argument("--only", default=",".join(MEASURES), help="parts to run, with commas between")
    parser.add_argument("--folder", help="where to write; by default the folder of temporary files")
    options = parser.parse_args()
    console = Console()
    console.print(
        "Compares the store with os.write and numpy.memmap of the same values, 64 files with one, background with waiting."
    )
    figures: dict[str, Figure] = {}
    repeats = 3 if options.quick else 9
    terminal = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as name,
        Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress,
    ):
        bench = Bench(repeats, progress)
        for part in options.only.split(","):
            figures |= MEASURES[part](bench, Path(name), options.quick)
    judge(figures, repeats)
    table = Table("figure", "baseline", "store", "value", "goal", "holds", title=f"medians of {repeats} turns")
    for key, f in figures.items():
        table.add_row(
            key, f["baseline"], f["candidate"], str(f["value"]), f["goal"], str(f["holds"]) if f["goal"] else ""
        )
    console.print(table)
    device = (
        f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}, "
        f"h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
    )
    print(json.dumps({"benchmark": "store", "device": device, "figures": figures}))


if __name__ == "__main__":
    main()
