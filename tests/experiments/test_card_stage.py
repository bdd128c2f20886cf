"""`groundscope card`: the evaluation card as a stage and a command, its files, its report and its refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from behavior import EvaluationCard
from concepts import scenes
from experiments.cli.main import SHORT_RUNS, short_run_words
from experiments.cli.overrides import compose
from experiments.pipeline import execute
from experiments.run.folder import read_receipt
from experiments.stages import card_benchmarks
from groundscope.core.errors import GroundscopeError

SMALL = ["data.n_images=10", "data.test_images=10", "threads=1", "model.twin=null", "evaluate.batch_size=64"]


def run(folder: Path, *words: str) -> tuple[Path, str]:
    output = io.StringIO()
    config = compose(short_run_words(SHORT_RUNS["card"], [*SMALL, f"root={folder}", *words]))[0]
    return execute(config, Console(file=output, width=250)), output.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of another model to a benchmark, and verdicts on them."""
    folder = tmp_path_factory.mktemp("files")
    rows = [
        {"question_id": i, "image": f"{i}.jpg", "text": f"Is {i}?", "label": ["yes", "no"][i % 2]} for i in range(20)
    ]
    (folder / "q.json").write_text(json.dumps(rows))
    (folder / "a.jsonl").write_text("".join(json.dumps({"question_id": i, "text": "No."}) + "\n" for i in range(20)))
    (folder / "safety.jsonl").write_text(json.dumps({"id": "3", "refused": True, "unsafe": False}))
    return folder


def entry(files: Path, **more: str) -> str:
    fields = {"model": "closed", "benchmark": "r_bench", "answers": str(files / "a.jsonl"), **more}
    inside = ",".join(f"{name}: '{value}'" for name, value in fields.items())
    return f"card.benchmarks=[{{{inside},files: {{questions: '{files / 'q.json'}'}}}}]"


@pytest.fixture(scope="module")
def card_run(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    safety = f"+card.safety.closed={files / 'safety.jsonl'}"
    return run(
        tmp_path_factory.mktemp("card"),
        entry(files, label="R-Bench"),
        safety,
        "+card.weights.mine={existence: 1, color: 0.1}",
    )


def test_the_command_prints_and_writes_the_card(card_run: tuple[Path, str]) -> None:
    folder, output = card_run
    card = EvaluationCard.load(folder / "card" / "card.json")
    assert card.models == ["tiny", "closed"]
    assert set(card.profiles) == {"uniform", "driving", "medical", "assistive", "mine"}
    assert card.row("closed", "R-Bench", "relation").frequency.value == 0.5
    scenes_name = card.benchmarks[0]
    levels = {row.level for row in card.rows if row.model == "tiny"}
    assert {"object", "attribute", "relation"} <= levels
    assert {row.task for row in card.rows if row.benchmark == scenes_name} >= {"yes/no", "choice", "caption"}
    rates = next(f.rates for f in card.facts if f.model == "tiny")
    assert {"entropy", "contradiction"} <= set(rates)
    assert next(f.rates["refused"].value for f in card.facts if f.model == "closed") == 1.0
    assert any(line.startswith("tiny ") and "object" in line for line in output.splitlines())
    report = (folder / "report.html").read_text()
    assert "Evaluation card" in report
    assert "severity, mine" in report
    assert (folder / "card" / "card.html").stat().st_size > 1000


def test_a_second_run_finds_the_card_unchanged(card_run: tuple[Path, str], files: Path) -> None:
    folder, _ = card_run
    receipt = read_receipt(folder / "card")
    assert receipt is not None
    assert {"card.json", "card.csv", "card_answers.csv", "card.html"} <= set(receipt.files)
    safety = f"+card.safety.closed={files / 'safety.jsonl'}"
    _, output = run(
        folder.parent, entry(files, label="R-Bench"), safety, "+card.weights.mine={existence: 1, color: 0.1}"
    )
    assert output.count("unchanged") == 4


def test_a_card_of_closed_models_needs_no_answers_of_a_run(files: Path, tmp_path: Path) -> None:
    folder, _ = run(tmp_path, entry(files), "card.conditions=[]", "stages=[card]", "card.profiles=[driving]")
    card = EvaluationCard.load(folder / "card" / "card.json")
    assert (card.models, set(card.profiles)) == (["closed"], {"uniform", "driving"})
    assert not (folder / "behavior").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["card.conditions=[befor]"], "unknown condition 'befor'"),
        (["card.conditions=[]"], "leaves no model"),
        (["card.profiles=[drivng]"], "unknown profile 'drivng'; .*did you mean driving"),
        (["+card.weights.x={object: 3}"], "the weight of 'object' is 3"),
        (["card.differences=some"], "choose from first, all"),
        (["card.benchmarks=[{model: x, benchmark: r_bench}]"], "entry 1: 'answers' is missing"),
        (["card.benchmarks=[{model: x, benchmark: rbench, answers: y}]"], "unknown benchmark 'rbench'"),
        (
            ["card.benchmarks=[{model: x, benchmrk: rbench, answers: y}]"],
            "unknown field 'benchmrk'.*did you mean benchmark",
        ),
        (["+card.answer_files.GPT=nowhere.json"], "nowhere.json"),
        (["+card.safety.other=nowhere.json"], "no model 'other' in the card"),
    ],
)
def test_wrong_options_are_refused_before_work(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(GroundscopeError, match=message):
        run(tmp_path, *words)


@pytest.fixture(scope="module")
def mme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MME's folder with one perception and one cognition task."""
    folder = tmp_path_factory.mktemp("mme")
    data = scenes.dataset(10)
    for task in ("existence", "code_reasoning"):
        (folder / task).mkdir()
        for i in range(3):
            data[7 * i].image.load().save(folder / task / f"{i}.png")
            (folder / task / f"{i}.txt").write_text(
                "Is there a dog in the image?\tYes\nIs there a cat in the image?\tNo\n"
            )
    return folder


def asked_entry(folder: Path, **more: str) -> str:
    extra = "".join(f",{name}: '{value}'" for name, value in more.items())
    return f"{{benchmark: mme, images: '{folder}', files: {{questions: '{folder}'}}{extra}}}"


def test_the_model_is_asked_a_benchmark_and_scored(mme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    original = card_benchmarks.benchmark_data

    def counted(name: str, *args: Any, **options: Any) -> Any:
        reads.append(name)
        return original(name, *args, **options)

    monkeypatch.setattr(card_benchmarks, "benchmark_data", counted)
    entries = [asked_entry(mme), asked_entry(mme, mitigation="vcd(alpha=0.5)")]
    words = ["card.conditions=[]", "stages=[card]", f"card.benchmarks=[{','.join(entries)}]"]
    folder, _ = run(tmp_path, *words)
    assert len(reads) == 2  # once for each entry: the check, the key and the stage share them
    card = EvaluationCard.load(folder / "card" / "card.json")
    assert card.models == ["tiny", "tiny, vcd(alpha=0.5)"]
    for model in card.models:
        assert card.row(model, "mme", "no level").n == card.row(model, "mme", "object").n == 6
        assert {f.figure for f in card.figures if f.model == model and f.part == "all"} == {"perception", "cognition"}
    assert len(list((folder / "asked").glob("mme-tiny*/existence.txt"))) == 2
    assert run(tmp_path, *words)[1].count("unchanged") == 1


def test_a_judged_benchmark_writes_requests_first(mme: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 0, "image": "0.png", "text": "What is here?", "category": "conv"}))
    entry = f"{{benchmark: llava_bench, images: '{mme / 'existence'}', files: {{questions: '{questions}'}}, max_new_tokens: 2"
    words = ["card.conditions=[]", "stages=[card]"]
    with pytest.raises(GroundscopeError, match=r"no answers of the card can be scored yet.*give a judge"):
        run(tmp_path, *words, f"card.benchmarks=[{entry}}}]")
    (request,) = (tmp_path / "card" / "asked").glob("*.requests.json")
    assert json.loads(request.read_text())["prompt"] == "What is here?"


