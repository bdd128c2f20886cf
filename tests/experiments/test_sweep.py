"""Stages that runs share, sweeps on every launcher, and traces in parts."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from activation_store import ActivationStore, verify
from experiments import data as run_data
from experiments import pipeline
from experiments.cli.launch import launcher_options
from experiments.cli.overrides import compose
from experiments.cli.sweep import job_name
from experiments.config import RunConfig
from experiments.pipeline import execute
from experiments.planning.estimate import estimate
from experiments.run import stage_cache
from experiments.run.context import Context
from experiments.run.folder import RunFolder, read_receipt
from experiments.stages.registry import TABLE
from groundscope.core.errors import ConfigError
from groundscope.core.packages import PACKAGES
from lvlm import Lvlm, load_lvlm
from tests.toys.command_line import FEW, ROOT, TRACED, Command, run_command, spawn

QUIET = Console(file=io.StringIO())


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: run_command(arguments, tmp_path, monkeypatch, capsys)


def configured(root: Path, name: str, *overrides: str) -> RunConfig:
    return compose([*TRACED, f"root={root}", f"name={name}", *overrides])[0]


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[Lvlm]:
    """The embedded model, loaded once for all runs of this process."""
    model = load_lvlm("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Context, "_load", lambda _, path: {"tiny": model}[path])
        yield model


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, loaded: Lvlm) -> Path:
    """The root of a run that was traced in one piece."""
    root = tmp_path_factory.mktemp("traced") / "runs"
    execute(configured(root, "whole", "stages=[examples,trace]"), QUIET)
    return root


@pytest.fixture
def root(traced: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(traced, tmp_path / "runs")
    return tmp_path / "runs"


def trees(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")}


# -- what runs have in common --------------------------------------------------------------------------------------


def test_a_stage_has_its_threads_where_no_model_is_loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def probe(_: Context, folder: Path) -> str:
        counts.append(torch.get_num_threads())
        (folder / "done").write_text("")
        return ""

    monkeypatch.setattr(pipeline, "TABLE", {**TABLE, "probe": dataclasses.replace(TABLE["probe"], work=probe)})
    before = torch.get_num_threads()
    try:
        for threads in (3, 1):
            execute(
                configured(
                    root,
                    f"on{threads}",
                    f"threads={threads}",
                    f"probe.folds={threads + 2}",
                    "stages=[examples,trace,probe]",
                ),
                QUIET,
            )
    finally:
        torch.set_num_threads(before)
    assert counts == [3, 1]


def test_a_second_run_takes_what_the_first_made(root: Path) -> None:
    """No model is loaded, the bytes are the same file, and each run is whole without the other."""
    output = io.StringIO()
    options = ("stages=[examples,trace]", "probe.folds=3", "name=other")
    config = configured(root, "other", *options)
    execute(config, Console(file=output, width=200))
    assert output.getvalue().count("(made by whole)") == 2
    for folder in ("examples", "activations"):
        for path in (root / "whole" / folder).glob("[!.]*"):
            if path.name != "stage.json":
                assert path.samefile(root / "other" / folder / path.name)
    shutil.rmtree(root / "whole")
    assert verify(root / "other" / "activations").ok
    output.truncate(0)
    execute(config, Console(file=output, width=200))
    assert output.getvalue().count("unchanged") == 2
    third = configured(root, "third", "stages=[examples]")
    execute(third, Console(file=output, width=200))
    assert read_receipt(root / "third" / "examples").origin == "whole"  # type: ignore[union-attr]


def test_a_run_never_writes_into_what_another_holds(root: Path) -> None:
    execute(configured(root, "other", "stages=[examples]"), QUIET)
    mine, theirs = (root / name / "examples" / "discovery.jsonl" for name in ("other", "whole"))
    before = theirs.read_bytes()
    # The same key, another content: the work that is done again writes in place.
    folder = RunFolder(root / "other")
    receipt = folder.receipt("examples")
    assert receipt is not None
    folder.finish("examples", "examples", receipt.key, lambda at: str((at / "discovery.jsonl").write_text("other")))
    assert mine.read_text() == "other"
    assert theirs.read_bytes() == before


def test_a_shared_stage_that_is_outdated_is_not_reused(root: Path) -> None:
    victim = root / "whole" / "examples" / "held_out.jsonl"
    victim.write_text(victim.read_text() + "\n")
    execute(configured(root, "other", "stages=[examples]"), QUIET)
    receipt = read_receipt(root / "other" / "examples")
    assert receipt is not None
    assert receipt.origin == ""
    assert receipt.holds(root / "other" / "examples")


def test_force_runs_a_stage_again(root: Path) -> None:
    # The time of change: a new file may have the number of the one that was deleted.
    old = (root / "whole" / "examples" / "discovery.jsonl").stat().st_mtime_ns
    notes = root / "whole" / "examples" / "notes.txt"
    notes.write_text("x")
    with pytest.raises(ConfigError, match=r"notes\.txt' was not written by this stage"):
        execute(configured(root, "whole", "stages=[examples]", "force=true"), QUIET)
    assert notes.read_text() == "x"
    assert read_receipt(root / "whole" / "examples") is not None
    notes.unlink()
    execute(configured(root, "whole", "stages=[examples]", "force=true"), QUIET)
    assert (root / "whole" / "examples" / "discovery.jsonl").stat().st_mtime_ns > old


def test_two_runs_that_want_the_same_stage_make_it_once(tmp_path: Path) -> None:
    options = ("stages=[examples]", "data.n_images=200", "data.test_images=200")
    both = [spawn(f"name={name}", *options, cwd=tmp_path) for name in "ab"]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("(made by" in text for text in outputs) == 1
    assert (tmp_path / "runs/a/examples/discovery.jsonl").samefile(tmp_path / "runs/b/examples/discovery.jsonl")
    assert not list((tmp_path / "runs" / ".locks").iterdir())


# -- sweeps --------------------------------------------------------------------------------------------------------

LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
    "ray": [
        "hydra/launcher=ray",
        *(f"+hydra.launcher.ray.init.{o}" for o in ("include_dashboard=false", "num_cpus=2")),
    ],
}
NO_RAY = pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_ray_launcher") is None,
    reason="hydra-ray-launcher conflicts with the tested versions; CONTRIBUTING.md shows how to run this test without them",
)


def test_ray_workers_import_our_packages_before_the_current_folder_is_on_their_path() -> None:
    option = "+hydra.launcher.ray.init.runtime_env"
    (word,) = launcher_options(["hydra/launcher=ray", "probe.folds=2,3"])
    key, _, hook = word.partition("=")
    assert key == f"{option}.worker_process_setup_hook"
    module, _, name = hook.rpartition(".")
    code = f"import sys; from {module} import {name}; {name}(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(PACKAGES) <= set(done.stdout.split())
    assert launcher_options(["hydra/launcher=ray", f"{option}={{working_dir: x}}"]) == []
    assert launcher_options(["hydra/launcher=joblib"]) == []


@pytest.mark.parametrize(
    "launcher", [name if name != "ray" else pytest.param(name, marks=NO_RAY) for name in LAUNCHERS]
)
def test_a_sweep_shares_its_trace_and_a_failed_job_leaves_the_others(root: Path, launcher: str) -> None:
    """Two jobs reuse the existing trace, a third fails; the table, the page and the list report it.

    The folder has packages named like ours, as a research repository has: neither the command nor a worker imports them.
    """
    for room in PACKAGES:
        (root.parent / room).mkdir(exist_ok=True)
        (root.parent / room / "__init__.py").write_text("raise RuntimeError(__file__)\n")
    words = [*TRACED, "data.n_images=10,5", "probe.folds=2,3", "stages=[examples,trace]", "sweep.name=s"]
    process = spawn("-m", *[w for w in words if w != "data.n_images=10"], *LAUNCHERS[launcher], cwd=root.parent)
    _, complaint = process.communicate(timeout=300)
    assert process.returncode == 1, complaint
    assert "sweep: 2 of 4 jobs done" in complaint
    assert complaint.count("n_images=5, seed=0; give at least 10 images") == 2
    assert "continue with: groundscope resume=runs/sweeps/s" in complaint
    sweep = root / "sweeps" / "s"
    for folds in (2, 3):
        receipt = read_receipt(sweep / f"data.n_images=10,probe.folds={folds}" / "activations")
        assert receipt is not None
        assert receipt.origin == "whole"
    document = json.loads((sweep / "sweep.json").read_text())
    assert document["by"] == ["data.n_images", "probe.folds"]
    assert [j["status"] for j in document["jobs"]] == ["done", "done", "failed", "failed"]
    with (sweep / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Two jobs, two stages, the seconds of each.
    assert {(r["data.n_images"], r["probe.folds"], r["stage"]) for r in rows} == {
        ("10", folds, stage) for folds in "23" for stage in ("examples", "trace")
    }
    page = (sweep / "report.html").read_text()
    assert "2 of 4 jobs did not finish." in page
    assert "at least 10 images" in page


def test_a_choice_of_the_group_sweep_is_a_sweep(root: Path, command: Command) -> None:
    status, _, complaint = command(*TRACED, "sweep=seeds", "stages=[examples]", "name=n")
    assert status == 0
    assert "sweep: 3 of 3 jobs done" in complaint
    assert {p.name for p in (root / "sweeps" / "n").glob("[!.]*/")} == {f"probe.seed={n}" for n in range(3)}
    # Going on with it finds everything done.
    status, output, _ = command(f"resume={root / 'sweeps' / 'n'}")
    assert (status, output.count("unchanged")) == (0, 3)


def test_a_sweep_draws_one_small_picture_a_figure() -> None:
    from experiments.report.sweep import make_sweep_report

    rows = [
        {"job": n, "folder": f"f{n}", "probe.folds": folds, "probe.seed": seed, "stage": "probe", "measure": measure,
         "value": 0.6 + 0.01 * n, "low": 0.5, "high": 0.9, "control": 0.5, "main": main}
        for n, (folds, seed) in enumerate((f, s) for f in "34" for s in "01")
        for measure, main in (("z, <b>object</b>", True), ("resid, object", True), ("hidden", False))
    ]  # fmt: skip
    records = [{"job": r["job"], "options": {}, "status": "done", "folder": r["folder"]} for r in rows[::3]]
    page = make_sweep_report(Path("runs/sweeps/s"), ["probe.folds", "probe.seed"], records, rows)
    assert page.count("<svg") == 1
    assert "seed=0" in page
    assert "hidden" not in page
    assert "<b>" not in page
    assert page.count("<td>0.63</td>") == 2


def test_jobs_are_named_by_what_they_differ_in() -> None:
    def named(by: list[str], *overrides: str) -> str:
        name = next((o.partition("=")[2] for o in overrides if o.startswith("name=")), "x")
        quoted = ",".join(f"'{b}'" for b in by)
        return job_name(compose([f"sweep.by=[{quoted}]", "sweep.name=s", f"name={name}"])[0], overrides)

    assert named(["probe.folds"], "probe.folds=3", "threads=1") == "sweeps/s/probe.folds=3"
    assert named(["trace.shard"], "trace.shard=3") == "x"
    assert named(["trace.shard", "data.seed"], "trace.shard=3", "data.seed=1") == "sweeps/s/data.seed=1"
    assert named(["name"], "name=own") == "own"
    long = [f"sweeps/s/{'steer.strengths=[' + '1.0,' * 40}{n}]" for n in (1, 2)]
    names = {named(["steer.strengths"], n.removeprefix("sweeps/s/")) for n in long}
    assert len(names) == 2
    assert all(len(n) < 120 and "[" not in n for n in names)


# -- a trace in parts ----------------------------------------------------------------------------------------------


def test_parts_make_the_store_that_one_process_makes(root: Path, traced: Path, command: Command) -> None:
    """Part 1 is killed in the middle, a merge says what is missing, then all is as from one piece."""
    shutil.rmtree(root / "whole" / "activations")
    parts = ("stages=[examples,trace]", "trace.shards=3")
    first = configured(root, "whole", *parts, "trace.shard=0")
    execute(first, QUIET)
    assert not (root / "whole" / "activations" / "stage.json").exists()
    process = spawn("name=whole", *TRACED, *parts, "trace.shard=1", cwd=root.parent)
    at_work = root / "whole" / "activations" / ".worker-1.lock"
    deadline = time.monotonic() + 100
    while not at_work.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (root / "whole" / "activations" / "manifest-1.json").exists()
    status, _, complaint = command("name=whole", *TRACED, *parts)
    assert status == 2
    assert "2 of 3 parts are not traced: 1,2; trace them with groundscope -m" in complaint
    assert (
        "was started with trace.shards=3, not 4: continue with that number"
        in command("name=whole", *TRACED, "stages=[examples,trace]", "trace.shards=4", "trace.shard=0")[2]
    )
    for number in (1, 2):
        execute(configured(root, "whole", *parts, f"trace.shard={number}"), QUIET)
    merged, whole = (ActivationStore(r / "whole" / "activations") for r in (root, traced))
    assert verify(root / "whole" / "activations").ok
    assert list(merged.frame()["id"]) == list(whole.frame()["id"])
    for layer in range(6):
        np.testing.assert_array_equal(
            merged.read(f"decoder.L{layer}.z", "last"), whole.read(f"decoder.L{layer}.z", "last")
        )
    # In one piece or in parts: it is the same stage, so neither is traced again.
    for more in (parts, ("stages=[examples,trace]",), (*parts, "trace.shard=2")):
        assert "trace     unchanged" in command("name=whole", *TRACED, *more)[1]


def test_a_plan_grows_with_the_examples_and_leaves_nothing(root: Path, loaded: Lvlm) -> None:
    config = configured(root, "planned")
    context = Context(config, RunFolder(root / "planned"), QUIET)
    questions = [e for e in context.discovery if e.candidates]
    count = len(questions)
    plan = estimate(context, seconds=60)
    # As long as it may take: all examples are measured, so nothing is extrapolated.
    assert (plan.examples, plan.measured) == (count, count)
    assert plan.sites == {"decoder.z/last": count * 6 * 192 * 4.0}
    chunks = [questions[i : i + 32] for i in range(0, count, 32)]  # eight batches of four share a chunk
    assert plan.forwards == sum(len(list(loaded.batches(chunk, 4))) for chunk in chunks)
    store = sum(
        p.stat().st_size for p in (root / "whole" / "activations").glob("*.[hj][5s]*") if p.name != "stage.json"
    )
    assert plan.on_disk == pytest.approx(store, rel=0.05)
    double = estimate(context, examples=2 * count, seconds=0.01)
    assert double.sites == {"decoder.z/last": 2 * count * 6 * 192 * 4.0}
    assert double.loading is not None
    hours = [double.hours(1), double.hours(4)]
    assert hours[0] is not None
    assert hours[1] is not None
    assert hours[0] > 3 * (hours[1] - double.loading / 3600)
    assert [p.name for p in (root / "planned").iterdir()] == ["run.json"]


def test_parts_need_the_examples_of_the_run(tmp_path: Path, command: Command) -> None:
    status, _, complaint = command(*TRACED, "stages=[trace]", "trace.shards=2", "trace.shard=0")
    assert status == 2
    assert "stage 'trace' needs 'examples'" in complaint
    with pytest.raises(ConfigError, match="no other stage can run"):
        execute(configured(tmp_path, "x", "trace.shards=2", "trace.shard=0"), QUIET)
    assert [run.name for run in stage_cache.runs_in(tmp_path / "runs")] == ["default"]
    assert FEW[0] in TRACED


def test_the_configuration_of_a_job_is_composed_and_checked_once_and_its_scenes_are_drawn_once(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra composes each job of a sweep twice by itself; the command's own composition and check come once a command."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    from concepts import scenes
    from experiments import validation

    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, as_name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **more: Any) -> Any:
            counts[as_name] += 1
            return original(*args, **more)

        monkeypatch.setattr(owner, name, counted)

    count(ConfigLoaderImpl, "load_sweep_config", "jobs composed")
    count(scenes, "dataset", "parts drawn")
    monkeypatch.setattr(validation, "RULES", (lambda _: counts.update(["checked"]), *validation.RULES))
    run_data._scenes.cache_clear()
    few = ("data.n_images=11", "data.test_images=12", "threads=1", "stages=[examples]")
    status, _, complaint = command("-m", *few, "probe.seed=0,1,2", "name=s")
    assert (status, "3 of 3 jobs done" in complaint) == (0, True)
    assert counts == {"jobs composed": 3, "checked": 3 + 1, "parts drawn": 2}
    counts.clear()
    assert command(*few, "name=alone")[0] == 0
    assert counts == {"checked": 1}
