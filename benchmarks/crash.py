"""Durability of the activation store when writers are killed with SIGKILL (kill -9).

    python benchmarks/crash.py [--quick] [--kills 200] [--workers 3] [--seed 0]

Several writer processes, each with its own sequence of shards, write one store. At random moments, from before the first byte
to the writing of the manifest, random subsets of them are killed and restarted, until `--kills` kills have been made. A
writer acknowledges an example once `StoreWriter.sealed_ids` contains its id. The baseline is a store written without kills.
Figures, all with goal 0:

lost
    acknowledged examples that are not in the sealed shards after a kill, or whose values differ;
runs_not_identical
    finished stores whose files differ in any byte from those of the baseline;
runs_not_clean
    finished stores in which `verify` reports a problem.

``left_unfinished`` counts what the killed writers left behind (a part of a shard, of the index or of the manifest, or nothing):
it shows that the kills hit different states of the writers.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import h5py
import numpy as np

from activation_store import ActivationStore, ArrayInfo, Ragged, Schema, StoreWriter, verify
from benchmarks._harness import describe_device, figure, finish, option_parser, print_figures, progress, wide_console

INFO = ArrayInfo("decoder", "z", "last", n_layers=4, width=64, n_heads=8)
TOKENS = ArrayInfo("decoder", "resid_post", "image:all", n_layers=2, width=16, ragged=True)
SCHEMA = Schema((INFO, TOKENS), "float16")
PROVENANCE = {"model": "random", "dataset": "random"}
SHARD_SIZE, BATCH_SIZE = 16, 5
MAX_KILLS_PER_STORE = 20


@dataclass(frozen=True)
class Job:
    """The store that all writers write together."""

    folder: Path
    workers: int
    examples: int
    """Examples of each writer."""

    def ids(self, worker: int) -> list[str]:
        """Return the ids of a writer's examples."""
        return [f"w{worker}-{i}" for i in range(self.examples)]


