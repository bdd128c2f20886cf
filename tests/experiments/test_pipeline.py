"""The main job from end to end through its command, on the embedded model, a random one, and files on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from activation_store import ActivationStore, verify
from circuits import HeadScores
from concepts import scenes
from diagnosis import Diagnoses
from experiments.config import DEFAULT_STAGES, RunConfig
from experiments.results.headlines import headlines
from experiments.run.context import Context
from experiments.run.folder import RunFolder, read_receipt
from experiments.stages import export, steer
from groundscope.core.errors import ConfigError
from groundscope.core.statistics import Estimate
from lvlm import Head
from lvlm.tiny.architecture import build_model, build_processor
from mitigation import CONTROLS, SteeringVector, mitigations
from mitigation.steering.changes import AddChange, VectorChange
from mitigation.steering.export import apply_vector
from mitigation.steering.places import Key
from mitigation.strength import choose_strength, cost, cost_measures, harm
from probes import ProbeGrid
from tests.toys.command_line import SMALL, Command, run_command
from tests.toys.pope_files import pope_folder
from tests.toys.processes import Alarm, Finished, start_command

ROOT = Path(__file__).resolve().parents[2]


def groundscope(*options: str, cwd: Path) -> Finished:
    """Run the command in a process."""
    return start_command(*options, cwd=cwd).wait()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, in an empty folder."""
    return lambda *arguments: run_command(arguments, tmp_path, monkeypatch, capsys)


@pytest.fixture
def run(finished_run: Path) -> Path:
    """One finished run on the embedded model, shared by the tests that only look."""
    assert "report: runs/whole/report.html" in (finished_run.parent.parent / "done").read_text()
    return finished_run


def test_every_stage_leaves_files_that_open(run: Path) -> None:
    for folder in ("examples", "activations", "probes", "circuits", "steering", "behavior", "diagnosis", "report"):
        receipt = json.loads((run / folder / "stage.json").read_text())
        assert receipt["files"]
        assert receipt["summary"]
    assert {"python", "packages"} <= json.loads((run / "environment.json").read_text()).keys()
    assert "n_images: 80" in (run / "config.yaml").read_text()
    store = ActivationStore(run / "activations")
    frame = store.frame()
    records = [json.loads(line) for line in (run / "examples" / "discovery.jsonl").read_text().splitlines()]
    assert len(frame) == sum(bool(r["candidates"]) for r in records)
    assert store.read("decoder.L3.z", "last", head=5).shape == (len(frame), 24)
    assert store.read("vision.L2.resid_post", "object:mean").shape == (len(frame), 128)
    assert store.read("projector.out", "image:mean").shape == (len(frame), 192)
    assert verify(run / "activations").ok
    grid = ProbeGrid.load(run / "probes" / "decoder.z@last")
    assert grid.array("object:named").shape == (6, 8)
    scores = HeadScores.load(run / "circuits" / "color.safetensors")
    assert scores.mean.shape == (6, 8)
    SteeringVector.load(run / "steering" / "vector.safetensors")


def test_probes_decode_what_the_model_answers_correctly(run: Path) -> None:
    grid = ProbeGrid.load(run / "probes" / "decoder.resid_post@last")
    assert grid.array("object:named").max() > 0.85
    assert abs(grid.array("object:named", "control").mean() - 0.5) < 0.15
    rates = json.loads((run / "behavior" / "rates.json").read_text())
    assert rates["before"]["neutral, object: right"]["value"] > 0.9
    assert rates["before"]["conflict: wrong by prior"]["value"] > rates["twin"]["conflict: wrong by prior"]["value"]


