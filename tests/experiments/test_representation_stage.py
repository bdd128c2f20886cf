"""`groundscope representation`: continues a finished run, its files, its section of the report, and its refusals."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from diagnosis import RepresentationStudy
from experiments.cli.main import SHORT_RUNS, short_run_words
from experiments.cli.overrides import compose
from experiments.config import DEFAULT_STAGES
from experiments.pipeline import execute
from experiments.run.folder import read_receipt
from groundscope.core.errors import GroundscopeError
from tests.toys.command_line import SMALL

FAST = ("representation.families=[linear]", "representation.resamples=20", "representation.rows=150")


def run(root: Path, *words: str) -> tuple[Path, str]:
    output = io.StringIO()
    config = compose(short_run_words(SHORT_RUNS["representation"], [*SMALL, f"root={root}", "name=whole", *words]))[0]
    return execute(config, Console(file=output, width=250)), output.getvalue()


def test_a_finished_run_is_continued_and_reported(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "whole", copy_function=os.link)
    (tmp_path / "whole" / "report.html").unlink()
    folder, output = run(tmp_path, *FAST)
    made = read_receipt(folder / "activations")
    before = read_receipt(finished_run / "activations")
    assert made == before  # not traced again
    study = RepresentationStudy.load(folder / "representation")
    assert set(study.paths) == {"image", "question", "caption"}
    assert study.ceilings is not None
    # The scenes' objects show their colors, and the words alone say little about them.
    image, question = study.paths["image"], study.paths["question"]
    assert image.nats[0, 4] > 0.6 * image.entropy
    assert question.nats[0].max() < image.nats[0].max() / 2
    best = study.best.set_index("measure")
    assert best.loc["cosine", "p"] <= 0.05
    assert "violation" in output
    report = (folder / "report.html").read_text()
    assert "Representation and behavior" in report
    for text in ("Where information becomes unavailable", "mutual neighbors", "What is represented, and what is said"):
        assert text in report


def test_the_stage_is_not_part_of_a_default_run(finished_run: Path) -> None:
    assert "representation" not in DEFAULT_STAGES
    assert not (finished_run / "representation").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("representation.images=0", r"representation\.images=0: must be at least 1"),
        ("representation.permutations=50", r"must be 0 or at least 199"),
        ("representation.families=[linea]", r"linea.*did you mean linear"),
        ("representation.families=[]", r"representation\.families is empty"),
        ("representation.resamples=5", r"at least 20"),
    ],
)
def test_wrong_options_are_refused_before_work(word: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(GroundscopeError, match=message):
        run(tmp_path, word)
    assert not (tmp_path / "whole" / "examples").exists()
