"""What a kill -9 costs: writers are killed at random moments, go on, and must end as if nothing had happened.

    python benchmarks/crash.py [--quick] [--kills 200] [--workers 3] [--seed 0]

Several writers, each a process with its own stream of shards, write one store. At a random moment, from before the first
byte to the writing of the manifest, some of them, drawn at random, are killed at once and started again, until so many were
killed. A writer acknowledges an example by telling it once `StoreWriter.written` names it. After every such moment all that
was acknowledged must be in the sealed shards, and everything there must be what was written; at the end the folder must be
the same to the bit as one that was written without a kill, and `verify` must find nothing. What a killed writer left
unfinished (a shard, the index, a manifest) is counted, as kills that all met one state would prove little.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import h5py
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from activation_store import ActivationStore, ArrayInfo, Ragged, Schema, StoreWriter, verify

INFO = ArrayInfo("decoder", "z", "last", n_layers=4, width=64, n_heads=8)
TOKENS = ArrayInfo("decoder", "resid_post", "image:all", n_layers=2, width=16, ragged=True)
SCHEMA = Schema((INFO, TOKENS), "float16")
PROVENANCE = {"model": "random", "dataset": "random"}
SHARD, BATCH = 16, 5


@dataclass(frozen=True)
class Job:
    """What all writers of a run write."""

    folder: Path
    workers: int
    examples: int
    """For each writer."""

    def ids(self, worker: int) -> list[str]:
        """Return the ids of a writer's examples."""
        return [f"w{worker}-{i}" for i in range(self.examples)]


@functools.cache
def dense(name: str) -> np.ndarray:
    """Return the values [L, D] of an example, which its name decides."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    return np.random.default_rng(seed).normal(size=(4, 64)).astype(np.float16)


def write(job: Job, worker: int, told: Any | None) -> None:
    """Write the examples of one writer that are not there yet, telling how many are safe."""
    with StoreWriter(job.folder, SCHEMA, PROVENANCE, worker, SHARD, workers=job.workers) as writer:
        names, untold = job.ids(worker), set(job.ids(worker))
        for at in range(0, len(names), BATCH):
            some = names[at : at + BATCH]
            values = np.stack([dense(name) for name in some]).astype(np.float32)
            tokens = Ragged.of([value[:2, : 16 * (1 + k % 3)].reshape(-1, 2, 16) for k, value in enumerate(values, at)])
            writer.append(
                {INFO.key: values, TOKENS.key: tokens},
                {"id": some, "group": some, "object:cat": [len(name) % 2 == 0 for name in some]},
            )
            if told is not None:
                # Each name is told once, so that all of them fit into the pipe: nobody listens before the end.
                told.send(new := untold & writer.written)
                untold -= new
    if told is not None:
        told.send(untold)
        told.close()


class Run:
    """Writers at work, killed and started again."""

    def __init__(self, job: Job, seed: int) -> None:
        self._job = job
        self._random = random.Random(seed)
        self._context = multiprocessing.get_context("fork")  # a writer begins with all its modules there
        self._running: dict[int, tuple[ForkProcess, Any]] = {}
        self.acknowledged: set[str] = set()
        self.moments: list[float] = []
        """Seconds after the others went on at which a writer was killed."""
        self.left: Counter[str] = Counter()
        """How many killed writers left what unfinished."""

    def start(self) -> None:
        """Start every writer that is not there."""
        for worker in set(range(self._job.workers)) - self._running.keys():
            hears, tells = self._context.Pipe(duplex=False)
            process = self._context.Process(target=write, args=(self._job, worker, tells))
            process.start()
            tells.close()
            self._running[worker] = (process, hears)

    def kill(self, longest: float, most: int) -> None:
        """Kill some writers at a random moment; those that had finished by then do not count."""
        workers = self._random.sample(range(self._job.workers), self._random.randint(1, min(most, self._job.workers)))
        moment = self._random.uniform(0, longest)
        time.sleep(moment)
        processes = {worker: self._running[worker][0] for worker in workers}
        for process in processes.values():
            process.kill()
        for worker, process in processes.items():
            self.end(worker)
            if process.exitcode == -signal.SIGKILL:
                self.moments.append(moment)
                parts = [
                    p.name.split(f".worker-{worker}.")[0] for p in self._job.folder.glob(f"*.worker-{worker}.*.part")
                ]
                self.left["nothing" if not parts else parts[0].split("-")[0].split(".")[0]] += 1
            elif process.exitcode:
                msg = f"writer {worker} ended with {process.exitcode}, not by us"
                raise RuntimeError(msg)

    def end(self, worker: int) -> None:
        """Wait for a writer's end, and take down what it acknowledged."""
        process, hears = self._running.pop(worker)
        try:
            while True:
                self.acknowledged |= hears.recv()
        except EOFError:
            pass
        process.join()

    def finish(self) -> None:
        """Let every writer that is there come to its end."""
        for worker in list(self._running):
            self.end(worker)

    def lost(self) -> int:
        """Return how many acknowledged examples are not in the store, or not as they were written."""
        if not self.acknowledged:
            return 0
        store = ActivationStore(self._job.folder)
        ids = store.columns["id"].tolist()
        values = store.read("decoder.L3.z", "last")
        wrong = {name for name, value in zip(ids, values, strict=True) if not np.array_equal(value, dense(name)[3])}
        return len(self.acknowledged - set(ids)) + len(wrong)


