"""Overhead of a sweep: the sweep command with twelve jobs, against its twelve probe stages alone.

    python benchmarks/sweep.py [--quick]

The baseline runs twelve probe stages one after the other in one process in which everything is imported. The candidate is the
command ``groundscope -m stages=[examples,trace,probe] probe.folds=… probe.seed=…`` with twelve jobs over the same cache:
starting Python, imports, composing each job, taking the trace from the cache, the probes, the table and the report. Both run
in alternating order, and use a trace that was made before. Figures, as medians over rounds:

sweep_vs_stages, sweep_vs_stages_processor
    time of the sweep divided by that of the stages, in wall-clock time and in processor time; the second is independent of
    what else the computer does;
traces_made
    runs that traced activations instead of taking them from the cache;
help_s
    seconds of ``groundscope --help``;
page_mb
    size of the sweep's report in MB;
stages_s, sweep_s
    wall-clock seconds of both.
"""

from __future__ import annotations

import io
import json
import os
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
from rich.table import Table

# The root comes first: benchmarks/probes.py has the name of a package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._harness import describe_device, figure, finish, option_parser, print_figures, progress, wide_console
from experiments.cli.overrides import compose
from experiments.pipeline import execute
from experiments.run.context import Context
from experiments.run.folder import RunFolder, read_receipt
from experiments.stages.registry import TABLE

ROOT = Path(__file__).resolve().parent.parent
FOLDS, SEEDS = (2, 3, 4), (0, 1, 2, 3)
QUIET = Console(file=io.StringIO())


Seconds = tuple[float, float]
"""Wall-clock seconds and processor seconds."""


def run_stages(options: list[str], folder: Path) -> Seconds:
    """Return the seconds of twelve probe stages over a run's cache, run one after the other in this process."""
    base, _ = compose(options)
    run = RunFolder(Path(base.root) / base.name)
    wall, processor = 0.0, 0.0
    for number, (folds, seed) in enumerate((f, s) for f in FOLDS for s in SEEDS):
        context = Context(replace(base, probe=replace(base.probe, folds=folds, seed=seed)), run, QUIET)
        stage_folder = folder / f"probes-{number}"
        stage_folder.mkdir()
        wall_start, processor_start = time.perf_counter(), time.process_time()
        TABLE["probe"].work(context, stage_folder)
        wall += time.perf_counter() - wall_start
        processor += time.process_time() - processor_start
    return wall, processor


def run_sweep(options: list[str], cwd: Path) -> Seconds:
    """Return the seconds of the sweep command with twelve jobs."""
    values = [f"probe.folds={','.join(map(str, FOLDS))}", f"probe.seed={','.join(map(str, SEEDS))}"]
    return run_command(["-m", *options, *values, "sweep.name=bench"], cwd)


def run_command(arguments: list[str], cwd: Path) -> Seconds:
    """Return the seconds of a command, from the start of its process to the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "experiments", *arguments], cwd=cwd, env=environment, check=True, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, used


def count_traces(root: Path) -> tuple[int, int]:
    """Return the number of runs below `root` with a trace, and how many of them did not take it from the cache."""
    receipts = [r for p in root.rglob("activations/stage.json") if (r := read_receipt(p.parent)) is not None]
    return len(receipts), sum(not receipt.origin for receipt in receipts)


def main() -> None:
    """Run, print tables, and as the last line one JSON object."""
    quick = option_parser(__doc__, quick="one round on fewer scenes").parse_args().quick
    rounds, scenes = (1, 40) if quick else (3, 60)
    stage_times: list[Seconds] = []
    sweep_times: list[Seconds] = []
    help_times: list[float] = []
    options = [f"data.n_images={scenes}", "data.test_images=10", "threads=1", "trace=heads"]
    options.append("probe.concepts=[object:named,attribute:named,relation:named]")
    options.append("stages=[examples,trace,probe]")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.chdir(root)
        with progress("tracing"):
            config, _ = compose([*options, "stages=[examples,trace]"])
            execute(config, QUIET)
        for number in range(rounds):
            round_folder = root / f"round-{number}"
            round_folder.mkdir()

            def time_stages(round_folder: Path = round_folder) -> None:
                stage_times.append(run_stages(options, round_folder))

            def time_sweep() -> None:
                shutil.rmtree(root / "runs" / "sweeps", ignore_errors=True)
                sweep_times.append(run_sweep(options, root))

            with progress(f"round {number + 1} of {rounds}"):
                for work in (time_stages, time_sweep) if number % 2 == 0 else (time_sweep, time_stages):
                    work()
                help_times.append(run_command(["--help"], root)[0])
        runs, traces = count_traces(root / "runs")
        sweep_folder = root / "runs" / "sweeps" / "bench"
        jobs = json.loads((sweep_folder / "sweep.json").read_text())["jobs"]
        page = (sweep_folder / "report.html").stat().st_size / 1e6
    ratio, processor_ratio = (
        statistics.median(s[k] / a[k] for s, a in zip(sweep_times, stage_times, strict=True)) for k in (0, 1)
    )
    stages, sweep = ([statistics.median(t[k] for t in times) for k in (0, 1)] for times in (stage_times, sweep_times))
    title = f"{len(jobs)} jobs over one cache of {scenes} scenes, medians of {rounds}"
    table = Table("", "wall-clock, s", "processor, s", title=title)
    table.add_row("probe stages alone", *(f"{seconds:.1f}" for seconds in stages))
    table.add_row("sweep command", *(f"{seconds:.1f}" for seconds in sweep))
    wide_console().print(table)
    figures = {
        "sweep_vs_stages": figure(ratio, "<= 1.2", rounds),
        "sweep_vs_stages_processor": figure(processor_ratio, "<= 1.2", rounds),
        "traces_made": figure(traces, "= 1", runs),
        "help_s": figure(statistics.median(help_times), "<= 2", rounds),
        "page_mb": figure(page, "<= 5"),
        "stages_s": figure(stages[0], "", rounds),
        "sweep_s": figure(sweep[0], "", rounds),
    }
    print_figures(figures)
    finish("sweep", describe_device(), figures)


if __name__ == "__main__":
    main()
