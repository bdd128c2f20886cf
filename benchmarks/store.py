"""Speed and size of the activation store, against plain files.

    python benchmarks/store.py [--quick] [--only write,read,shards,overlap,size] [--folder DIR]

All variants of a figure run in a new random order in each repetition; a figure is the median over repetitions of the ratio to
the baseline. Parts:

write
    speed of writing, divided by that of ``os.write`` of the same bytes into the same number of synced files;
read
    time of reading a layer, a head or random rows, divided by that of copying the same values from a numpy memmap [L, N, D]
    in float32. Warm: the files are in the page cache. Cold: the operating system has dropped them (``posix_fadvise``), and
    both are opened again;
shards
    time of reading a layer from 64 shards, divided by that of reading it from one shard;
overlap
    time of forward passes with writing in the background, divided by that with waiting for each batch to be written;
size
    bytes of compressed activations of the embedded model, divided by uncompressed bytes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import h5py
from rich.table import Table

from benchmarks._harness import Figure, describe_device, figure, finish, option_parser, wide_console
from benchmarks._store_common import Bench
from benchmarks._store_read import measure_read, measure_shards
from benchmarks._store_write import measure_overlap, measure_size, measure_write

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


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="small stores and few repetitions, about a minute")
    parser.add_argument("--only", default=",".join(MEASURES), help="parts, separated by commas (default: all)")
    parser.add_argument("--folder", help="folder for the stores (default: the folder of temporary files)")
    options = parser.parse_args()
    console = wide_console()
    console.print("Compares the store with os.write and numpy.memmap of the same values, 64 shards with one.")
    measured: dict[str, Figure] = {}
    repeats = 3 if options.quick else 9
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for part in options.only.split(","):
            measured |= MEASURES[part](Bench(repeats), Path(name), options.quick)
    figures = {
        name: figure(entry.pop("value"), GOALS.get(name, ""), repeats, **entry) for name, entry in measured.items()
    }
    table = Table("figure", "baseline", "store", "value", "goal", "holds", title=f"medians of {repeats} repetitions")
    for name, entry in figures.items():
        holds = str(entry["holds"]) if entry["goal"] else ""
        table.add_row(name, entry["baseline"], entry["candidate"], str(entry["value"]), entry["goal"], holds)
    console.print(table)
    finish("store", f"{describe_device('numpy', 'h5py')}, HDF5 {h5py.version.hdf5_version}", figures)


if __name__ == "__main__":
    main()