@functools.cache
def make_values(name: str) -> np.ndarray:
    """Return the values [L, D] of an example: random numbers seeded with its id."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    return np.random.default_rng(seed).normal(size=(4, 64)).astype(np.float16)


def write(job: Job, worker: int, sender: Connection | None) -> None:
    """Write the missing examples of one writer; send the ids of acknowledged examples."""
    with StoreWriter(
        job.folder, SCHEMA, PROVENANCE, worker=worker, workers=job.workers, shard_size=SHARD_SIZE
    ) as writer:
        names, unacknowledged = job.ids(worker), set(job.ids(worker))
        for start in range(0, len(names), BATCH_SIZE):
            batch = names[start : start + BATCH_SIZE]
            values = np.stack([make_values(name) for name in batch]).astype(np.float32)
            tokens = Ragged.of(
                [value[:2, : 16 * (1 + k % 3)].reshape(-1, 2, 16) for k, value in enumerate(values, start)]
            )
            writer.append(
                {INFO.key: values, TOKENS.key: tokens},
                {"id": batch, "group": batch, "object:cat": [len(name) % 2 == 0 for name in batch]},
            )
            if sender is not None:
                # The pipe is read only after the writer's end, so its content must fit into the buffer: send each id once.
                sender.send(acknowledged := unacknowledged & writer.sealed_ids)
                unacknowledged -= acknowledged
    if sender is not None:
        sender.send(unacknowledged)
        sender.close()


class WriterGroup:
    """The writer processes of one store, which are killed and restarted."""

    def __init__(self, job: Job, seed: int) -> None:
        self._job = job
        self._random = random.Random(seed)
        self._context = multiprocessing.get_context("fork")  # writers start without the time for imports
        self._running: dict[int, tuple[ForkProcess, Any]] = {}
        self.acknowledged: set[str] = set()
        self.kill_times: list[float] = []
        """Seconds between the start of the writers and each kill."""
        self.unfinished: Counter[str] = Counter()
        """Number of killed writers by the kind of file that they left unfinished."""

    def start(self) -> None:
        """Start every writer that is not running."""
        for worker in set(range(self._job.workers)) - self._running.keys():
            receiver, sender = self._context.Pipe(duplex=False)
            process = self._context.Process(target=write, args=(self._job, worker, sender))
            process.start()
            sender.close()
            self._running[worker] = (process, receiver)

    def kill(self, max_delay: float, max_kills: int) -> None:
        """Kill a random subset of writers after a random delay; writers that had finished before are not counted."""
        count = self._random.randint(1, min(max_kills, self._job.workers))
        workers = self._random.sample(range(self._job.workers), count)
        delay = self._random.uniform(0, max_delay)
        time.sleep(delay)
        processes = {worker: self._running[worker][0] for worker in workers}
        for process in processes.values():
            process.kill()
        for worker, process in processes.items():
            self._join(worker)
            if process.exitcode == -signal.SIGKILL:
                self.kill_times.append(delay)
                suffix = f".worker-{worker}."
                parts = [p.name.split(suffix)[0] for p in self._job.folder.glob(f"*{suffix}*.part")]
                self.unfinished[parts[0].split("-")[0].split(".")[0] if parts else "nothing"] += 1
            elif process.exitcode:
                msg = f"writer {worker} ended with exit code {process.exitcode} without being killed"
                raise RuntimeError(msg)

    def _join(self, worker: int) -> None:
        """Wait until a writer has ended, and collect the ids that it acknowledged."""
        process, receiver = self._running.pop(worker)
        try:
            while True:
                self.acknowledged |= receiver.recv()
        except EOFError:
            pass
        process.join()

    def finish(self) -> None:
        """Wait until every running writer has ended."""
        for worker in list(self._running):
            self._join(worker)

    def count_lost(self) -> int:
        """Return how many acknowledged examples are missing in the store, plus how many stored ones have wrong values."""
        if not self.acknowledged:
            return 0
        store = ActivationStore(self._job.folder)
        ids = store.columns["id"].tolist()
        values = store.read("decoder.L3.z", "last")
        wrong = {
            name for name, value in zip(ids, values, strict=True) if not np.array_equal(value, make_values(name)[3])
        }
        return len(self.acknowledged - set(ids)) + len(wrong)


def _read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_writers(
    kills: int, workers: int, seed: int, examples: int = 160
) -> tuple[Counter[str], Counter[str], list[float]]:
    """Write stores, one after the other, killing writers until `kills` writers were killed.

    Returns
    -------
    counts
        Numbers of stores (``runs``) and of failures by figure.
    unfinished
        Number of killed writers by the kind of file that they left unfinished.
    kill_times
        Seconds between the start of the writers and each kill.
    """
    counts: Counter[str] = Counter()
    unfinished: Counter[str] = Counter()
    kill_times: list[float] = []
    with tempfile.TemporaryDirectory() as name, progress("kills", kills) as advance:
        baseline = Job(Path(name) / "baseline", workers, examples)
        start = time.perf_counter()
        for worker in range(workers):
            write(baseline, worker, None)
        # Writers run in parallel on shared cores: within this delay several kills happen before a writer has finished.
        max_delay = (time.perf_counter() - start) / workers
        expected = _read_files(baseline.folder)
        while len(kill_times) < kills:
            job = Job(Path(name) / f"run-{counts['runs']}", workers, examples)
            job.folder.mkdir()
            group = WriterGroup(job, seed + counts["runs"])
            # Many kills per store, so that kills hit shards in every state, and also the last shard and the manifest.
            limit = min(MAX_KILLS_PER_STORE, kills - len(kill_times))
            while len(group.kill_times) < limit and not (job.folder / "manifest.json").exists():
                group.start()
                group.kill(max_delay, limit - len(group.kill_times))
                counts["lost"] += group.count_lost()
            group.start()  # the user runs the same command again
            group.finish()
            group.start()  # and again: also the writers that had finished before others were killed
            group.finish()
            counts["lost"] += group.count_lost()
            counts["runs"] += 1
            counts["runs_not_clean"] += not verify(job.folder).ok
            counts["runs_not_identical"] += _read_files(job.folder) != expected
            kill_times += group.kill_times
            unfinished += group.unfinished
            advance(len(group.kill_times))
    return counts, unfinished, kill_times


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="40 kills")
    parser.add_argument("--kills", type=int, default=200, help="number of kills")
    parser.add_argument("--workers", type=int, default=3, help="writer processes of a store")
    parser.add_argument("--seed", type=int, default=0, help="seed of the delays and of the choice of writers")
    options = parser.parse_args()
    wide_console().print("Compares stores whose writers were killed with a store written without kills.")
    start = time.perf_counter()
    counts, unfinished, kill_times = kill_writers(40 if options.quick else options.kills, options.workers, options.seed)
    seconds = round(time.perf_counter() - start)
    figures = {
        name: figure(counts[name], "= 0", len(kill_times)) for name in ("lost", "runs_not_identical", "runs_not_clean")
    }
    print_figures(figures, f"{len(kill_times)} kills of {options.workers} writers in {counts['runs']} stores")
    states = ", ".join(f"{kind} {n}" for kind, n in unfinished.most_common())
    wide_console().print(
        f"Median time of a kill: {1000 * statistics.median(kill_times):.0f} ms after the start. "
        f"Left unfinished: {states}. {seconds} s."
    )
    finish(
        "crash",
        f"{describe_device('h5py')}, HDF5 {h5py.version.hdf5_version}",
        figures,
        runs=counts["runs"],
        left_unfinished=unfinished,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
