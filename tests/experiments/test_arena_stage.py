"""`groundscope arena`: the comparison of training-free methods as a stage, its files, its report and its refusals."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from experiments.cli.main import _ARENA, short_run_words
from experiments.cli.overrides import compose
from experiments.pipeline import execute
from experiments.run.folder import read_receipt
from experiments.validation import check
from groundscope.core.errors import GroundscopeError
from mitigation.arena.result import ArenaResult

SMALL = ["data.n_images=10", "data.test_images=10", "arena.price_questions=0", "threads=1", "model.twin=null"]


def run(folder: Path, *words: str) -> tuple[Path, str]:
    output = io.StringIO()
    config = compose(short_run_words(_ARENA, [*SMALL, f"root={folder}", *words]))[0]
    return execute(config, Console(file=output, width=250)), output.getvalue()


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return run(tmp_path_factory.mktemp("arena"), "arena.methods=[vcd,'vcd(alpha=0.5)']", "arena.limit=4")


def test_the_command_prints_and_writes_the_table(arena: tuple[Path, str]) -> None:
    folder, output = arena
    for name in ("arena.json", "arena.csv", "arena.tex", "arena.html", "pareto.svg"):
        assert (folder / "arena" / name).stat().st_size > 100
    result = ArenaResult.load(folder / "arena" / "arena.json")
    assert result.provenance["images"] == 4
    assert {"unmodified", "VCD", "VCD (alpha=0.5)"} <= {row.name for row in result.rows}
    assert any(row.control for row in result.rows[1:]) or len(result.rows) == 3
    lines = [line for line in output.splitlines() if line.startswith(("unmodified", "VCD"))]
    assert len(lines) >= 3
    report = (folder / "report.html").read_text()
    assert "Which mitigation?" in report
    assert "VCD (alpha=0.5)" in report


def test_a_second_run_asks_only_new_methods(arena: tuple[Path, str]) -> None:
    folder, _ = arena
    receipt = read_receipt(folder / "arena")
    assert receipt is not None
    assert sum(name.startswith("answers/") for name in receipt.files) >= 3
    _, output = run(folder.parent, "arena.methods=[vcd,'vcd(alpha=0.5)']", "arena.limit=4")
    assert output.count("unchanged") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arena.methods=[vdc]"], "unknown method 'vdc'"),
        (["arena.methods=['vcd(alfa=1)']"], "did you mean alpha"),
        (["arena.methods=[]"], "compares nothing"),
        (["arena.regimes=[beam]"], "unknown regime 'beam'"),
        (["arena.seeds=0"], "seeds=0"),
        (["arena.limit=0"], "arena.limit=0"),
        (["arena.methods=[discriminant]"], "needs 'trace', which has not run"),
        (["+arena.answer_files.other=nowhere.json"], "nowhere.json"),
        (["arena.choose=true", "arena.choose_images=8"], "half of them must remain"),
    ],
)
def test_wrong_options_are_refused_before_work(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(GroundscopeError, match=message):
        run(tmp_path, *words)


def test_the_arena_is_checked_with_the_configuration(tmp_path: Path) -> None:
    check(compose(short_run_words(_ARENA, [*SMALL, f"root={tmp_path}"]))[0])
