"""What every test runs under: no network, no display, one thread a worker, no deadline on a slow machine."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Set before torch is imported: two workers with two threads each are slower on two cores than two with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples every time, so that a change is judged by what it changes; `HYPOTHESIS_PROFILE=explore` draws new ones.
settings.register_profile("groundscope", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "groundscope"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One small run of every stage on the embedded model, made once for all workers; look, do not touch."""
    from tests.toys.command_line import SMALL  # after the environment is set

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "finished"
    folder.mkdir(exist_ok=True)
    root = Path(__file__).parent.parent
    with (folder / "lock").open("w") as lock:
        # Whoever comes first makes it; the others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            done = subprocess.run(
                [sys.executable, "-m", "experiments", "name=whole", *SMALL],
                cwd=folder, env={**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"},
                capture_output=True, text=True, timeout=1500, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            (folder / "done").write_text(done.stdout)
    return folder / "runs" / "whole"