def test_headlines_are_the_numbers_of_the_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_name = {h.name: h for h in headlines(run)}
    frame = ProbeGrid.load(run / "probes" / "decoder.z@last").frame()
    named = frame[frame["concept"] == "object:named"]
    best = named[named["validation"] == named["validation"].max()]["balanced_accuracy"]
    assert by_name["probe: decoder.z@last, object:named: best cell"].value in best.to_numpy()
    scores = HeadScores.load(run / "circuits" / "color.safetensors")
    assert by_name["patch: color: effect of the strongest head"].value == pytest.approx(float(scores.mean.max()))
    rates = json.loads((run / "behavior" / "rates.json").read_text())
    for condition, measures in rates.items():
        for name, rate in measures.items():
            headline = by_name[f"evaluate: {name}, {condition}"]
            assert (headline.value, headline.low, headline.high) == (rate["value"], rate["low"], rate["high"])
    quick = {h.name for h in headlines(run, quick=True)}
    assert {name for name in by_name if name.startswith(("evaluate", "steer"))} <= quick < by_name.keys()
    status, output, _ = run_command(("compare", str(run), str(run)), tmp_path, monkeypatch, capsys)
    assert status == 0
    assert set(re.findall(r"([+-][\d.e-]+) *$", output.split("not compared")[0], flags=re.M)) <= {"+0"}
    assert "patch: color: effect of the strongest head" in output
    status, output, _ = run_command(("status", str(run)), tmp_path, monkeypatch, capsys)
    assert output.count("●") == len(DEFAULT_STAGES) + 1
    assert f"neutral: right {100 * rates['before']['neutral: right']['value']:.1f} → " in output


def test_wrong_answers_are_diagnosed_and_reported(run: Path) -> None:
    diagnoses = Diagnoses.load(run / "diagnosis" / "diagnoses.json")
    assert 0 < len(diagnoses.wrong) <= 60
    frame = ActivationStore(run / "activations").frame().set_index("id")
    assert all(
        (diagnosis.verdict is None) == bool(frame["correct"][diagnosis.example["id"]])
        for diagnosis in diagnoses.examples
    )
    assert all(
        diagnosis.model_answer == frame["model_answer"][diagnosis.example["id"]] for diagnosis in diagnoses.examples
    )
    misled = diagnoses.table("split").set_index(["split", "verdict"]).loc[("conflict", "overridden by the prior")]
    assert misled["share"] > 0.5  # what this model's training made it do
    shares = [o.sources for o in diagnoses.wrong if o.sources]
    assert sum(bool(o.sources) for o in diagnoses.examples) > len(shares)  # some right ones too, to compare with
    assert all(abs(s["lean"] + s["form"] + s["knowledge"] + s["image"] - s["log_odds"]) < 1e-5 for s in shares)
    words = [
        o.sources["log_odds"] - o.sources["image"]
        for o in diagnoses.wrong
        if o.verdict == "overridden by the prior" and o.sources
    ]
    assert words
    assert max(words) < 0
    text = (run / "report.html").read_text()
    assert "Verdict: overridden by the prior" in text


def test_the_report_shows_the_sources_of_right_and_wrong_answers(run: Path) -> None:
    diagnoses = json.loads((run / "diagnosis" / "diagnoses.json").read_text())["diagnoses"]
    split = [diagnosis for diagnosis in diagnoses if diagnosis["sources"]]
    rows = re.findall(
        r"<tr><td>(\w+): (right|wrong) \((\d+)\)</td>" + r"<td>([^ ]+) \[[^]]+\]</td>" * 4, report_of(run)
    )
    assert {"right", "wrong"} == {row[1] for row in rows}
    for level, side, n, lean, form, knowledge, image in rows:
        shares = [
            o["sources"] for o in split if o["example"]["level"] == level and bool(o["verdict"]) == (side == "wrong")
        ]
        assert int(n) == len(shares)
        for name, cell in (("lean", lean), ("form", form), ("knowledge", knowledge), ("image", image)):
            assert float(cell) == pytest.approx(sum(o[name] for o in shares) / len(shares), abs=0.0051)
    knowledge_of = {row[1]: float(row[5]) for row in rows if row[0] == "attribute"}
    assert (
        knowledge_of["wrong"] < 0 < knowledge_of["right"]
    )  # what the nouns suggest is against the truth of wrong answers
    verdicts = Counter(o["verdict"] for o in diagnoses if o["verdict"] and o["example"]["level"] == "attribute")
    assert f"<td>{', '.join(f'{n} {verdict}' for verdict, n in verdicts.most_common())}</td>" in report_of(run)


def report_of(run: Path) -> str:
    return (run / "report.html").read_text()


