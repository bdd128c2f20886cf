"""Reading: a layer, a head and random rows compared with a memmap, warm and cold; many shards compared with one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from activation_store import ActivationStore, repack
from benchmarks._harness import Figure
from benchmarks._store_common import WIDTH, Bench, batches, ms, ratio, write_store


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
    write_store(root / "store", batches(examples, layers, 64), examples, layers, 512)
    repack(ActivationStore(root / "store"), root / "packed")
    (root / "map").mkdir()
    shape = (layers, examples, WIDTH)
    whole = np.memmap(root / "map" / "values", np.float32, "w+", shape=shape)
    source = ActivationStore(root / "store")
    for layer in range(layers):
        whole[layer] = source.read(f"decoder.L{layer}.z", "last")
    whole.flush()
    # What is mapped cannot be forgotten by the system: nothing may be cold while these are there.
    source.close()
    del whole, source
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
            times = bench.time(f"{what}, {state}", variants(head), before)
            for name, prefix in (("store", ""), ("packed", "repacked_")):
                figures[f"{prefix}{what}_{state}_vs_memmap"] = {
                    "value": ratio(times[name], times["map"]),
                    "baseline": f"{ms(times['map'])} ms",
                    "candidate": f"{ms(times[name])} ms",
                }
    opened(False)
    times = bench.time("random rows", variants(None, rows))
    baseline = f"memmap {ms(times['map'])} ms, repacked {ms(times['packed'])} ms"
    figures["random_256_rows_warm_ms"] = {
        "value": ms(times["store"]),
        "baseline": baseline,
        "candidate": f"{ms(times['store'])} ms",
    }
    for name in ("packed", "map"):
        shutil.rmtree(root / name)
    return figures


def first(path: Path, name: str, out: np.ndarray, rows: tuple[slice, ...]) -> None:
    """Open a file, read some of a dataset, and close it."""
    with h5py.File(path) as file:
        file[name].read_direct(out, rows)  # pyright: ignore[reportAttributeAccessIssue]


def measure_shards(bench: Bench, root: Path, quick: bool) -> dict[str, Figure]:
    """Measure a layer out of 64 shards, by our reader and through the index, against the same in one file."""
    examples, layers = (1024, 4) if quick else (4096, 8)
    data = batches(examples, layers, 64)
    write_store(root / "many", data, examples, layers, examples // 64)
    write_store(root / "one", data, examples, layers, examples)
    many_store, single_store = ActivationStore(root / "many"), ActivationStore(root / "one")
    out = np.empty((examples, 1, WIDTH), np.float32)
    site = f"decoder.L{layers // 2}.z"
    with h5py.File(root / "many" / "index.h5") as index, h5py.File(root / "one" / "shard-0-00000.h5") as single:
        whole, name = np.s_[:, layers // 2 : layers // 2 + 1], "arrays/decoder.z/last"
        indexed, plain = index[name], single[name]
        times = bench.time(
            "64 shards",
            {
                "many": lambda: many_store.read(site, "last"),
                "one": lambda: single_store.read(site, "last"),
                "index": lambda: indexed.read_direct(out, whole),  # pyright: ignore[reportAttributeAccessIssue]
                "file": lambda: plain.read_direct(out, whole),  # pyright: ignore[reportAttributeAccessIssue]
                # The first reading finds the shards; here each is a first one.
                "index opened": lambda: first(root / "many" / "index.h5", name, out, whole),
                "file opened": lambda: first(root / "one" / "shard-0-00000.h5", name, out, whole),
            },
        )
    for folder in ("many", "one"):
        shutil.rmtree(root / folder)
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
        "index_64_shards_vs_one_file_opened_anew": {
            "value": ratio(times["index opened"], times["file opened"]),
            "baseline": f"{ms(times['file opened'])} ms",
            "candidate": f"{ms(times['index opened'])} ms",
        },
    }
