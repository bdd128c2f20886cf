"""`groundscope audit`: data by options, answers of a file, and refused options."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from behavior import Audit
from concepts import scenes
from experiments.cli.audit import run
from groundscope.core.errors import ConfigError, DataError


def test_data_with_answers_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = scenes.dataset(10, 0)
    lines = [json.dumps({"question_id": e.id, "text": "yes"}) for e in data]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    options = ["data=scenes", "data.n_images=10", "data.seed=0", "answers=answers.jsonl", "pixels=false", "out=found"]
    assert run(options) == 0
    audit = Audit.load(tmp_path / "found" / "audit.json")
    assert audit.errors
    assert audit.answered > 0
    with (tmp_path / "found" / "findings.csv").open(newline="") as file:
        assert sum(1 for _ in csv.DictReader(file)) == sum(len(report.findings) for report in audit.causes)
    page = (tmp_path / "found" / "audit.html").read_text()
    assert "rare compositions" in page
    assert "<script" not in page
    printed = capsys.readouterr().out
    assert "rare compositions" in printed
    assert "not measured: mismatched captions" in printed


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        (["data=scenes", "answer=x"], ConfigError, "did you mean answers"),
        (["data=scenes", "pixels=maybe"], ConfigError, "give true"),
        (["runs/a", "data=scenes"], ConfigError, "not both"),
        (["data=pope"], ConfigError, "needs data.questions"),
        (["data=scenes", "causes=[blur]"], ConfigError, "unknown cause"),
        (
            ["data=scenes", "causes=[mismatched captions]"],
            DataError,
            "no scores of captions by a model; give model=FOLDER",
        ),
    ],
)
def test_wrong_options_are_one_error(
    words: list[str], error: type[Exception], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        run(words)
    assert list(tmp_path.iterdir()) == []
