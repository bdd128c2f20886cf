"""Writing: compared with the bare disk and with a forward pass, and size on disk."""

from __future__ import annotations

import os
import shutil
import statistics
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from activation_store import ActivationStore, Schema, StoreWriter
from benchmarks._harness import Figure
from benchmarks._store_common import WIDTH, Bench, batches, info, ms, ratio, write_store


def write_raw(folder: Path, data: Sequence[np.ndarray], examples: int, shard: int, work: str = "") -> None:
    """Write the same bytes into as many files, without any format; each is synced.

    With work, one after the other in one thread, as the least that a store must do: ``digest`` takes the CRC-32 of every
    512 kB, ``chunks`` also brings 32 examples of a layer side by side first.
    """
    folder.mkdir()
    batch, layers = data[0].shape[:2]
    block = np.zeros((layers, 32, WIDTH), np.float32)
    for first in range(0, examples, shard):
        descriptor = os.open(folder / f"{first}", os.O_WRONLY | os.O_CREAT)
        for at in range(first, first + shard, 32):
            rows = data[at // batch % len(data)][at % batch :][:32]
            if work == "chunks":
                block[:] = rows.swapaxes(0, 1)
                rows = block
            view = rows.reshape(-1).view(np.uint8).data
            for start in range(0, len(view), 1 << 19):
                part = view[start : start + (1 << 19)]
                if work:
                    zlib.crc32(part)
                os.write(descriptor, part)
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

    def clear(_name: str = "") -> None:
        # What one left to be removed or written back must not slow the other.
        for name in ("raw", "digest", "chunks", "written"):
            shutil.rmtree(root / name, ignore_errors=True)
        os.sync()

    chunk = np.ascontiguousarray(data[0][:32, :1])
    times = bench.time(
        "writing",
        {
            "raw": lambda: write_raw(root / "raw", data, examples, shard),
            "digest": lambda: write_raw(root / "digest", data, examples, shard, "digest"),
            "chunks": lambda: write_raw(root / "chunks", data, examples, shard, "chunks"),
            "store": lambda: write_store(root / "written", data, examples, layers, shard),
            "fletcher32": fletcher,
            "hdf5": plain,
        },
        before=clear,
    )
    clear()
    speeds = {name: round(size / statistics.median(column)) for name, column in times.items()}
    return {
        "write_vs_raw": {
            "value": ratio(times["raw"], times["store"]),
            "baseline": f"{speeds['raw']} MB/s",
            "candidate": f"{speeds['store']} MB/s",
        },
        **{
            f"raw_with_{name}_vs_raw": {
                "value": ratio(times["raw"], times[name]),
                "baseline": f"{speeds['raw']} MB/s",
                "candidate": f"{speeds[name]} MB/s",
            }
            for name in ("digest", "chunks")
        },
        "fletcher32_vs_plain_hdf5": {
            "value": ratio(times["hdf5"], times["fletcher32"]),
            "baseline": f"{speeds['hdf5']} MB/s",
            "candidate": f"{speeds['fletcher32']} MB/s",
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
                    _ = writer.sealed_ids

    def only() -> None:
        with torch.no_grad():
            for _ in range(examples // 64):
                forward()

    variants = {"waiting": lambda: run(True), "background": lambda: run(False), "forward": only}
    times = bench.time("overlap", variants, before=lambda _name: os.sync())
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

            times = bench.time(f"{dtype}, {compression}", {"write": write})
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