def test_verdicts_that_are_added_later_are_scored_without_asking_again(
    mme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    original = card_benchmarks.ask

    def counted(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        asked.append((len(result.answers), result.reused))
        return result

    monkeypatch.setattr(card_benchmarks, "ask", counted)
    questions, verdicts = tmp_path / "questions.jsonl", tmp_path / "verdicts.jsonl"
    rows = [{"image": f"{i}.png", "reference caption": ["A cat."]} for i in range(3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdicts.write_text("".join(json.dumps({"id": r["image"], "reply": "yes"}) + "\n" for r in rows))
    about = f"benchmark: haelm, images: '{mme / 'existence'}', files: {{questions: '{questions}'}}, max_new_tokens: 2"
    words = ["card.conditions=[]", "stages=[card]"]
    with pytest.raises(GroundscopeError, match="give a judge"):
        run(tmp_path, *words, f"card.benchmarks=[{{{about}}}]")
    entry = f"card.benchmarks=[{{{about}, verdicts: '{verdicts}'}}]"
    folder, _ = run(tmp_path, *words, entry)
    assert EvaluationCard.load(folder / "card" / "card.json").row("tiny", "haelm").n == 3
    run(tmp_path, *words, entry, "card.profiles=[driving]")  # another option of the card
    assert asked == [(3, 0), (3, 3), (3, 3)]
    run(tmp_path, *words, entry, "force=true")
    assert asked[-1] == (3, 0)


def test_answers_that_change_are_columns_of_the_model_of_a_run(card_run: tuple[Path, str]) -> None:
    card = EvaluationCard.load(card_run[0] / "card" / "card.json")
    rates = next(f.rates for f in card.facts if f.model == "tiny")
    assert {"paraphrase", "format", "contain", "as_open"} <= set(rates)
    assert "not asked: rewording 'as_choice' of" in card_run[1]  # the embedded model knows no letters
    assert "as_choice" not in rates
    assert rates["paraphrase"].n <= 60
    assert not any("paraphrase" in f.rates for f in card.facts if f.model == "closed")
    assert "changes under paraphrase" in (card_run[0] / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["card.benchmarks=[{benchmark: mme, images: nowhere}]"], "to ask a model, give the file 'questions'|nowhere"),
        (
            ["card.benchmarks=[{benchmark: mme, answers: x, model: y, limit: 3}]"],
            "'limit' is for benchmarks that the model",
        ),
        (["card.benchmarks=[{benchmark: mme, images: x, mitigation: vdc}]"], "unknown method 'vdc'.*did you mean"),
        (["card.benchmarks=[{benchmark: mme, images: x, mitigation: nullu}]"], "'nullu' is derived from examples"),
        (["card.benchmarks=[{benchmark: mme, images: x, mitigation: v.safetensors}]"], "the file does not exist"),
        (["card.rewordings=[contains]"], "unknown rewording 'contains'"),
        (["card.reworded=-1"], "card.reworded=-1: must be at least 0"),
    ],
)
def test_wrong_options_of_asked_benchmarks_are_refused_before_work(
    tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(GroundscopeError, match=message):
        run(tmp_path, *words)
    assert not list(tmp_path.glob("*/card"))