class Reader(HTMLParser):
    """Collect what a page links to and loads."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if attributes.get("id"):
            self.ids.add(str(attributes["id"]))
        if tag == "a":
            self.links.append(str(attributes["href"]))
        if tag in {"img", "script", "link", "iframe"}:
            self.loaded.append(str(attributes.get("src") or attributes.get("href")))
        if tag == "img":
            assert attributes.get("alt")


def test_the_report_is_self_contained_and_shows_every_stage(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Reader()
    page.feed(text)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert all(source.startswith("data:image/png;base64,") for source in page.loaded)
    assert {
        "summary",
        "example",
        "levels",
        "accuracy",
        "known",
        "used",
        "sources",
        "why",
        "corrected",
        "made",
    } <= page.ids
    assert text.count("<svg") >= 7
    assert len(text) < 5e6
    assert not re.search(r"\bnan\b", re.sub(r"<svg.*?</svg>", "", text, flags=re.S))


WITHOUT_A_MODEL = """
import sys

MODEL = {"torch", "transformers", "nnsight", "transformer_lens", "tokenizers"}


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MODEL or name in {"lvlm.model", "lvlm.loading", "lvlm.embedded"}:
            raise ModuleNotFoundError(f"no {name} here", name=name)


sys.meta_path.insert(0, Absent())
from experiments.report import write_report

print(*write_report(sys.argv[1]))
"""


def test_the_report_needs_the_run_folder_only(run: Path, tmp_path: Path) -> None:
    """The page of a copy, written where no model can be imported, equals the page of the run but for the folder's name."""
    import shutil

    copy = tmp_path / "elsewhere"
    shutil.copytree(run, copy)
    (copy / "report.html").unlink()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_MODEL, str(copy)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == json.loads((run / "report" / "sections.json").read_text())
    assert report_of(copy).replace(str(copy), "runs/whole") == report_of(run)
    assert "not shown" not in report_of(run)


