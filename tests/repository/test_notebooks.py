"""The notebooks run from top to bottom on a finished run, and show what they say they show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.notebooks.render import SOURCES, executed

PICTURES = {"1": 1, "2": 2, "3": 3, "4": 2, "5": 1, "6": 0, "7": 3}
"""Number of pictures in each notebook."""
SAID = {
    "1": r"head \(\d+, 24\) float32",
    "2": r"right about green in \d+% of [1-9]\d* wrong answers",
    "3": r"rank correlation 0\.\d+ \[",
    "4": r"The vision tower shows",
    "5": r"steered +-0\.\d+ \[-0\.\d+, ",
    "6": r"field 'label' is 'maybe', neither 'yes' nor 'no'",
    "7": r"\d+ violations in [1-9]\d* cells",
}
"""What each prints."""


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_runs_and_shows_its_pictures(source: Path, finished_run: Path) -> None:
    notebook = executed(source, finished_run)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == PICTURES[source.stem[0]]
    text = "\n".join(str(output.get("text", "")) for output in outputs)
    assert re.search(SAID[source.stem[0]], text), text
    assert "Warning" not in text
    # A cell that fails ends the run; one that shows nothing at all would pass unseen.
    assert sum(bool(cell.outputs) for cell in notebook.cells if cell.cell_type == "code") >= 4
