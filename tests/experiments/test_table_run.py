"""A run on a user's own table: the labels of its columns are probed, scored and shown, and what cannot be probed says why."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from concepts import scenes
from experiments.results.headlines import headlines
from probes import ProbeGrid
from tests.toys.command_line import run_command

OPTIONS = (
    "data=table", "data.path=mine.csv", "stages=[examples,trace,probe,report]", "name=mine", "data.test_share=0.2", "threads=1",
    "trace.sites=[decoder.L2.resid_post]", "trace.tokens=[last,image:mean]", "probe.folds=2", "probe.C=[0.1]",
)  # fmt: skip


def write_table(folder: Path) -> None:
    """Write scenes as photographs, a question about each, and a label of every kind; one question has no image."""
    rows: list[dict[str, object]] = []
    for i, e in enumerate(scenes.dataset(n_images=90, seed=3, splits=["neutral"]).where(kind="existence")):
        if e.group in {row["group"] for row in rows}:
            continue
        e.image.load().save(folder / f"{i}.png")
        rows.append({
            "image": f"{i}.png", "question": e.question, "answer": e.answer, "group": e.group,
            "hallucinated": ("yes", "no")[len(rows) % 2], "crowd": len(e.objects) / 2,
            "style": ("old", "new", "")[len(rows) % 3], "rare": "no" if rows else "yes",
        })  # fmt: skip
    rows.append({"question": "Is there a dog in the image?", "answer": "no", "hallucinated": "no"})
    pd.DataFrame(rows).to_csv(folder / "mine.csv", index=False)


def test_the_labels_of_a_table_are_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path)
    status, out, error = run_command(OPTIONS, tmp_path, monkeypatch, capsys)
    assert status == 0, error
    run = tmp_path / "runs" / "mine"
    grid = ProbeGrid.load(run / "probes" / "decoder.resid_post@last")
    assert {"hallucinated", "crowd", "style:new", "style:old"} <= set(grid.concepts)
    assert grid.numbers == ("crowd",)
    assert "crowd" in ProbeGrid.load(run / "probes" / "decoder.resid_post@image-mean").concepts
    left_out = json.loads((run / "probes" / "left_out.json").read_text())["grids"]
    assert left_out["rare"].startswith("class 1 of 'rare' is in ")
    assert "left out: " in out
    classes = json.loads((run / "probes" / "classes.json").read_text())
    assert {r["column"] for r in classes} == {"style"}
    results = {h.measure: h for h in headlines(run)}
    cell = grid.best("crowd")
    assert results["decoder.resid_post@last, crowd: best cell, R2"].value == pytest.approx(cell.r2)
    page = (run / "report.html").read_text()
    for text in ("hallucinated", "R2 ", "style (2 classes, softmax)"):
        assert text in page
    status, _, error = run_command((*OPTIONS, "probe.concepts=[halucinated]"), tmp_path, monkeypatch, capsys)
    assert status == 2
    assert "concept 'halucinated' is not in the data; choose from" in error
    assert "did you mean hallucinated" in error
