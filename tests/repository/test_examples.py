"""The examples in docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib.util
import io
from pathlib import Path

import pytest

from tests.docstrings import OPTIONS, examples, without_examples
from tests.packages import PACKAGES, ROOT, source_files

NEEDS: dict[str, str] = {"mitigation/steering/export/gguf.py": "gguf"}
"""Modules whose examples need an optional package -> that package; skipped where it is not installed."""
MODULES = [
    path.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for path in source_files(package)
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_print_what_they_show(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = NEEDS.get(module)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    monkeypatch.chdir(tmp_path)
    report = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=OPTIONS)
    for test in examples(ROOT / module):
        runner.run(test, out=report.write)
    assert runner.failures == 0, report.getvalue()
    assert runner.tries > 0
    assert list(tmp_path.iterdir()) == [], "an example writes into the current directory: use tempfile"


def test_every_public_name_has_an_example() -> None:
    assert without_examples() == [], "add an Examples section to the docstring"
