"""Several runs from one command: their folders, their state, and their results as one table and one page.

Jobs are runs in ``<root>/sweeps/<name>/<options that differ>``, started by a Hydra launcher. They share stages like all runs
below a root (`experiments.run.stage_cache`). Parts of one trace (``trace.shard``) are jobs of one run. A failed job records its
error and does not stop the others; the command then lists it and ends with status 1.
"""

from __future__ import annotations

import csv
import io
import re
import shlex
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.cli.overrides import Request, quoted, to_config
from experiments.cli.resume import command_line_only
from experiments.config import SWEEPS, RunConfig
from experiments.records import JOB, SWEEP_RECORD, read_record
from experiments.results.headlines import headlines
from experiments.run.folder import OWN, RECEIPT, Stopped, stamp, write_json, write_text
from groundscope.core.document_digest import value_digest
from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.locks import lock
from groundscope.core.paths import below, files_below, is_file
from groundscope.core.text import format_count

Row = dict[str, Any]
JOBS = ".jobs"
RECORD = "sweep.json"
_LONGEST = 100
"""Largest length of the folder name of a job, in characters."""


def start(
    request: Request, config: RunConfig, params: Sequence[str], launch: Callable[[list[str]], None], console: Console
) -> int:
    """Run a sweep and write its results.

    Parameters
    ----------
    request
        The command line.
    config
        The configuration of its first job.
    params
        Options that a choice of the group `sweep` varies.
    launch
        Starts the jobs with further overrides, and returns when all have ended.
    console
        Receives failures and the paths of the results.

    Returns
    -------
    int
        Exit status: 0, or 1 if a job failed.
    """
    by = list(dict.fromkeys([*request.swept, *params]))
    named = _have_names(by, [o.input_line or "" for o in request.overrides])
    name = config.sweep.name or ("default" if named else config.name.replace("/", "-"))
    folder = sweep_folder(config.root, name)
    command = [o.input_line or "" for o in request.overrides]
    locked = f"another groundscope process is running the sweep '{folder}'"
    with lock(folder / ".lock", refuse=lambda who: f"{locked} ({who}): wait for it, or choose another sweep.name=…"):
        earlier = _earlier(folder)
        for old in _job_files(folder):
            old.unlink()
        about = {"command": [*request.flags, *command], "by": by, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        # Jobs whose stages are all unchanged keep their earlier seconds.
        write_json(folder / RECORD, about | {"jobs": earlier})
        problem = ""
        try:
            launch([f"++sweep.name={quoted(name)}", f"++sweep.by=[{','.join(map(quoted, by))}]"])
        except GroundscopeError:
            raise
        except KeyboardInterrupt as stop:
            raise Stopped(folder) from stop
        except Exception as error:  # noqa: BLE001  a process of the launcher was killed, for example: report the jobs all the same
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        return _report(folder, about, problem, console)


def job(options: Any, hydra: Any) -> None:
    """Run one job of a sweep; an error goes into its record."""
    from experiments.pipeline import execute

    config = to_config(options)
    number, tasks = int(hydra.job.num), [str(o) for o in hydra.overrides.task]
    config = replace(config, name=job_name(config, tasks))
    sweep = sweep_folder(config.root, str(config.sweep.name))
    path = below(sweep, f"{JOBS}/{number}.json", error=ConfigError)
    folder = Path(config.root) / config.name
    record: dict[str, Any] = {
        "job": number,
        "options": {key: value for key, value in map(_split, tasks) if key in config.sweep.by},
        "folder": str(folder),
        "status": "stopped",
    }
    write_json(path, record)
    start, before = time.perf_counter(), _receipts(folder)
    try:
        execute(config)
        record["status"] = "done"
    except Exception as error:  # noqa: BLE001  no error of a job stops the others
        record |= {"status": "failed", "error": f"{error}" or type(error).__name__}
        if not isinstance(error, GroundscopeError):
            record |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    record["seconds"] = round(time.perf_counter() - start, 2)
    if record["status"] == "done" and before == _receipts(folder):
        same = [j for j in _earlier(sweep) if (j["folder"], j["options"], j["status"]) == _identity(record)]
        record["seconds"] = next((j["seconds"] for j in same if j.get("seconds") is not None), record["seconds"])
    write_json(path, record)


def sweep_folder(root: str | Path, name: str) -> Path:
    """Return the folder of a sweep; raise `ConfigError` if its name is not one plain name, or the folder is a link."""
    if "/" in name:
        msg = f"sweep.name='{name}': the name of a sweep is one plain name, below ROOT/{SWEEPS}; root=… moves all runs"
        raise ConfigError(msg)
    return below(Path(root), f"{SWEEPS}/{name}", error=ConfigError)


def _identity(record: Mapping[str, Any]) -> tuple[object, ...]:
    return record["folder"], record["options"], record["status"]


def _receipts(folder: Path) -> dict[str, list[int]]:
    """Return size and modification time of every receipt of a run."""
    return {name: stamp(folder / name / RECEIPT) for name in OWN if is_file(folder / name / RECEIPT)}


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """Return the job records of the last finished sweep in a folder; none if they cannot be read."""
    try:
        return read_record(folder / RECORD, SWEEP_RECORD).get("jobs") or []
    except ConfigError:
        return []


def _job_files(folder: Path) -> list[Path]:
    """Return the files of the job records of a sweep, by number."""
    jobs = below(folder, JOBS, error=ConfigError)
    names = [n for n, _ in files_below(jobs) if n.endswith(".json") and n.removesuffix(".json").isdecimal()]
    return [jobs / n for n in sorted(names, key=lambda n: int(n.removesuffix(".json")))]


def job_name(config: RunConfig, overrides: Sequence[str]) -> str:
    """Return the name of the run of a job: its option `name` if that differs between jobs, else the options that differ."""
    by = list(config.sweep.by)
    if _have_names(by, overrides):
        return config.name
    parts = [f"{key}={value}" for key, value in map(_split, overrides) if key in by and key != "trace.shard"]
    if not parts:
        return config.name
    written = ",".join(parts)
    plain = re.sub(r"[^\w.=,+-]+", "_", written)
    if plain != written or len(plain) > _LONGEST:
        plain = f"{plain[: _LONGEST - 9]}-{value_digest(written)[:8]}"
    return f"{SWEEPS}/{config.sweep.name}/{plain}"


def _have_names(by: Sequence[str], overrides: Sequence[str]) -> bool:
    return "name" in by or any(o.lstrip("+").startswith("name=") and "${" in o for o in overrides)


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+~").partition("=")
    return key, value.strip("'\"")


def _report(folder: Path, about: dict[str, Any], problem: str, console: Console) -> int:
    """Collect the results of the jobs, write the table and the page, and print failures."""
    records = [read_record(path, JOB) for path in _job_files(folder)]
    rows = collect_results(records)
    write_json(folder / RECORD, about | {"jobs": records, "figures": rows, "launcher": problem or None})
    console.print(
        f"sweep: {sum(r['status'] == 'done' for r in records)} of {format_count(len(records), 'job')} done",
        markup=False,
    )
    if rows:
        from experiments.report.sweep import make_sweep_report

        write_csv(folder / "sweep.csv", rows)
        write_text(folder / "report.html", make_sweep_report(folder, about["by"], records, rows))
        console.print(f"table: {folder / 'sweep.csv'}", markup=False)
        console.print(f"report: {folder / 'report.html'}", markup=False)
    for record in records:
        if record["status"] != "done":
            options = " ".join(f"{k}={v}" for k, v in record["options"].items())
            error = record.get("error", "its process ended early, or is still running")
            console.print(f"  {record['status']} {options}: {error}", style="red", markup=False)
    if problem:
        console.print(f"  launcher: {problem}", style="red", markup=False)
    if problem or any(r["status"] != "done" for r in records):
        # Options that are not taken from the file of the sweep are repeated.
        command = [f"resume={folder}", *(word for word in about["command"] if command_line_only(word))]
        console.print(f"continue with: groundscope {shlex.join(command)}", markup=False)
        return 1
    return 0


def collect_results(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the results of the finished jobs as a tidy table.

    Parameters
    ----------
    records
        Number, options, folder and status of each job.

    Returns
    -------
    list of dict
        ``job``, ``folder``, one column for each option that differs between jobs, then ``stage``, ``measure``, ``value``,
        ``low``, ``high``, ``control``, ``main``. Jobs of the same run appear once.
    """
    rows: list[Row] = []
    folders: set[str] = set()
    for record in records:
        if record["status"] != "done" or record["folder"] in folders:
            continue
        folders.add(record["folder"])
        start = {"job": record["job"], "folder": record["folder"], **record["options"]}
        rows += [start | asdict(figure) for figure in headlines(Path(record["folder"]))]
    return rows


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV in UTF-8; empty cells are missing values."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
