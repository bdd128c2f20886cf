"""What the jobs of a sweep found, as one tidy table: a row for each job and figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.results.headlines import headlines
from experiments.run.folder import write_text

Row = dict[str, Any]


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