def test_a_run_of_an_earlier_version_gets_a_report_without_images(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no illustrations, and its results have the same digest; without activations the error by prior is left out too."""
    import shutil

    copy = tmp_path / "runs" / "old"
    shutil.copytree(run, copy)
    for folder in ("circuits", "behavior", "diagnosis"):
        shutil.rmtree(copy / folder / "illustrations")
        receipt = read_receipt(copy / folder)
        assert receipt is not None
        files = {name: sha for name, sha in receipt.files.items() if "illustrations" not in name}
        assert receipt.digest == dataclasses.replace(receipt, files=files).full_digest
        assert receipt.digest != receipt.full_digest
    status, output, errors = run_command(("report", "runs/old"), tmp_path, monkeypatch, capsys)
    assert (status, output) == (0, "report: runs/old/report.html\n"), errors
    text = report_of(copy)
    assert "<img" not in text
    for stage in ("patch", "evaluate", "diagnose"):
        assert f"stage {stage} was run by an earlier version, which did not store them" in text
        assert f"groundscope resume=runs/old stages=[{stage},report] force=true" in text
    shutil.rmtree(copy / "activations")
    assert run_command(("report", "runs/old"), tmp_path, monkeypatch, capsys)[0] == 0
    assert "The run folder has no activations" in report_of(copy)
    status, _, complaint = run_command(("report", "runs"), tmp_path, monkeypatch, capsys)
    assert (status, "cannot be used" in complaint) == (2, True)


def test_a_package_adds_a_section(run: Path, tmp_path: Path) -> None:
    import shutil

    from experiments.report import SECTIONS, Section, html, write_report

    shutil.copytree(run, tmp_path / "copy")
    data = Section(
        "Data", lambda files: html.section("data", "Data", html.paragraph(f"{len(files.examples)} questions"))
    )
    SECTIONS.register("data", data)
    try:
        parts = list(write_report(tmp_path / "copy"))
    finally:
        SECTIONS.unregister("data")
    assert parts[-2:] == ["data", "made"]
    assert '<a href="#data">Data</a>' in report_of(tmp_path / "copy")
    with pytest.raises(ConfigError, match="the report section 'data' is invalid: it is a str, not a Section"):
        SECTIONS.register("data", "html")  # pyright: ignore[reportArgumentType]


def test_damaged_illustrations_are_an_error(tmp_path: Path) -> None:
    from PIL import Image

    from experiments.results.illustrations import AttentionMap, Illustration, read_illustrations, write_illustrations

    picture = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    weights = np.array([[0.25, 0.5]], dtype=np.float32)
    entry = Illustration("a", picture, (60, 40), {"after": "no"}, {"L0.H1": AttentionMap(weights, 0.75)})
    assert read_illustrations(tmp_path) is None
    write_illustrations(tmp_path, [entry], "the twin has no weights")
    loaded = read_illustrations(tmp_path)
    assert loaded is not None
    assert (list(loaded), loaded.reason, loaded["a"].size, loaded["a"].answers) == (
        ["a"], "the twin has no weights", (60, 40), {"after": "no"}
    )  # fmt: skip
    assert np.array_equal(np.array(loaded["a"].image), np.array(picture))
    assert np.array_equal(loaded["a"].attention["L0.H1"].weights, weights)
    write_illustrations(tmp_path, [dataclasses.replace(entry, size=(0, 1))])
    with pytest.raises(ConfigError, match="image size of example 0 is not positive"):
        read_illustrations(tmp_path)


def test_every_method_and_control_was_tried_at_every_strength(run: Path) -> None:
    sweep = json.loads((run / "steering" / "sweep.json").read_text())
    compared = {name for name, method in mitigations.items() if method.compared}
    assert set(sweep["curves"]) == {*compared, *(f"control: {name}" for name in CONTROLS)}
    for name, rows in sweep["curves"].items():
        unit = mitigations[name].unit if name in mitigations else 1.0
        assert [row["strength"] for row in rows] == [0, unit, 2 * unit]
        assert rows[0] == sweep["sweep"][0]
        assert rows[0]["cost"] == 0
    assert sweep["chosen"] in sweep["sweep"]
    rates = json.loads((run / "behavior" / "rates.json").read_text())
    assert set(rates) == {"before", "after", "exportable", *CONTROLS, "twin"}
    text = (run / "report.html").read_text()
    assert "Errors against cost" in text
    for name in sweep["curves"]:
        assert f"{name}</text>" in text
    vector = SteeringVector.load(run / "steering" / "vector.safetensors")
    assert vector.decay == 0.5
    for name in CONTROLS:
        control = SteeringVector.load(run / "steering" / steer.control_file(name))
        assert (control.strength, control.decay) == (vector.strength, 0.5)


def test_strengths_of_one_sweep_give_the_answers_of_separate_runs(run: Path) -> None:
    from behavior import answer
    from behavior.metrics import compute_metrics
    from lvlm import load_lvlm

    model, vector = load_lvlm("tiny"), SteeringVector.load(run / "steering" / "vector.safetensors")
    data = scenes.dataset(80, 0).filter(lambda e: bool(e.candidates))
    with vector.applied(model, 2.0):
        alone = compute_metrics(answer(model, data, progress=False), data)
    row = json.loads((run / "steering" / "sweep.json").read_text())["curves"]["discriminant"][-1]
    assert row["strength"] == 2
    assert {name: e.value for name, e in alone.items()} == {name: row[name] for name in alone}


def test_exports_are_written_or_the_reason_is_recorded(run: Path, tmp_path: Path) -> None:
    import shutil

    document = json.loads((run / "export" / "formats.json").read_text())
    assert document["written"] == {
        "safetensors": "vector.safetensors",
        "baked": "baked.safetensors",
        "gguf": "vector.gguf",
        "steering_vectors": "steering_vectors.pt",
        "vllm": "vllm.pt",
        "safetensors, exportable": "exportable.safetensors",
    }
    assert set(document["vectors"].values()) == {"best", "exportable"}
    assert set(document["refused"]) == {"vti"}
    assert "the format only on MLP output" in document["refused"]["vti"]
    readme = (run / "export" / "README.md").read_text()
    assert 'with steer(model, "vector.safetensors"):' in readme
    assert all(f"| {file} |" in readme for file in document["written"].values())
    assert (run / "export" / "apply_vector.py").read_bytes() == Path(apply_vector.__file__).read_bytes()
    saved, exported = (SteeringVector.load(run / part / "vector.safetensors") for part in ("steering", "export"))
    assert exported.provenance == saved.provenance
    assert "not written" in (run / "report.html").read_text()
    # An additive vector at heads and all tokens goes into biases, and where it is asked for through the projection.
    shutil.copytree(run, tmp_path / "runs" / "whole")
    folder = RunFolder(tmp_path / "runs" / "whole")
    entries: dict[Key, VectorChange] = {Head(2, 3): AddChange(np.eye(1, 24)[0])}
    plain = SteeringVector(entries, "all", 1.0, saved.model, saved.config_hash)
    plain.save(folder.path / "steering" / "vector.safetensors")
    config = RunConfig()
    config.model.path, config.export.convert = "tiny", True
    context = Context(config, folder, Console())
    assert "vti" in export.make_exports(context, tmp_path)
    document = json.loads((tmp_path / "formats.json").read_text())
    assert set(document["written"]) >= {"safetensors", "baked", "gguf", "steering_vectors", "vllm"}
    assert {document["vectors"][name] for name in ("baked", "gguf", "steering_vectors", "vllm")} == {"best"}
    assert all((tmp_path / file).is_file() for file in document["written"].values())
    config.export.formats = ["vti", "baked"]
    assert export.make_exports(context, tmp_path) == (
        "written: baked (baked.safetensors); cannot represent it: vti (reasons: formats.json)"
    )


def test_the_exportable_vector_is_reported_with_what_it_costs(run: Path) -> None:
    sweep = json.loads((run / "steering" / "sweep.json").read_text())
    exportable = sweep["exportable"]
    vector = SteeringVector.load(run / "steering" / "exportable.safetensors")
    assert (vector.kind, vector.positions, vector.decay, vector.strength) == (
        "add",
        "all",
        1,
        exportable["chosen"]["strength"],
    )
    assert vector.layers == (3, 4)
    assert exportable["method"] == "optimize"
    assert exportable["chosen"]["excess"] <= 1
    assert exportable["chosen"]["harm"] < exportable["curves"][exportable["name"]][0]["harm"]
    assert {"loss: chair", "loss: caption_recall", "loss: plain_text"} <= exportable["chosen"].keys()
    guards = json.loads((run / "behavior" / "guards.json").read_text())
    assert set(guards["conditions"]) == {"after", "exportable"}
    assert not guards["not_measured"]
    before, after, loss = (guards["conditions"]["exportable"]["neutral"][k] for k in ("before", "after", "loss"))
    rates = json.loads((run / "behavior" / "rates.json").read_text())
    assert before["value"] == pytest.approx(rates["before"]["neutral: right"]["value"])
    assert after["value"] == pytest.approx(rates["exportable"]["neutral: right"]["value"])
    assert loss["value"] == pytest.approx(before["value"] - after["value"])
    text = (run / "report.html").read_text()
    assert "What it costs" in text
    assert "present objects denied" in text


def test_every_exported_file_does_what_the_exportable_vector_does(run: Path) -> None:
    """Each file by the rule of its consumer, on one batch, to 1e-5."""
    import torch

    from lvlm import load_lvlm
    from mitigation.steering.export import apply_bias
    from mitigation.steering.export.gguf import check

    model, folder = load_lvlm("tiny"), run / "export"
    vector = SteeringVector.load(folder / "exportable.safetensors")
    inputs = next(model.batches(scenes.dataset(10, 7)[:4])).inputs
    plain = model.logits(inputs)
    with vector.applied(model):
        expected = model.logits(inputs)

    def added(rows: dict[int, torch.Tensor]) -> torch.Tensor:
        layers = model.layers("decoder")
        hooks = [layers[i].register_forward_hook(lambda _m, _a, out, row=row: out + row) for i, row in rows.items()]
        try:
            return model.logits(inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def opened(name: str) -> Any:
        return torch.load(folder / name, weights_only=True)  # noqa: TID251  # as the consumer does

    undo = apply_bias.apply(model.hf, folder / "baked.safetensors")
    results = {"baked": model.logits(inputs)}
    undo()
    results["gguf"] = added({i: torch.tensor(row) for i, row in check(folder / "vector.gguf").items()})
    results["vllm"] = added(dict(enumerate(opened("vllm.pt"))))
    results["steering_vectors"] = added(opened("steering_vectors.pt")["layer_activations"])
    with apply_vector.steer(model.hf, folder / "exportable.safetensors"):
        results["apply_vector"] = model.logits(inputs)
    for name, logits in results.items():
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5, msg=name)
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_a_second_run_skips_what_is_done(run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.parent != run}
    done = groundscope("name=whole", *SMALL, cwd=run.parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unchanged") == len(DEFAULT_STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_another_option_runs_its_stage_and_what_follows(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "runs" / "whole")
    options = ("name=whole", *SMALL, "probe.concepts=[object:named]", "stages=[examples,trace,probe]")
    done = groundscope(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unchanged") == 2
    assert re.search(r"probe +[\d.]+ s", done.stdout)
    # A byte that is not what the receipt says: that stage runs again, alone.
    victim = tmp_path / "runs" / "whole" / "probes" / "plan.json"
    victim.write_text(victim.read_text() + " ")
    second = groundscope(*options, cwd=tmp_path)
    assert second.stdout.count("unchanged") == 2
    assert re.search(r"probe +[\d.]+ s", second.stdout)


KILLED = ["activations", "probes", "circuits", "steering", "behavior", "diagnosis", "export", "report"]


@pytest.mark.parametrize(
    ("folder", "by"), [*((folder, signal.SIGKILL) for folder in KILLED), ("activations", signal.SIGINT)]
)
def test_a_run_killed_in_a_stage_resumes(run: Path, tmp_path: Path, folder: str, by: signal.Signals) -> None:
    """Kill the whole process, or press Ctrl-C, once the stage has begun; the next run finds what the shared run found."""
    import shutil

    shutil.copytree(run, tmp_path / "runs" / "whole")
    shutil.rmtree(tmp_path / "runs" / "whole" / folder)
    order = ["examples", "activations", "probes", "circuits", "steering", "behavior", "diagnosis", "export", "report"]
    options = ["name=whole", *SMALL, f"stages=[{','.join(DEFAULT_STAGES[: order.index(folder) + 1])}]"]
    if folder == "steering":  # the other methods take most of the time, and the summary has none of them
        options.append("steer.compare=false")
    begun = tmp_path / "runs" / "whole" / folder / ".key"
    delay = 0.0 if folder == "export" else 0.3  # that stage takes a tenth of a second
    killed = start_command(*options, cwd=tmp_path, alarm=Alarm(str(begun), by, delay)).wait(300)
    assert begun.exists()
    if by == signal.SIGINT:
        complaint = killed.stderr
        assert killed.returncode == 130, complaint
        assert "stopped; finished work is kept: continue with groundscope resume=runs/whole" in complaint
        assert "Traceback" not in complaint
    else:
        assert killed.returncode == -by, killed.stderr
    assert not (tmp_path / "runs" / "whole" / folder / "stage.json").exists()
    done = groundscope(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unchanged") == order.index(folder)
    first, second = (json.loads((r / folder / "stage.json").read_text()) for r in (run, tmp_path / "runs" / "whole"))
    assert first["summary"] == second["summary"]


def test_a_random_model_in_a_folder_knows_nothing(tmp_path: Path) -> None:
    build_model(5).save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    few = ("data.n_images=40", "data.test_images=10", "patch.pairs=4", "steer.strengths=[1]", "threads=1")
    done = groundscope("model=hf", "model.path=model", *few, "probe=quick", "name=random", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "random"
    grid = ProbeGrid.load(folder / "probes" / "decoder.resid_post@last")
    # Chance at the output, within what so few images allow.
    assert abs(grid.array("object:named")[-1] - 0.5) < 0.2
    assert (folder / "report.html").exists()


def test_files_in_popes_layout(tmp_path: Path) -> None:
    pope_folder(tmp_path)
    options = ["data=pope", "data.questions=pope_random.json", "data.images=images", "patch.pairs=10", "name=pope"]
    done = groundscope(*options, "steer.strengths=[1]", "threads=1", "probe=quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rates = json.loads((tmp_path / "runs" / "pope" / "behavior" / "rates.json").read_text())
    assert rates["before"]["all: right"]["value"] > 0.85
    assert (tmp_path / "runs" / "pope" / "report.html").exists()


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.path=./nowhere", "stages=[examples,trace]"], "no model folder 'nowhere'"),
        (["stages=[trase]"], "unknown stage 'trase'; choose from examples, trace"),
        (["stages=[probe]"], "stage 'probe' needs 'trace'"),
        (["data.seed=1000"], "test scenes must differ from discovery scenes"),
        (["data.n_images=2"], "at least 10 images"),
        (["trace.sites=[decoder.L40.z]", "stages=[examples,trace]"], "decoder.L40.z"),
        (["trace.tokens=[first]", "stages=[examples,trace]"], "unknown token selection 'first'"),
        (["probe.concepts=['object:zebra']", "stages=[examples,trace,probe]"], "object:zebra"),
        (["data=pope", "data.questions=q.json", "data.images=."], "q.json"),
        (["model=hf"], "model.path"),
        (["patch.kinds=[colour]", "stages=[examples,patch]"], "colour"),
        (["steer.method=magic"], "steer.method=magic: unknown method; choose from discriminant, amplify"),
        (["steer.strengths=[]"], "steer.strengths is empty"),
        (["steer.decay=0"], "steer.decay=0"),
        (["steer.method=vsv"], "steer.method=vsv needs an option: add +steer.options.example=…"),
        (["steer.method=iti", "steer.site=decoder.L3.z"], "steer.site has no effect with steer.method=iti"),
        (
            ["steer.method=vti_vision", "steer.positions=all"],
            "steer.positions has no effect with steer.method=vti_vision",
        ),
        (["steer.site=decoder.L40.z"], "steer.site=decoder.L40.z: site 'decoder.L40.z': tiny has decoder layers 0-5"),
        (["steer.positions=first"], "steer.positions: unknown token selection 'first'"),
        (["steer.exportable=[magic]"], "steer.exportable=magic: unknown method"),
        (["+steer.guards.recal=0.1"], "steer.guards: unknown guard 'recal'"),
        (["steer.guards.chair=-1"], "steer.guards: guard 'chair': the limit -1 must be at least 0"),
        (["export.formats=[onnx]"], "export.formats: unknown format 'onnx'; choose from safetensors, baked, gguf"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], message: str, command: Command) -> None:
    status, _, complaint = command("data.n_images=20", "data.test_images=20", "threads=1", *options)
    assert status == 2, complaint
    assert complaint.startswith("error: ")
    assert message in complaint
    assert len(complaint.strip().splitlines()) == 1
    assert "Traceback" not in complaint


def test_a_mistake_is_one_line_of_the_process_that_python_starts(tmp_path: Path) -> None:
    """As above, with the exit status and the output of `python -m experiments` itself."""
    words = [sys.executable, "-m", "experiments", "export.formats=[onnx]"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: export.formats: unknown format 'onnx'; choose from safetensors, baked, gguf")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_misspelt_option_is_refused(tmp_path: Path) -> None:
    done = groundscope("dta.n_images=20", cwd=tmp_path)
    assert done.returncode != 0
    assert "dta" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_of_another_version_is_refused(tmp_path: Path, command: Command) -> None:
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "run.json").write_text('{"layout": 99}')
    status, _, complaint = command("name=old")
    assert status == 2
    assert "has layout 99" in complaint


def test_a_broken_question_file_is_named_with_its_line(tmp_path: Path, command: Command) -> None:
    pope_folder(tmp_path, 5)
    words = ("data=pope", f"data.questions={tmp_path / 'pope_random.json'}", "data.images=images")
    file = tmp_path / "pope_random.json"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], '{"question_id": 3, "image"', *lines[4:]]))
    status, _, complaint = command(*words)
    assert status == 2
    assert "line 4" in complaint
    file.write_text("\n".join(lines))
    (tmp_path / "images" / "p2.png").write_bytes(b"not an image")
    status, _, complaint = command(*words)
    assert status == 2
    assert "p2.png" in complaint
    (tmp_path / "images" / "p2.png").unlink()
    status, _, complaint = command(*words)
    assert status == 2
    assert "p2.png" in complaint


def test_two_runs_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "runs" / "busy"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = groundscope("name=busy", cwd=tmp_path)
    assert done.returncode == 2
    assert "another groundscope process is running" in done.stderr


def test_the_strength_is_chosen_by_the_written_rule() -> None:
    rows = [
        {"strength": 0.0, "harm": 0.30, "cost": 0.0},
        {"strength": 1.0, "harm": 0.20, "cost": 0.005},
        {"strength": 2.0, "harm": 0.20, "cost": 0.005},
        {"strength": 3.0, "harm": 0.05, "cost": 0.08},
    ]
    assert choose_strength(rows, max_drop=0.01)["strength"] == 1.0
    assert choose_strength(rows, max_drop=0.10)["strength"] == 3.0
    assert choose_strength(rows[:1], max_drop=0.0)["strength"] == 0.0


def test_the_cost_of_a_correction_is_its_worst_loss() -> None:
    def estimates(**rates: float) -> dict[str, Estimate]:
        return {name.replace("_", " ").replace(" right", ": right"): Estimate(r, r, r, 10) for name, r in rates.items()}

    before = estimates(neutral_right=0.99, typical_color_right=1.0)
    assert cost(estimates(neutral_right=0.98, typical_color_right=0.95), before) == pytest.approx(0.05)
    assert cost(estimates(neutral_right=1.0, typical_color_right=1.0), before) == pytest.approx(0.0)
    assert cost({}, {}) == 0.0


def test_recall_guards_a_strength_where_nothing_else_can() -> None:
    """Questions about objects as POPE has them: saying no to all of them makes no false yes."""

    def row(strength: float, false_yes: float, false_no: float) -> dict[str, float]:
        rates = {"adversarial absent: says yes": false_yes, "present: says no": false_no}
        estimates = {name: Estimate(rate, rate, rate, 10) for name, rate in rates.items()}
        return {"strength": strength, "harm": harm(estimates), "cost": cost(estimates, before), **rates}

    before = {n: Estimate(v, v, v, 10) for n, v in (("adversarial absent: says yes", 0.3), ("present: says no", 0.1))}
    rows = [row(0, 0.3, 0.1), row(1, 0.2, 0.11), row(8, 0.0, 1.0)]
    assert choose_strength(rows, max_drop=0.015)["strength"] == 1
    assert cost_measures(rows[0]) == ("present: says no",)
    assert cost_measures([*rows[0], "neutral: right"]) == ("neutral: right",)
    assert cost_measures(["adversarial absent: says yes"]) == ()


def test_options_are_checked_before_any_stage_works(tmp_path: Path, command: Command) -> None:
    for options in (["patch.kinds=[colour]"], ["steer.method=magic"]):
        assert command("data.n_images=20", "data.test_images=20", *options)[0] == 2
    assert not (tmp_path / "runs" / "default" / "examples").exists()


def test_telling_yes_from_no_needs_both(tmp_path: Path) -> None:
    data = scenes.dataset(12, 3).filter(lambda e: e.answer != "no")
    config = RunConfig()
    context = Context(config, RunFolder(tmp_path), Console())
    context.__dict__["parts"] = (data, data)
    with pytest.raises(ConfigError, match=r"no question has the answer no; use the method amplify"):
        steer.check(context)
    config.steer.method = "amplify"
    steer.check(context)


def test_markup_from_data_stays_text() -> None:
    from experiments.report.html import figure, page, paragraph, section, table

    evil = '<script>alert("1")</script>'
    parts = [paragraph(evil), table([evil], [[evil]]), figure("<svg ></svg>", evil)]
    text = page(evil, evil, [("a", evil, section("a", evil, *parts)), ("b", evil, section("b", "without markup"))])
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;") == 11
