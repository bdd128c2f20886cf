"""Several runs from one command: where each lies, what became of it, and all they found as one table and one page.

Jobs are runs of their own in ``<root>/sweeps/<name>/<options they differ in>``, started by whatever Hydra launcher was
chosen, and share stages as any runs of a root do (`sharing`). Parts of one trace (``trace.shard``) are jobs of one run.
A job that fails says so in its record and leaves the others; the command ends with status 1 and lists it.
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

from experiments.cli.overrides import Request, finished, quoted
from experiments.cli.resume import only_here
from experiments.config import SWEEPS, RunConfig
from experiments.records import JOB, SWEEP_RECORD, read_record
from experiments.results.headlines import headlines
from experiments.run.folder import OWN, RECEIPT, Stopped, stamp, write_json, write_text
from groundscope.core.document_digest import value_digest
from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.locks import lock
from groundscope.core.paths import below, files_below, is_file

Row = dict[str, Any]
JOBS = ".jobs"
RECORD = "sweep.json"
_LONGEST = 100
"""Characters of a job's folder name."""


def start(
    request: Request, config: RunConfig, params: Sequence[str], launch: Callable[[list[str]], None], console: Console
) -> int:
    """Run a sweep and write what it found.

    Parameters
    ----------
    request
        The command line.
    config
        The configuration of its first job.
    params
        Options that a choice of the group `sweep` varies.
    launch
        Starts Hydra with further overrides, and returns when all jobs have ended.
    console
        Where failures and the table's place are told.

    Returns
    -------
    int
        Exit status: 0, or 1 where a job failed.
    """
    by = list(dict.fromkeys([*request.swept, *params]))
    own = _own_names(by, [o.input_line or "" for o in request.overrides])
    name = config.sweep.name or ("default" if own else config.name.replace("/", "-"))
    folder = sweep_folder(config.root, name)
    command = [o.input_line or "" for o in request.overrides]
    held = f"another groundscope is at work on the sweep '{folder}'"
    with lock(folder / ".lock", refuse=lambda who: f"{held} ({who}): wait for it, or choose another sweep.name=…"):
        earlier = _earlier(folder)
        for old in _job_files(folder):
            old.unlink()
        about = {"command": [*request.flags, *command], "by": by, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        # Jobs that make nothing this time keep the seconds that they took when they were made.
        write_json(folder / RECORD, about | {"jobs": earlier})
        trouble = ""
        try:
            launch([f"++sweep.name={quoted(name)}", f"++sweep.by=[{','.join(map(quoted, by))}]"])
        except GroundscopeError:
            raise
        except KeyboardInterrupt as stop:
            raise Stopped(folder) from stop
        except Exception as error:  # noqa: BLE001  a launcher's process was killed, say: what the jobs left is told all the same
            trouble = f"{type(error).__name__}: {error}".splitlines()[0]
        return _tell(folder, about, trouble, console)


def job(options: Any, hydra: Any) -> None:
    """Run one job of a sweep; whatever goes wrong goes into its record."""
    from experiments.pipeline import execute

    config = finished(options)
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
    begun, before = time.perf_counter(), _receipts(folder)
    try:
        execute(config)
        record["status"] = "done"
    except Exception as error:  # noqa: BLE001  one job's failure, whatever it is, leaves the others
        record |= {"status": "failed", "error": f"{error}" or type(error).__name__}
        if not isinstance(error, GroundscopeError):
            record |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    record["seconds"] = round(time.perf_counter() - begun, 2)
    if record["status"] == "done" and before == _receipts(folder):
        same = [j for j in _earlier(sweep) if (j["folder"], j["options"], j["status"]) == _identity(record)]
        record["seconds"] = next((j["seconds"] for j in same if j.get("seconds") is not None), record["seconds"])
    write_json(path, record)


def sweep_folder(root: str | Path, name: str) -> Path:
    """Return the folder of a sweep; raises `ConfigError` for a name that is not one plain name, or a link in its place."""
    if "/" in name:
        msg = f"sweep.name='{name}': a sweep is in ROOT/{SWEEPS}, so give one plain name; root=… moves all runs"
        raise ConfigError(msg)
    return below(Path(root), f"{SWEEPS}/{name}", error=ConfigError)


def _identity(record: Mapping[str, Any]) -> tuple[object, ...]:
    return record["folder"], record["options"], record["status"]


def _receipts(folder: Path) -> dict[str, list[int]]:
    """Return size and time of every receipt of a run."""
    return {name: stamp(folder / name / RECEIPT) for name in OWN if is_file(folder / name / RECEIPT)}


def _earlier(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a sweep's jobs when it was last finished; none where they cannot be read."""
    try:
        return read_record(folder / RECORD, SWEEP_RECORD).get("jobs") or []
    except ConfigError:
        return []


def _job_files(folder: Path) -> list[Path]:
    """Return the records that the jobs of a sweep left, by number."""
    jobs = below(folder, JOBS, error=ConfigError)
    names = [n for n, _ in files_below(jobs) if n.endswith(".json") and n.removesuffix(".json").isdecimal()]
    return [jobs / n for n in sorted(names, key=lambda n: int(n.removesuffix(".json")))]


def job_name(config: RunConfig, overrides: Sequence[str]) -> str:
    """Return the name of a job's run: its own where one is given for each, else by the options the jobs differ in."""
    by = list(config.sweep.by)
    if _own_names(by, overrides):
        return config.name
    parts = [f"{key}={value}" for key, value in map(_split, overrides) if key in by and key != "trace.shard"]
    if not parts:
        return config.name
    written = ",".join(parts)
    plain = re.sub(r"[^\w.=,+-]+", "_", written)
    if plain != written or len(plain) > _LONGEST:
        plain = f"{plain[: _LONGEST - 9]}-{value_digest(written)[:8]}"
    return f"{SWEEPS}/{config.sweep.name}/{plain}"


def _own_names(by: Sequence[str], overrides: Sequence[str]) -> bool:
    return "name" in by or any(o.lstrip("+").startswith("name=") and "${" in o for o in overrides)


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+~").partition("=")
    return key, value.strip("'\"")


def _tell(folder: Path, about: dict[str, Any], trouble: str, console: Console) -> int:
    """Gather what the jobs left, write the table and the page, and say what failed."""
    records = [read_record(path, JOB) for path in _job_files(folder)]
    rows = gather(records)
    write_json(folder / RECORD, about | {"jobs": records, "figures": rows, "launcher": trouble or None})
    console.print(f"sweep: {sum(r['status'] == 'done' for r in records)} of {len(records)} jobs done", markup=False)
    if rows:
        from experiments.report.sweep import make_sweep_report

        write_csv(folder / "sweep.csv", rows)
        write_text(folder / "report.html", make_sweep_report(folder, about["by"], records, rows))
        console.print(f"table: {folder / 'sweep.csv'}", markup=False)
        console.print(f"report: {folder / 'report.html'}", markup=False)
    for record in records:
        if record["status"] != "done":
            options = " ".join(f"{k}={v}" for k, v in record["options"].items())
            said = record.get("error", "its process ended before it was done, or is still at work")
            console.print(f"  {record['status']} {options}: {said}", style="red", markup=False)
    if trouble:
        console.print(f"  launcher: {trouble}", style="red", markup=False)
    if trouble or any(r["status"] != "done" for r in records):
        # What a call alone may say is not taken from the sweep's file, so it is said again.
        again = [f"resume={folder}", *(word for word in about["command"] if only_here(word))]
        console.print(f"go on with: groundscope {shlex.join(again)}", markup=False)
        return 1
    return 0


def gather(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the figures of the jobs that are done.

    Parameters
    ----------
    records
        What the jobs left: number, options, folder and status of each.

    Returns
    -------
    list of dict
        ``job``, ``folder``, one column for each option the jobs differ in, then ``stage``, ``measure``, ``value``,
        ``low``, ``high``, ``control``, ``main``. Jobs that share a run are told once.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for record in records:
        if record["status"] != "done" or record["folder"] in seen:
            continue
        seen.add(record["folder"])
        start = {"job": record["job"], "folder": record["folder"], **record["options"]}
        rows += [start | asdict(figure) for figure in headlines(Path(record["folder"]))]
    return rows


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows that have the same columns as CSV in UTF-8; empty cells are missing values."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
