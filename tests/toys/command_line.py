"""The command in this process, and runs small enough for a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from experiments.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
FEW = ("data.n_images=10", "data.test_images=10", "threads=1")
SMALL = (
    "data.n_images=80",
    "data.test_images=40",
    "probe.C=[0.01,0.1]",
    "probe.folds=2",
    "patch.pairs=12",
    "steer.strengths=[1,2]",
    "threads=1",
)
"""Options of the fixture `finished_run`."""
TRACED = (*FEW, "trace=heads", "trace.batch_size=4")
Command = Callable[..., tuple[int, str, str]]


def run_command(
    arguments: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Run the command in a folder; return its exit status, standard output and standard error."""
    for name in (
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "DO_NOT_TRACK",
        "HYDRA_FULL_ERROR",
        "PYTHONSAFEPATH",
    ):
        monkeypatch.setenv(name, "1")  # as the command would; taken back after the test
    monkeypatch.setattr(sys, "argv", ["groundscope", *arguments])
    monkeypatch.chdir(folder)
    capsys.readouterr()
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        GlobalHydra.instance().clear()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def spawn(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the command in its own process; like the console script it does not import from the current directory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "experiments", *arguments],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
