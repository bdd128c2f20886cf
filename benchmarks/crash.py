"""What a kill -9 costs: writers are killed at random moments, go on, and must end as if nothing had happened.

    python benchmarks/crash.py [--quick] [--kills 200] [--workers 3] [--seed 0]

Several writers, each a process with its own stream of shards, write one store. One of them, drawn at random, is killed at
a random moment, from before its first byte to the writing of the manifest, and started again, until so many kills have
happened. A writer acknowledges an example by telling it once `StoreWriter.written` names it. After every kill all that was
acknowledged must be in the sealed shards, and everything there must be what was written; at the end the folder must be the
same to the bit as one that was written without a kill, and `verify` must find nothing.
"""

from __future__ import annotations

import argparse
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


def dense(name: str) -> np.ndarray:
    """Return the values [L, D] of an example, which its name decides."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    return np.random.default_rng(seed).normal(size=(4, 64)).astype(np.float16)


def write(job: Job, worker: int, told: Any | None) -> None:
    """Write the examples of one writer that are not there yet, telling how many are safe."""
    with StoreWriter(job.folder, SCHEMA, PROVENANCE, worker, SHARD, workers=job.workers) as writer:
        names = job.ids(worker)
        for at in range(0, len(names), BATCH):
            some = names[at : at + BATCH]
            values = np.stack([dense(name) for name in some]).astype(np.float32)
            tokens = Ragged.of([value[:2, : 16 * (1 + k % 3)].reshape(-1, 2, 16) for k, value in enumerate(values, at)])
            writer.append(
                {INFO.key: values, TOKENS.key: tokens},
                {"id": some, "group": some, "object:cat": [len(name) % 2 == 0 for name in some]},
            )
            if told is not None:
                told.send([name for name in writer.written if name.startswith(f"w{worker}-")])
    if told is not None:
        told.send(names)
        told.close()


class Run:
    """Writers at work, killed and started again."""

    def __init__(self, job: Job, seed: int) -> None:
        self._job = job
        self._random = random.Random(seed)
        self._context = multiprocessing.get_context("fork")
        self._running: dict[int, tuple[ForkProcess, Any]] = {}
        self.acknowledged: dict[int, set[str]] = {w: set() for w in range(job.workers)}
        self.moments: list[float] = []
        """Seconds after its start at which a writer was killed."""

    def start(self, worker: int) -> None:
        """Start a writer."""
        hears, tells = self._context.Pipe(duplex=False)
        process = self._context.Process(target=write, args=(self._job, worker, tells))
        process.start()
        tells.close()
        self._running[worker] = (process, hears)

    def kill(self, longest: float) -> None:
        """Kill a writer at a random moment; one that had finished by then does not count."""
        worker = self._random.randrange(self._job.workers)
        process, _ = self._running[worker]
        moment = self._random.uniform(0, longest)
        time.sleep(moment)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
        self.end(worker)
        if process.exitcode == -signal.SIGKILL:
            self.moments.append(moment)
        elif process.exitcode:
            msg = f"writer {worker} ended with {process.exitcode}, not by us"
            raise RuntimeError(msg)

    def end(self, worker: int) -> None:
        """Wait for a writer's end, and take down what it acknowledged."""
        process, hears = self._running.pop(worker)
        try:
            while True:
                self.acknowledged[worker] |= set(hears.recv())
        except EOFError:
            pass
        process.join()

    def finish(self) -> None:
        """Let every writer that is there come to its end."""
        for worker in list(self._running):
            self.end(worker)

    def lost(self) -> int:
        """Return how many acknowledged examples are not in the store, or not as they were written."""
        wanted = set().union(*self.acknowledged.values())
        if not wanted:
            return 0
        store = ActivationStore(self._job.folder)
        ids = store.columns["id"].tolist()
        values = store.read("decoder.L3.z", "last")
        wrong = {name for name, value in zip(ids, values, strict=True) if not np.array_equal(value, dense(name)[3])}
        return len(wanted - set(ids)) + len(wrong)


def torture(kills: int, workers: int, seed: int, examples: int = 160) -> dict[str, float]:
    """Kill writers so many times, and return what was lost and whether each run ended as it should."""
    totals = {"kills": 0.0, "lost": 0.0, "runs": 0.0, "runs_not_identical": 0.0, "runs_not_clean": 0.0}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name, Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("killing writers", total=kills)
        whole = Job(Path(name) / "whole", workers, examples)
        start = time.perf_counter()
        for worker in range(workers):
            write(whole, worker, None)
        longest = 0.4 * (time.perf_counter() - start) / workers  # several kills before a writer is done
        expected = {p.name: p.read_bytes() for p in whole.folder.iterdir()}
        moments: list[float] = []
        while totals["kills"] < kills:
            job = Job(Path(name) / f"run-{totals['runs']:.0f}", workers, examples)
            job.folder.mkdir()
            run = Run(job, seed + int(totals["runs"]))
            # Each run is killed many times, so that kills meet shards in every state, the last one and the manifest too.
            while len(run.moments) < min(20, kills - totals["kills"]) and not (job.folder / "manifest.json").exists():
                for worker in set(range(workers)) - run._running.keys():
                    run.start(worker)
                run.kill(longest)
                totals["lost"] += run.lost()
            run.finish()
            for worker in range(workers):  # as the user does: the same command again
                run.start(worker)
            run.finish()
            totals["lost"] += run.lost()
            totals["runs"] += 1
            totals["kills"] += len(run.moments)
            moments += run.moments
            progress.update(task, completed=totals["kills"])
            totals["runs_not_clean"] += not verify(job.folder).ok
            totals["runs_not_identical"] += {p.name: p.read_bytes() for p in job.folder.iterdir()} != expected
    return {**totals, "median_moment_ms": 1000 * statistics.median(moments)}


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 kills")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    Console().print("Compares stores whose writers were killed with one whose writers were not.")
    found = torture(40 if options.quick else options.kills, options.workers, options.seed)
    goals = {"lost": 0, "runs_not_identical": 0, "runs_not_clean": 0}
    n = int(found["kills"])
    figures = {
        name: {"value": int(found[name]), "goal": f"= {goal}", "holds": found[name] == goal, "n": n}
        for name, goal in goals.items()
    }
    title = f"{n} kills of {options.workers} writers in {found['runs']:.0f} runs, median {found['median_moment_ms']:.0f} ms in"
    table = Table("figure", "value", "goal", "holds", title=title)
    for name, figure in figures.items():
        table.add_row(name, str(figure["value"]), str(figure["goal"]), str(figure["holds"]))
    Console().print(table)
    device = f"{platform.machine()}, {os.cpu_count()} cores, h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
    print(json.dumps({"benchmark": "crash", "device": device, "figures": figures}))


if __name__ == "__main__":
    main()
