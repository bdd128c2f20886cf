"""`groundscope evaluate`: answers without any stage before, on several files, with the table that papers print."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from behavior import BehaviorResult
from behavior.pope import score_result
from experiments.cli.main import SHORT_RUNS, short_run_words
from experiments.cli.overrides import compose, read
from experiments.config import DataConfig, RunConfig
from experiments.data import load_parts, user_function
from experiments.pipeline import execute
from experiments.results.run_files import read_examples
from experiments.run.folder import read_receipt
from experiments.validation import check
from groundscope.core.errors import ConfigError, DataError
from lvlm import load_lvlm
from tests.toys.command_line import run_command
from tests.toys.pope_files import pope_folder

SETS, SPLITS = ("coco_pope", "aokvqa_pope_seem", "gqa_pope_seem"), ("random", "popular", "adversarial")
SUFFIX = "Answer the question using a single word or phrase."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """POPE's nine question files, small, with images."""
    folder = tmp_path_factory.mktemp("nine")
    pope_folder(folder, 4)
    text = (folder / "pope_random.json").read_text()
    for name in SETS:
        for split in SPLITS:
            (folder / f"{name}_{split}.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def evaluation(files: Path) -> tuple[Path, str]:
    """Folder and output of one evaluation of the nine files."""
    nine = ",".join(str(files / f"{name}_{split}.json") for name in SETS for split in SPLITS)
    words = ["data=pope", f"data.questions=[{nine}]", f"data.images={files / 'images'}", f"data.suffix='{SUFFIX}'"]
    output = io.StringIO()
    options = short_run_words(SHORT_RUNS["evaluate"], [*words, f"root={files / 'runs'}", "threads=1"])
    return execute(compose(options)[0], Console(file=output, width=200)), output.getvalue()


def test_nine_files_are_three_data_sets_in_one_table(evaluation: tuple[Path, str]) -> None:
    folder, output = evaluation
    rows = [line.split() for line in output.splitlines() if line.startswith(SETS)]
    assert [row[:3] for row in rows] == [
        [name, split, str(8 if split != "mean" else 24)] for name in SETS for split in (*SPLITS, "mean")
    ]
    result = BehaviorResult.load(folder / "behavior" / "before.json")
    scores = json.loads((folder / "behavior" / "scores.json").read_text())["before"]
    row = next(r for r in scores if (r["data"], r["split"]) == ("gqa_pope_seem", "popular"))
    chosen = tuple(a for a in result.answers if a.id.startswith("gqa_pope_seem/popular/"))
    expected = score_result(BehaviorResult(chosen, result.cost, result.provenance))
    assert row["recall"]["value"] == expected.recall.value
    assert rows[9][3] == f"{100 * expected.accuracy.value:.1f}"


def test_only_answers_are_made_and_the_report_shows_them(evaluation: tuple[Path, str]) -> None:
    folder, _ = evaluation
    folders = {p.name for p in folder.iterdir() if p.is_dir()}
    assert folders == {"examples", "behavior", "report"}
    receipt = read_receipt(folder / "behavior")
    assert receipt is not None
    assert set(receipt.inputs) == {"examples"}
    page = (folder / "report.html").read_text()
    assert "What does it answer?" in page
    assert "aokvqa_pope_seem" in page
    assert "Where is it known?" not in page


def test_the_suffix_is_in_the_records_and_a_second_call_makes_nothing(
    evaluation: tuple[Path, str], files: Path
) -> None:
    folder, _ = evaluation
    examples = read_examples(folder / "examples" / "held_out.jsonl")
    assert {e.suffix for e in examples} == {SUFFIX}
    assert SUFFIX not in examples[0].question
    output = io.StringIO()
    words = (folder / "config.yaml").read_text()
    assert "test_share: 1.0" in words
    from experiments.cli.resume import configured

    execute(configured(folder), Console(file=output, width=200))
    assert output.getvalue().count(" unchanged ") == 3


def config(**data: Any) -> RunConfig:
    run = RunConfig(stages=["examples", "evaluate"], data=DataConfig(**data))
    run.model.path = "tiny"
    return run


FILE = {"source": "pope", "questions": "q.json", "images": "d"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({**FILE, "source": ["pope", "gqa"]}, r"2 formats \(pope, gqa\) for 1 file: give one file of data.questions"),
        ({**FILE, "images": ["a", "b"]}, "data.images has 2 folders for 1 file: give one for each file"),
        ({**FILE, "questions": [["a"]]}, r"data.questions must be a text or a list of texts"),
        ({**FILE, "questions": []}, r"data.questions must be a text or a list of texts"),
        ({**FILE, "source": ["pope", "scenes"]}, "scenes are drawn, not read from files"),
        ({**FILE, "source": "popee"}, "data.source=popee: choose from .*; did you mean pope"),
        (
            {"source": ["pope", "coco"], "questions": ["a", "b"], "images": "d", "loader": {"captions": "c"}},
            r"data.loader.captions: with several formats write the format first, \+data.loader.pope.captions",
        ),
        ({**FILE, "test_share": 0.0}, "data.test_share=0 leaves no test questions, which stage 'evaluate' needs"),
        ({**FILE, "test_share": 1.5}, "data.test_share=1.5: must be from 0 to 1"),
    ],
)
def test_wrong_data_are_refused_before_work(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(config(**data))


def test_several_formats_are_a_list_of_the_group() -> None:
    words = ["data=[pope,gqa]", "data.questions=[a.json,b.json]", "data.images=d", "+data.loader.gqa.questions=c.json"]
    run, _ = compose(read(words).first())
    assert (run.data.source, run.data.loader) == (["pope", "gqa"], {"gqa": {"questions": "c.json"}})
    check(run)


def test_all_questions_for_the_test_leave_none_for_probes() -> None:
    run = config(**FILE, test_share=1.0)
    check(run)
    run.stages = ["examples", "trace"]
    with pytest.raises(
        ConfigError, match="leaves no discovery questions, which stage 'trace' needs: run groundscope evaluate"
    ):
        check(run)


def test_wrong_options_of_answers_are_refused_before_work() -> None:
    run = config(**FILE)
    run.evaluate.parser = "pope_releas"
    with pytest.raises(ConfigError, match=r"unknown parser; choose from .*did you mean pope_release"):
        check(run)
    for name, value, words in (
        ("match", "normal", "evaluate.match=normal: choose from .*; did you mean normalized"),
        ("score", "texts", "evaluate.score=texts: choose from .*; did you mean text"),
        ("seeds", 3, "evaluate.seeds=3 has no effect on the most likely answer; add evaluate.temperature=1"),
        ("top_p", 0.0, "evaluate.top_p=0: must be above 0"),
        ("temperature", -1.0, "evaluate.temperature=-1: must be at least 0"),
    ):
        run = config(**FILE)
        setattr(run.evaluate, name, value)
        with pytest.raises(ConfigError, match=words):
            check(run)
    run = config(**FILE)
    run.evaluate.parser = "pope_release"
    with pytest.raises(ConfigError, match=r"has no effect without written answers; add evaluate\.generate=true"):
        check(run)


def test_files_whose_ids_are_the_same_keep_their_own_names(files: Path, tmp_path: Path) -> None:
    first = files / "coco_pope_random.json"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / first.name).write_text(first.read_text())
    copies = [str(tmp_path / folder / first.name) for folder in ("a", "b")]
    data = DataConfig(source="pope", questions=[*copies, str(first)], images=str(files / "images"), test_share=1.0)
    names = [e.id.split("/")[0] for e in load_parts(data)[1]]
    assert list(dict.fromkeys(names)) == ["coco_pope_random", "coco_pope_random-2", "coco_pope_random-3"]
    data.questions = [str(first), str(first)]
    with pytest.raises(ConfigError, match="names a file twice"):
        load_parts(data)


