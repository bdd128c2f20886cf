"""What the activation store costs beside the bare disk: writing, reading layers, heads and rows, many files, compression.

    python benchmarks/store.py [--quick] [--only write,read,shards,overlap,size] [--folder DIR]

Writing is compared with ``os.write`` of the same bytes into as many files, each synced; both in turn. Reading is compared
with a numpy memmap of the same values as [L, N, D], copied out (float32, so that nothing hides in a conversion). Warm: the
files are in the page cache. Cold: the system was told to drop them (``posix_fadvise``), and both are mapped anew. All
variants of a figure take turns in an order drawn anew for each repetition; a figure is the median of the ratios of each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import h5py
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter, repack

WIDTH, HEADS = 4096, 32
Figure = dict[str, Any]
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


class Bench:
    """Runs variants in turn, in random order, and keeps their times in seconds."""

    def __init__(self, repeats: int, progress: Progress) -> None:
        self.repeats = repeats
        self._progress = progress
        self._random = random.Random(0)

    def turns(
        self, what: str, variants: Mapping[str, Callable[[], object]], before: Callable[[str], object] | None = None
    ) -> dict[str, list[float]]:
        """Time each variant so many times, after once to warm up; `before` is not timed."""
        times: dict[str, list[float]] = {name: [] for name in variants}
        task = self._progress.add_task(what, total=self.repeats + 1)
        for _ in range(self.repeats + 1):
            for name in self._random.sample(list(variants), len(variants)):
                if before:
                    before(name)
                start = time.perf_counter()
                variants[name]()
                times[name].append(time.perf_counter() - start)
            self._progress.advance(task)
        return {name: column[1:] for name, column in times.items()}


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the ratios of each turn."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def ms(times: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return round(1000 * statistics.median(times), 2)


def info(layers: int, component: str = "z") -> ArrayInfo:
    """Return the array that is written: z, with heads of 128."""
    return ArrayInfo("decoder", component, "last", layers, WIDTH, HEADS)


def batches(examples: int, layers: int, batch: int) -> list[np.ndarray]:
    """Return a few different batches [batch, L, D] to be given again and again."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, layers, WIDTH), np.float32) for _ in range(min(4, examples // batch))]


