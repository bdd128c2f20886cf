"""Overhead of a sweep in addition to its stages, and of starting the command.

Compared: twelve probe stages, one after the other in one process that has all it needs loaded, with the whole command
``groundscope -m stages=[examples,trace,probe] probe.folds=… probe.seed=…`` of twelve jobs over the same cache: starting
Python, its imports, composing each job, taking the trace, the probes, the table and the page. In turn, the order
alternating; medians. Both are reported in seconds of the clock and of the processor: the second ratio is what holds on a machine
that does other things too. The trace is made once, before; how often it was made in all is counted in the receipts.

    python benchmarks/sweep.py [--quick]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

# Another benchmark has the name of a package: the root comes first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.cli.overrides import compose
from experiments.pipeline import execute
from experiments.run.context import Context
from experiments.run.folder import RunFolder, read_receipt
from experiments.stages.table import TABLE

ROOT = Path(__file__).resolve().parent.parent
FOLDS, SEEDS = (2, 3, 4), (0, 1, 2, 3)
QUIET = Console(file=io.StringIO())


Seconds = tuple[float, float]
"""Of the clock, and of the processor."""


def probes_alone(options: list[str], folder: Path) -> Seconds:
    """Return the seconds of the twelve probe stages over a run's cache, without anything around them."""
    base, _ = compose(options)
    run = RunFolder(Path(base.root) / base.name)
    clock, processor = 0.0, 0.0
    for number, (folds, seed) in enumerate((f, s) for f in FOLDS for s in SEEDS):
        context = Context(replace(base, probe=replace(base.probe, folds=folds, seed=seed)), run, QUIET)
        at = folder / f"probes-{number}"
        at.mkdir()
        start, used = time.perf_counter(), time.process_time()
        TABLE["probe"].work(context, at)
        clock, processor = clock + time.perf_counter() - start, processor + time.process_time() - used
    return clock, processor


def sweep(options: list[str], cwd: Path) -> Seconds:
    """Return the seconds of the command."""
    values = [f"probe.folds={','.join(map(str, FOLDS))}", f"probe.seed={','.join(map(str, SEEDS))}"]
    return command(["-m", *options, *values, "sweep.name=bench"], cwd)


def command(arguments: list[str], cwd: Path) -> Seconds:
    """Return the seconds of a command, from its start to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "experiments", *arguments], cwd=cwd, env=environment, check=True, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, used


def traces_made(root: Path) -> tuple[int, int]:
    """Return how many runs of a root have a trace, and how many made it themselves."""
    receipts = [r for p in root.rglob("activations/stage.json") if (r := read_receipt(p.parent)) is not None]
    return len(receipts), sum(not r.origin for r in receipts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What a sweep costs.")
    parser.add_argument("--quick", action="store_true", help="one round on fewer scenes")
    quick = parser.parse_args().quick
    rounds, scenes = (1, 40) if quick else (3, 60)
    alone: list[Seconds] = []
    swept: list[Seconds] = []
    starts: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.chdir(folder)
        options = [f"data.n_images={scenes}", "data.test_images=10", "threads=1", "trace=heads"]
        options.append("probe.concepts=[object:named,attribute:named,relation:named]")
        options.append("stages=[examples,trace,probe]")
        composed_once, _ = compose([*options, "stages=[examples,trace]"])
        execute(composed_once, QUIET)
        for number in range(rounds):
            here = folder / f"round-{number}"
            here.mkdir()

            def first(here: Path = here) -> None:
                alone.append(probes_alone(options, here))

            def second() -> None:
                shutil.rmtree(folder / "runs" / "sweeps", ignore_errors=True)
                swept.append(sweep(options, folder))

            for measure in (first, second) if number % 2 == 0 else (second, first):
                measure()
            starts.append(command(["--help"], folder)[0])
        runs, trace_count = traces_made(folder / "runs")
        size = json.loads((folder / "runs" / "sweeps" / "bench" / "sweep.json").read_text())["jobs"]
        page = (folder / "runs" / "sweeps" / "bench" / "report.html").stat().st_size / 1e6
        title = f"{len(size)} jobs over one cache of {scenes} scenes, medians of {rounds}"
    ratio, of_processor = (statistics.median(s[k] / a[k] for s, a in zip(swept, alone, strict=True)) for k in (0, 1))
    print(f"{title:<44} {'clock s':>10} {'processor s':>12}")
    rows = {"twelve probe stages alone": alone, "the whole command, table and page": swept}
    medians = {name: [statistics.median(v[k] for v in values) for k in (0, 1)] for name, values in rows.items()}
    for name, (clock, processor) in medians.items():
        print(f"{name:<44} {clock:>10.1f} {processor:>12.1f}")
    print(f"{'ratio':<44} {ratio:>10.2f} {of_processor:>12.2f}")
    (base, _), (whole, _) = medians.values()
    print(f"{'runs with a trace, and those that made it':<40} {runs:>5}, {trace_count}")
    print(f"{'groundscope --help':<40} {statistics.median(starts):8.2f} s")
    figures = {
        "sweep_vs_stages": {"value": round(ratio, 3), "goal": "<= 1.2", "holds": ratio <= 1.2, "n": rounds},
        "sweep_vs_stages_processor": {
            "value": round(of_processor, 3),
            "goal": "<= 1.2",
            "holds": of_processor <= 1.2,
            "n": rounds,
        },
        "traces_made": {"value": trace_count, "goal": "1", "holds": trace_count == 1, "n": runs},
        "help_s": {
            "value": round(statistics.median(starts), 3),
            "goal": "<= 2",
            "holds": statistics.median(starts) <= 2,
            "n": rounds,
        },
        "page_mb": {"value": round(page, 2), "goal": "<= 5", "holds": page <= 5, "n": 1},
        "stages_s": {"value": round(base, 2), "n": rounds},
        "sweep_s": {"value": round(whole, 2), "n": rounds},
    }
    print(
        json.dumps(
            {"benchmark": "sweep", "device": f"{platform.machine()}, {os.cpu_count()} cores", "figures": figures}
        )
    )


if __name__ == "__main__":
    main()
