"""The harnesses of `benchmarks/` at full size: kills of writers, mutations of files, damaged run folders.

`make validate` runs this folder. `make test` runs a small sample of the same cases.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["crash", "mutations", "hostile_folders"])
def test_no_case_of_a_harness_fails(name: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["figures"]
    failed = {figure: value for figure, value in report["figures"].items() if not value["holds"]}
    assert not failed