def fill(writer: StoreWriter, data: Sequence[np.ndarray], examples: int, array: ArrayInfo) -> None:
    """Append so many examples."""
    batch = len(data[0])
    for at in range(0, examples, batch):
        names = [str(i) for i in range(at, at + batch)]
        writer.append({array.key: data[at // batch % len(data)]}, {"id": names, "group": names})


def written(folder: Path, data: Sequence[np.ndarray], examples: int, layers: int, shard: int, **options: Any) -> None:
    """Write a store."""
    shutil.rmtree(folder, ignore_errors=True)
    with StoreWriter(folder, Schema((info(layers),), **options), {}, shard_size=shard) as writer:
        fill(writer, data, examples, info(layers))


def write_raw(folder: Path, data: Sequence[np.ndarray], examples: int, shard: int) -> None:
    """Write the same bytes into as many files, without any format."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    batch = len(data[0])
    for first in range(0, examples, shard):
        descriptor = os.open(folder / f"{first}", os.O_WRONLY | os.O_CREAT)
        for at in range(first, first + shard, batch):
            view = data[at // batch % len(data)].reshape(-1).view(np.uint8).data
            for start in range(0, len(view), 1 << 20):
                os.write(descriptor, view[start : start + (1 << 20)])
        os.fsync(descriptor)
        os.close(descriptor)


def measure_write(bench: Bench, root: Path, quick: bool) -> dict[str, Figure]:
    """Measure writing, against the disk; and what HDF5's own checksum would cost."""
    examples, layers, shard = (512, 8, 256) if quick else (2048, 16, 512)
    data = batches(examples, layers, 64)
    size = examples * layers * WIDTH * 4 / 1e6

    def fletcher() -> None:
        # The least that HDF5 can do with its checksum: whole chunks, made ready before.
        with h5py.File(root / "fletcher.h5", "w") as file:
            z = file.create_dataset("z", (examples, layers, WIDTH), "<f4", chunks=(32, 1, WIDTH), fletcher32=True)
            for at in range(0, examples, 32):
                for layer in range(layers):
                    z[at : at + 32, layer : layer + 1] = chunk
        with (root / "fletcher.h5").open("rb") as raw:
            os.fsync(raw.fileno())

    def plain() -> None:
        with h5py.File(root / "plain.h5", "w") as file:
            z = file.create_dataset("z", (examples, layers, WIDTH), "<f4", chunks=(32, 1, WIDTH))
            for at in range(0, examples, 32):
                for layer in range(layers):
                    z[at : at + 32, layer : layer + 1] = chunk
        with (root / "plain.h5").open("rb") as raw:
            os.fsync(raw.fileno())

    chunk = np.ascontiguousarray(data[0][:32, :1])
    times = bench.turns(
        "writing",
        {
            "raw": lambda: write_raw(root / "raw", data, examples, shard),
            "store": lambda: written(root / "written", data, examples, layers, shard),
            "fletcher32": fletcher,
            "hdf5": plain,
        },
        # What one left to be written back must not slow the other.
        before=lambda _name: os.sync(),
    )
    for name in ("raw", "written"):
        shutil.rmtree(root / name)
    speeds = {name: round(size / statistics.median(column)) for name, column in times.items()}
    return {
        "write_vs_raw": {
            "value": ratio(times["raw"], times["store"]),
            "baseline": f"{speeds['raw']} MB/s",
            "candidate": f"{speeds['store']} MB/s",
        },
        "fletcher32_vs_plain_hdf5": {
            "value": ratio(times["hdf5"], times["fletcher32"]),
            "baseline": f"{speeds['hdf5']} MB/s",
            "candidate": f"{speeds['fletcher32']} MB/s",
        },
    }


def drop(folder: Path) -> None:
    """Have the system forget the pages of the files in a folder."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure_read(bench: Bench, root: Path, quick: bool) -> dict[str, Figure]:
    """Measure one layer, one head and random rows, warm and cold, of shards and repacked, against a memmap."""
    examples, layers = (1024, 4) if quick else (4096, 8)
    written(root / "store", batches(examples, layers, 64), examples, layers, 512)
    repack(ActivationStore(root / "store"), root / "packed")
    (root / "map").mkdir()
    shape = (layers, examples, WIDTH)
    whole = np.memmap(root / "map" / "values", np.float32, "w+", shape=shape)
    source = ActivationStore(root / "store")
    for layer in range(layers):
        whole[layer] = source.read(f"decoder.L{layer}.z", "last")
    whole.flush()
    del whole
    rows = np.random.default_rng(1).permutation(examples)[:256]
    stores: dict[str, ActivationStore] = {}
    maps: list[np.ndarray] = []

    def opened(cold: bool) -> None:
        stores.update(store=ActivationStore(root / "store"), packed=ActivationStore(root / "packed"))
        maps[:] = [np.memmap(root / "map" / "values", np.float32, "r", shape=shape)]
        if cold:
            for name in ("store", "packed", "map"):
                drop(root / name)

    def variants(head: int | None, examples: np.ndarray | None = None) -> dict[str, Callable[[], object]]:
        columns = slice(None) if head is None else slice(head * 128, head * 128 + 128)
        site = f"decoder.L{layers // 2}.z"
        return {
            "map": lambda: np.array(maps[0][layers // 2, slice(None) if examples is None else examples, columns]),
            "store": lambda: stores["store"].read(site, "last", head, examples),
            "packed": lambda: stores["packed"].read(site, "last", head, examples),
        }

    figures: dict[str, Figure] = {}
    for what, head in (("layer", None), ("head", 5)):
        for cold in (False, True):
            opened(False)
            before = (lambda _name: (stores.clear(), maps.clear(), opened(True))) if cold else None
            state = "cold" if cold else "warm"
            times = bench.turns(f"{what}, {state}", variants(head), before)
            for name, prefix in (("store", ""), ("packed", "repacked_")):
                figures[f"{prefix}{what}_{state}_vs_memmap"] = {
                    "value": ratio(times[name], times["map"]),
                    "baseline": f"{ms(times['map'])} ms",
                    "candidate": f"{ms(times[name])} ms",
                }
    opened(False)
    times = bench.turns("random rows", variants(None, rows))
    baseline = f"memmap {ms(times['map'])} ms, repacked {ms(times['packed'])} ms"
    figures["random_256_rows_warm_ms"] = {
        "value": ms(times["store"]),
        "baseline": baseline,
        "candidate": f"{ms(times['store'])} ms",
    }
    for name in ("packed", "map"):
        shutil.rmtree(root / name)
    return figures


def measure_shards(bench: Bench, root: Path, quick: bool) -> dict[str, Figure]:
    """Measure a layer out of 64 shards, by our reader and through the index, against the same in one file."""
    examples, layers = (1024, 4) if quick else (4096, 8)
    data = batches(examples, layers, 64)
    written(root / "many", data, examples, layers, examples // 64)
    written(root / "one", data, examples, layers, examples)
    many, one = ActivationStore(root / "many"), ActivationStore(root / "one")
    out = np.empty((examples, 1, WIDTH), np.float32)
    site = f"decoder.L{layers // 2}.z"
    with h5py.File(root / "many" / "index.h5") as index, h5py.File(root / "one" / "shard-0-00000.h5") as single:
        whole = np.s_[:, layers // 2 : layers // 2 + 1]
        times = bench.turns(
            "64 shards",
            {
                "many": lambda: many.read(site, "last"),
                "one": lambda: one.read(site, "last"),
                "index": lambda: index["arrays/decoder.z/last"].read_direct(out, whole),  # pyright: ignore[reportAttributeAccessIssue]
                "file": lambda: single["arrays/decoder.z/last"].read_direct(out, whole),  # pyright: ignore[reportAttributeAccessIssue]
            },
        )
    for name in ("many", "one"):
        shutil.rmtree(root / name)
    return {
        "store_64_shards_vs_one": {
            "value": ratio(times["many"], times["one"]),
            "baseline": f"{ms(times['one'])} ms",
            "candidate": f"{ms(times['many'])} ms",
        },
        "index_64_shards_vs_one_file": {
            "value": ratio(times["index"], times["file"]),
            "baseline": f"{ms(times['file'])} ms",
            "candidate": f"{ms(times['index'])} ms",
        },
    }


def measure_overlap(bench: Bench, root: Path, quick: bool) -> dict[str, Figure]:
    """Measure a forward of torch between batches: waiting for each batch to be written, against writing in the background."""
    import torch

    examples, layers = (512, 8) if quick else (1024, 8)
    data = batches(examples, layers, 64)
    weights = torch.randn(1024, 1024)

    def forward() -> None:
        x = torch.randn(512, 1024)
        for _ in range(12):
            x = torch.tanh(x @ weights)

    def run(wait: bool) -> None:
        shutil.rmtree(root / "overlap", ignore_errors=True)
        with StoreWriter(root / "overlap", Schema((info(layers),)), {}, shard_size=256) as writer, torch.no_grad():
            for at in range(0, examples, 64):
                forward()
                names = [str(i) for i in range(at, at + 64)]
                writer.append({info(layers).key: data[at // 64 % len(data)]}, {"id": names, "group": names})
                if wait:
                    _ = writer.written

    def only() -> None:
        with torch.no_grad():
            for _ in range(examples // 64):
                forward()

    variants = {"waiting": lambda: run(True), "background": lambda: run(False), "forward": only}
    times = bench.turns("overlap", variants, before=lambda _name: os.sync())
    shutil.rmtree(root / "overlap")
    return {
        "background_vs_waiting": {
            "value": ratio(times["background"], times["waiting"]),
            "baseline": f"{ms(times['waiting'])} ms (forward alone {ms(times['forward'])} ms)",
            "candidate": f"{ms(times['background'])} ms",
        }
    }


def measure_size(bench: Bench, root: Path, quick: bool) -> dict[str, Figure]:
    """Measure the size on disk of what the embedded model gives in bfloat16, stored as bfloat16 and as float32."""
    import torch

    from activation_store import trace
    from concepts import scenes
    from lvlm import load_lvlm

    data = scenes.dataset(20 if quick else 150, 3).filter(lambda e: bool(e.candidates))
    model = load_lvlm("tiny", dtype="bfloat16")
    sites, tokens = ["resid_post", "z", "mlp_out"], ["last", "question:mean", "image:mean"]
    with torch.no_grad():
        source = trace(model, data, sites, tokens, root / "traced", dtype="bfloat16", answers=False, progress=False)
    values = {
        a.key: np.stack([source.read(f"decoder.L{n}.{a.component}", a.tokens) for n in a.layers], axis=1)
        for a in source.arrays
        # A mean is taken in float32: what is left of bfloat16 in it is the rounding at the end.
        if a.tokens == "last"
    }
    arrays = tuple(a for a in source.arrays if a.key in values)
    names = source.columns["id"].tolist()
    figures: dict[str, Figure] = {}
    for dtype in ("bfloat16", "float32"):
        raw = sum(v.size for v in values.values()) * (2 if dtype == "bfloat16" else 4)
        for compression in (None, "bitshuffle-lz4", "blosc2-zstd"):
            folder = root / "sized"

            def write(folder: Path = folder, dtype: Any = dtype, compression: Any = compression) -> None:
                shutil.rmtree(folder, ignore_errors=True)
                with StoreWriter(folder, Schema(arrays, dtype, compression), {}) as writer:
                    writer.append(values, {"id": names, "group": names})

            times = bench.turns(f"{dtype}, {compression}", {"write": write})
            size = sum(p.stat().st_size for p in folder.glob("shard-*"))
            chunks = 0
            for shard in ActivationStore(folder).shards():
                chunks += sum(shard.array(a).bytes for a in arrays)
            figures[f"size_{dtype}_{compression or 'not_compressed'}"] = {
                "value": chunks / raw,
                "baseline": f"{raw / 1e6:.2f} MB raw",
                "candidate": f"{chunks / 1e6:.2f} MB, file {size / 1e6:.2f} MB, written in {ms(times['write'])} ms",
            }
    shutil.rmtree(root / "sized")
    return figures


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