def torture(kills: int, workers: int, seed: int, examples: int = 160) -> tuple[Counter[str], Counter[str], list[float]]:
    """Kill writers so many times; return counts of what was wrong, what was left unfinished, and the moments in seconds."""
    found: Counter[str] = Counter()
    left: Counter[str] = Counter()
    moments: list[float] = []
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name, Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("killing writers", total=kills)
        whole = Job(Path(name) / "whole", workers, examples)
        start = time.perf_counter()
        for worker in range(workers):
            write(whole, worker, None)
        longest = (time.perf_counter() - start) / workers  # as they share the machine, several kills before one is done
        expected = {p.name: p.read_bytes() for p in whole.folder.iterdir()}
        while len(moments) < kills:
            job = Job(Path(name) / f"run-{found['runs']}", workers, examples)
            job.folder.mkdir()
            run = Run(job, seed + found["runs"])
            # Each run is killed many times, so that kills meet shards in every state, the last one and the manifest too.
            while (more := min(20, kills - len(moments)) - len(run.moments)) > 0 and not (
                job.folder / "manifest.json"
            ).exists():
                run.start()
                run.kill(longest, more)
                found["lost"] += run.lost()
            run.start()  # as the user does: the same command again
            run.finish()
            run.start()  # and once more, those too that had finished before others were killed
            run.finish()
            found["lost"] += run.lost()
            found["runs"] += 1
            found["runs_not_clean"] += not verify(job.folder).ok
            found["runs_not_identical"] += {p.name: p.read_bytes() for p in job.folder.iterdir()} != expected
            moments += run.moments
            left += run.left
            progress.update(task, completed=len(moments))
    return found, left, moments


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 kills")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    Console().print("Compares stores whose writers were killed with one whose writers were not.")
    kills = 40 if options.quick else options.kills
    start = time.perf_counter()
    found, left, moments = torture(kills, options.workers, options.seed)
    took = time.perf_counter() - start
    figures = {
        name: {"value": found[name], "goal": "= 0", "holds": found[name] == 0, "n": len(moments)}
        for name in ("lost", "runs_not_identical", "runs_not_clean")
    }
    title = f"{len(moments)} kills of {options.workers} writers in {found['runs']} runs"
    table = Table("figure", "value", "goal", "holds", title=title)
    for name, figure in figures.items():
        table.add_row(name, str(figure["value"]), str(figure["goal"]), str(figure["holds"]))
    Console().print(table)
    states = ", ".join(f"{what} {n}" for what, n in left.most_common())
    Console().print(
        f"Killed {1000 * statistics.median(moments):.0f} ms in (median); left unfinished: {states}. {took:.0f} s."
    )
    device = f"{platform.machine()}, {os.cpu_count()} cores, h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
    record = {
        "benchmark": "crash",
        "device": device,
        "runs": found["runs"],
        "left_unfinished": left,
        "seconds": round(took),
    }
    print(json.dumps({**record, "figures": figures}))


if __name__ == "__main__":
    main()