SOURCE = """
from dataclasses import replace
from pathlib import Path
import groundscope as gs

def load(questions=None, images=None, limit=None, seed=0):
    data = gs.scenes.dataset(10, seed=seed)
    return data if limit is None else data[:limit]

def colors():
    data = gs.scenes.dataset(10)
    wide = tuple(replace(e, candidates=()) for e in data.where(kind="what_color"))
    return gs.ConceptDataset("colors", (*wide, *data.where(kind="existence")[:4]), {"loader": "mine"})

def phrases():
    apples = [e for e in gs.scenes.dataset(20) if e.kind == "what_color"][:4]
    return gs.ConceptDataset(
        "phrases",
        tuple(replace(e, answer=f"the {e.answer}", candidates=tuple(f"the {c}" for c in e.candidates)) for e in apples),
    )

def wrong():
    return 3
"""


def test_a_function_of_the_user_is_the_source(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    data = DataConfig(source=f"{file}:load", loader={"seed": 2}, limit=30, test_share=0.5)
    assert sum(map(len, load_parts(data))) == 30
    for source, error, words in (
        (f"{file}:lode", ConfigError, "has no function 'lode'"),
        (f"{file}:wrong", DataError, "returned an object of type int, not a ConceptDataset"),
        (f"{tmp_path}/none.py:load", ConfigError, "there is no file"),
        ("no_such_package_x:load", ConfigError, "cannot be imported: .*or write the path of the file"),
    ):
        with pytest.raises(error, match=words):
            load_parts(DataConfig(source=source))
    with pytest.raises(ConfigError, match="the function cannot be called with colour: got an unexpected keyword"):
        load_parts(DataConfig(source=f"{file}:load", loader={"colour": "red"}))
    assert user_function(f"{file}:load")(limit=2)[1].id


def test_candidates_with_one_first_token_are_compared_by_their_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    words = ("evaluate", "data.source=mine.py:phrases", "threads=1")
    status, _, error = run_command((*words, "name=first"), tmp_path, monkeypatch, capsys)
    assert status != 0
    assert "evaluate.score=text_per_token" in error
    assert run_command((*words, "name=x", "evaluate.score=text"), tmp_path, monkeypatch, capsys)[0] == 0
    result = BehaviorResult.load(tmp_path / "runs" / "x" / "behavior" / "before.json")
    # After its first token, which they share, a candidate is one word: the order is that of the next token.
    model = load_lvlm("tiny")
    for row, example in zip(result.answers, user_function(f"{tmp_path}/mine.py:phrases")(), strict=True):
        continued = replace(
            example, prefix="the", answer=example.answer[4:], candidates=tuple(c[4:] for c in example.candidates)
        )
        log_p = model.logits(model.collate([model.encode(continued)]))[0].log_softmax(-1)
        scores = [
            float(log_p[model.processor.tokenizer.encode(c, add_special_tokens=False)[0]]) for c in continued.candidates
        ]
        right = scores.pop(continued.candidates.index(continued.answer))
        assert row.margin == pytest.approx(right - max(scores), abs=1e-4)


def test_a_score_of_texts_that_has_no_effect_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(**FILE)
    run.evaluate.score, run.evaluate.generate = "text", True
    with pytest.raises(ConfigError, match=r"evaluate\.score=text has no effect on written answers"):
        check(run)
    (tmp_path / "mine.py").write_text(SOURCE.replace('data.where(kind="existence")[:4]', "()"))
    words = ("evaluate", "data.source=mine.py:colors", "name=x", "threads=1", "evaluate.score=text")
    status, _, error = run_command(words, tmp_path, monkeypatch, capsys)
    assert status == 2
    assert "no question of these data has candidates" in " ".join(error.split())


def test_code_of_the_user_runs_only_if_this_command_line_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(SOURCE + f"\nPath({str(tmp_path / 'ran')!r}).write_text('ran')\n")
    words = ("data.source=mine.py:colors", "name=x", "threads=1", "evaluate.temperature=2", "evaluate.seeds=2")
    status, output, _ = run_command(("evaluate", *words), tmp_path, monkeypatch, capsys)
    assert status == 0
    rows = json.loads((tmp_path / "runs" / "x" / "behavior" / "scores.json").read_text())["before"]
    assert {row["form"] for row in rows} == {"open", "yes-no"}
    assert "accuracy of each of 2 seeds: " in output
    (tmp_path / "ran").unlink()
    status, _, error = run_command(("resume=runs/x",), tmp_path, monkeypatch, capsys)
    assert status == 2
    assert (
        "contains data.source=mine.py:colors, code that is not run from a file: add data.source=mine.py:colors"
        in " ".join(error.split())
    )
    assert not (tmp_path / "ran").exists()
    assert run_command(("resume=runs/x", "data.source=mine.py:colors"), tmp_path, monkeypatch, capsys)[0] == 0
    assert (tmp_path / "ran").exists()
