"""The command line: help, invalid options, locks, resuming runs, and its documentation."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import MISSING
from rich.console import Console

from experiments import pipeline
from experiments.cli.help import choices, groups
from experiments.cli.main import SHORT_RUNS, short_run_words
from experiments.cli.overrides import compose, read
from experiments.config import STAGES, RunConfig
from experiments.pipeline import execute
from experiments.run import live_table
from experiments.run.folder import RunFolder
from experiments.run.interrupts import defer_interrupt
from experiments.run.live_table import LiveTable
from experiments.stages.registry import TABLE
from groundscope.core.errors import ConfigError, StoreError
from groundscope.core.locks import lock
from groundscope.core.progress import display
from tests.toys.command_line import FEW, ROOT, Command, run_command


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: run_command(arguments, tmp_path, monkeypatch, capsys)


def examples_run(folder: Path, name: str = "x", **options: Any) -> Path:
    """A run that has made its examples."""
    config = RunConfig(name=name, root=str(folder), stages=["examples"], **options)
    config.model.path = "tiny"
    config.data.n_images = config.data.test_images = 10
    return execute(config, Console(file=io.StringIO()))


# -- help ----------------------------------------------------------------------------------------------------------


def test_help_loads_nothing_that_takes_long(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['groundscope', '--help']; import experiments; experiments.main(); print(sorted(sys.modules))"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 20  # a tenth of it on an idle machine: what is loaded is what counts
    *lines, modules = done.stdout.splitlines()
    assert "groundscope resume=runs/x" in "\n".join(lines)
    loaded = {name.split(".")[0] for name in json.loads(modules.replace("'", '"'))}
    assert not loaded & {"hydra", "omegaconf", "torch", "pandas", "numpy", "matplotlib", "transformers"}


@pytest.mark.parametrize(
    ("name", "text"), [("audit", "causes=[A,B]"), ("card", "card.benchmarks"), ("compare", "page=FILE")]
)
def test_each_command_has_help(command: Command, name: str, text: str) -> None:
    status, output, _ = command(name, "--help")
    assert status == 0
    assert output.startswith(f"groundscope {name} ")
    assert text in output


def test_help_lists_every_option_with_its_default(command: Command) -> None:
    written = {o.key: o for group in groups() for o in group.options}
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(RunConfig):
        value = getattr(RunConfig(), field.name)
        inner = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else None
        defaults |= {field.name: value} if inner is None else {f"{field.name}.{k}": v for k, v in inner.items()}
    assert written.keys() == defaults.keys()
    for key, option in written.items():
        assert len(option.meaning) > 10, key
        assert option.meaning.endswith("."), key
        assert yaml.safe_load(option.default) == (None if defaults[key] == MISSING else defaults[key]), key
    assert {"model", "data", "trace", "probe", "patch", "steer", "evaluate", "report", "sweep"} <= {
        g.name for g in groups()
    }
    for group in groups()[1:]:
        status, output, _ = command(f"help={group.name}")
        plain = "".join(output.split())
        assert status == 0
        for option in group.options:
            assert f"{option.key}={option.default}".replace(" ", "") in re.sub(r"\s", "", output) or option.key in plain
        assert all(name in output for name, _ in choices(group.name))
    assert "Folds of this cross-validation" in command("help=probe.folds")[1]
    for stage in STAGES:
        assert command(f"help={stage}")[0] == 0


def test_every_choice_of_every_group_has_a_description_and_composes() -> None:
    for group in groups()[1:]:
        for name, description in choices(group.name):
            assert description, f"{group.name}={name}"
            more = ["model.path=x"] if (group.name, name) == ("model", "hf") else []
            config, _ = compose([f"{group.name}={name}", *more])
            assert isinstance(config, RunConfig)
            if group.name in {"patch", "probe"}:
                pipeline.check(config)


# -- what is refused -----------------------------------------------------------------------------------------------

MISTAKES = [
    (["help=prob"], "unknown option or group 'prob'", "probe"),
    (["dta.n_images=20"], "unknown option 'dta.n_images'", "data.n_images"),
    (["folds=3"], "unknown option 'folds'", "probe.folds"),
    (["+probe.fold=3"], "unknown option 'probe.fold'", "probe.folds"),
    (["statsu", "runs"], "'statsu' is neither a command", "did you mean status"),
    (["model=tny"], "model=tny: unknown choice; choose from hf, tiny", "did you mean tiny"),
    (["data.n_images=many"], "data.n_images=many", "could not be converted to Integer"),
    (["probe.C=[0.1"], "probe.C=[0.1: cannot be parsed", "quotes"),
    (["probe.folds=3,4"], "probe.folds has several values", "add -m"),
    (["-m", "probe.folds=3,4", "model=tny"], "model=tny", "did you mean tiny"),
    (["-m", "probe.folds=3,4", "hydra/launcher=ray"], "hydra/launcher=ray is not installed", "CONTRIBUTING"),
    (
        ["hydra/launcher=jobib"],
        "hydra/launcher=jobib: unknown launcher; choose from basic, joblib",
        "did you mean joblib",
    ),
    (["model=hf"], "option model.path has no value", "model.path=…"),
    (["data.loader.captions=f"], "data.loader.captions", "write +data.loader.captions=f"),
    (["stages=[examples,prob]"], "unknown stage 'prob'", "did you mean probe"),
    (["stages=[]"], "runs nothing", "examples"),
    (["name=../x"], "name='../x'", "root=…"),
    (["data.questions=q.json"], "no effect with data=scenes", "data=pope"),
    (["model.path=some/model"], "with the twin of the embedded model", "model=hf model.path=some/model"),
    (["trace.sites=[resid_post]"], "z at the last token", "steer.method=amplify"),
    (["trace.shards=2", "trace.shard=2"], "numbered from 0", "to 1"),
    (["trace.shards=2", "trace.shard=1"], "no other stage can run", "stages=[examples,trace]"),
    (["trace.shards=2", "trace.shard=1", "stages=[trace]", "force=true"], "results of other parts", "activations"),
    (["evaluate.conditions=[befor]", *FEW], "unknown condition 'befor'", "did you mean before"),
    (["compare", "a", "b", "c", "d", "e"], "it received 5", "runs/a runs/b"),
    (["trace.batch_size=0"], "trace.batch_size=0", "at least 1"),
    (["stages=[probe]", *FEW], "stage 'probe' needs 'trace'", "resume=runs/default stages=[examples,trace,probe]"),
    (["root=/proc/runs", *FEW], "cannot be used", "root=…"),
    (["resume=runs/none"], "no run in 'runs/none'", "groundscope status runs"),
    (["status", "nowhere"], "no runs in 'nowhere'", "groundscope status FOLDER"),
    (["compare", "a"], "takes two runs", "runs/a runs/b"),
    (["compare", "a", "b"], "'a' is not a run", "status"),
    (["plan", "examples=few"], "groundscope plan", "examples=100000"),
    (["plan", "seconds=0"], "groundscope plan", "above 0"),
]


@pytest.mark.parametrize(
    ("options", "message", "advice"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_a_mistake_is_one_line_with_what_to_do(options: list[str], message: str, advice: str, command: Command) -> None:
    status, _, complaint = command(*options)
    assert status == 2, complaint
    assert complaint.startswith("error: ")
    assert len(complaint.strip().splitlines()) == 1
    assert message in complaint
    assert advice in complaint


def test_the_launchers_of_the_extra_are_known_where_they_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.cli.overrides.find_spec", lambda _: None)
    for name in ("joblib", "submitit_local", "submitit_slurm"):
        with pytest.raises(ConfigError, match=rf"{name} is not installed: pip install 'groundscope\[cluster\]'"):
            read(["-m", f"hydra/launcher={name}"])


def test_a_full_or_read_only_disk_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> Any:
        def work(*_: object) -> str:
            raise OSError(number, os.strerror(number), "runs/default/examples/x")

        return {**TABLE, "examples": dataclasses.replace(TABLE["examples"], work=work)}

    import errno

    for number, words in ((errno.ENOSPC, "disk full at 'runs/default"), (errno.EROFS, "read-only file system at")):
        monkeypatch.setattr(pipeline, "TABLE", refuse(number))
        status, _, complaint = command("stages=[examples]", *FEW)
        assert (status, len(complaint.splitlines())) == (2, 1)
        assert words in complaint


# -- one run, one process ------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from groundscope.core.locks import lock
from experiments.run.folder import RunFolder
with (RunFolder(Path(sys.argv[1])).lock() if sys.argv[2] == "run" else lock(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(100)
"""


def holding(path: Path, what: str) -> subprocess.Popen[str]:
    """Start a process that holds a lock."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), what], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path, command: Command) -> None:
    process = holding(tmp_path / "runs" / "default", "run")
    try:
        status, _, complaint = command("stages=[examples]", *FEW)
        assert status == 2
        assert f"process {process.pid} on " in complaint
        assert f"running: process {process.pid}" in command("status")[1]
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "runs" / "default" / ".lock").exists()
    assert command("stages=[examples]", *FEW)[0] == 0


def test_a_waiting_process_gets_the_lock_when_its_holder_dies(tmp_path: Path) -> None:
    process = holding(tmp_path / "door", "door")
    holders: list[str] = []

    def waiting(who: str) -> None:
        holders.append(who)
        process.kill()

    with lock(tmp_path / "door", waiting=waiting, transient=True):
        assert (tmp_path / "door").exists()
    process.wait()
    assert holders[0].startswith(f"process {process.pid} on ")
    assert not (tmp_path / "door").exists()


def test_parts_share_a_run_and_keep_others_out(tmp_path: Path) -> None:
    def enter(*, shared: bool) -> None:
        RunFolder(tmp_path).lock(shared=shared).__enter__()

    refused = pytest.raises(ConfigError, match="another groundscope process is running")
    with RunFolder(tmp_path).lock(shared=True), RunFolder(tmp_path).lock(shared=True), refused:
        enter(shared=False)
    with RunFolder(tmp_path).lock(), refused:
        enter(shared=True)


# -- going on ------------------------------------------------------------------------------------------------------


def test_a_stopped_run_prints_the_command_that_resumes_it(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "TABLE", {**TABLE, "examples": dataclasses.replace(TABLE["examples"], work=stop)})
        status, _, complaint = command("stages=[examples]", "name=x", *FEW)
    assert status == 130
    assert "continue with groundscope resume=runs/x" in complaint
    assert not (tmp_path / "runs" / "x" / "examples" / "stage.json").exists()
    (tmp_path / "runs").rename(tmp_path / "moved")
    status, output, _ = command("resume=moved/x", "data.n_images=11")
    assert status == 0
    assert "11 + 10 scenes, folder moved/x" in output
    config = yaml.safe_load((tmp_path / "moved" / "x" / "config.yaml").read_text())
    assert (config["root"], config["name"], config["data"]["n_images"]) == ("moved", "x", 11)
    assert "unchanged" in command("resume=moved/x")[1]
    assert "resume takes single options, not 'model=hf'" in command("resume=moved/x", "model=hf")[2]


@pytest.fixture
def felt() -> Iterator[Any]:
    """Python's own handler of Ctrl-C, which is not there where tests are started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_what_must_not_be_interrupted(felt: Any) -> None:
    done: list[str] = []

    def work() -> None:
        with defer_interrupt():
            signal.raise_signal(signal.SIGINT)
            done.append("inside")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inside"]
    assert signal.getsignal(signal.SIGINT) is felt
    with pytest.raises(ZeroDivisionError), defer_interrupt():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is felt
    thread = threading.Thread(target=lambda: defer_interrupt().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is felt
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work()  # a handler that ignores the signal continues to do so
    assert done == ["inside"] * 2


def test_a_configuration_of_another_version_is_refused(tmp_path: Path, command: Command) -> None:
    run = examples_run(tmp_path / "runs")
    written = (run / "config.yaml").read_text()
    (run / "environment.json").write_text('{"packages": {"groundscope": "9.9"}}')
    for line in ("probe:\n  bends: 3\n", "wings: 2\n", "force: [1]\n"):
        (run / "config.yaml").write_text(line)
        status, _, complaint = command("resume=runs/x")
        assert status == 2
        assert "written by groundscope 9.9 and does not fit this version" in complaint
        assert len(complaint.splitlines()) == 1
    (run / "config.yaml").write_text(written)
    assert command("resume=runs/x")[0] == 0


# -- messages ------------------------------------------------------------------------------------------------------


def finished_run(root: Path, name: str, right: float) -> Path:
    """A run with rates, one failed stage and one that was killed."""
    run = examples_run(root, name)
    folder = RunFolder(run)

    def rates(at: Path) -> str:
        rate = {"value": right, "low": right - 0.1, "high": right + 0.1, "n": 10}
        (at / "rates.json").write_text(
            json.dumps({"before": {"neutral: right": rate}, "after": {"neutral: right": rate}})
        )
        return "rates"

    folder.finish("evaluate", "behavior", "key", rates)
    folder.begin("circuits", "key")
    folder.begin("probes", "key")
    folder.fail("probes", StoreError("no [room]"))
    return run


def test_status_and_compare_print_the_numbers_of_the_files(tmp_path: Path, command: Command) -> None:
    finished_run(tmp_path / "runs", "a", 0.75)
    finished_run(tmp_path / "runs", "b", 0.5)
    status, output, _ = command("status", "runs")
    assert status == 0
    (line,) = [line for line in output.splitlines() if line.startswith("a ")]
    marks = {"examples": "●", "probe": "✗", "patch": "◐", "evaluate": "●"}
    assert re.findall("[●✗◐·]", line) == [marks.get(stage, "·") for stage in STAGES]
    assert "neutral: right 75.0 → 75.0 %" in output
    assert "probe: StoreError: no [room]" in output
    total = sum(
        p.stat().st_size for p in {q.stat().st_ino: q for q in (tmp_path / "runs").rglob("*") if q.is_file()}.values()
    )
    assert f"2 runs, {total / 1000:.1f} kB on the disk" in output
    assert command("status", "runs/a")[1].count("●") == line.count("●") + 1  # the legend has one
    status, output, _ = command("compare", "runs/a", "runs/b")
    assert status == 0
    assert re.search(r"evaluate: neutral: right, after +0\.75 \[0\.65, 0\.85\] +0\.5 \[0\.4, 0\.6\] +-0\.25", output)


def test_a_terminal_sees_one_table_with_rates_and_others_plain_lines() -> None:
    screen = io.StringIO()
    with LiveTable(["examples", "trace"], Console(file=screen, force_terminal=True, width=100)) as live:
        live.start("examples")
        live.finish("examples", "0.1 s", "made [some]")
        live.start("trace")
        with display() as bar:
            assert bar.disable
            task = bar.add_task("tracing", total=100)
            for _ in range(3):
                bar.advance(task, 10)
                time.sleep(0.01)
            console = Console(file=io.StringIO(), width=100)
            console.print(live.table())
            text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"examples +0\.1 s +made \[some\]", text)
    assert re.search(r"trace +0 s +tracing 30 of 100, [\d.]+/s, 0:\d\d left", text)
    assert "tracing" not in screen.getvalue().split("trace")[0]
    with display() as bar:
        assert bar.disable == (not Console(stderr=True).is_terminal)
    plain = io.StringIO()
    with LiveTable(["examples"], Console(file=plain, width=60)) as live:
        live.start("examples")
        live.finish("examples", "0.1 s", "made " + "much " * 20)
    assert plain.getvalue() == f"  examples      0.1 s  made {'much ' * 20}\n"


def test_long_stages_print_lines_without_a_terminal_and_tell_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    run = finished_run(tmp_path / "runs", "a", 0.75)
    monkeypatch.setattr(live_table, "LINE_EVERY", 0.1)
    monkeypatch.setattr(live_table, "RECORD_EVERY", 0.05)
    plain = io.StringIO()
    with lock(run / ".lock"), LiveTable(["trace"], Console(file=plain, width=60), run) as live:
        live.start("trace")
        with display() as bar:
            task = bar.add_task("tracing", total=1000)
            for _ in range(20):
                bar.advance(task, 10)
                time.sleep(0.02)
        output = command("status", "runs")[1]
        assert re.search(r"running: .*, trace for 0 s: tracing \d+0 of 1000, [\d.]+/s, 0:\d\d left", output)
        live.finish("trace", "1 s", "done")
    assert not (run / live_table.PROGRESS).exists()
    lines = plain.getvalue().splitlines()
    assert 2 <= len(lines) <= 12
    assert all(
        re.fullmatch(r"  trace +0:00  (tracing \d+0 of 1000, [\d.]+/s, 0:\d\d left|running)", line)
        for line in lines[:-1]
    )
    (run / live_table.PROGRESS).write_text('{"stage": 3}')
    with lock(run / ".lock"):
        status, output, _ = command("status", "runs")  # a damaged file is not progress
    assert status == 0
    assert "running: " in output
    assert " for 0 s" not in output


# -- the pages -----------------------------------------------------------------------------------------------------


def visible_lines() -> list[str]:
    """Every command that the README and the guides show, in blocks and within a line."""
    lines = []
    for guide in [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]:
        lines += re.findall(r"`(groundscope(?: [^`…]+)?)`", guide.read_text())
        for block in re.findall(r"^```sh\n(.*?)^```", guide.read_text(), flags=re.M | re.S):
            lines += [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("groundscope")]
    return list(dict.fromkeys(lines))


def test_the_guides_show_commands() -> None:
    assert len(visible_lines()) > 12


@pytest.mark.parametrize("line", visible_lines())
def test_every_command_of_the_guides_is_one(line: str, tmp_path: Path, command: Command) -> None:
    """Runs those that only look; composes the rest as the command does, launchers and all."""
    words = shlex.split(line, comments=True)[1:]
    if words and words[0].startswith("help"):
        assert command(*words)[0] == 0
        return
    if words and words[0] == "report":
        assert len(words) == 2
        return
    if words and words[0] in {"status", "compare"}:
        words = [w for w in words if not w.startswith("page=")]  # these runs have no answers to pair
        for name in ("a", "b", *(Path(w).name for w in words[1:])):
            finished_run(tmp_path / "runs", name, 0.5)
        assert command(*words)[0] == 0
        return
    if words and words[0] in {"preferences", "tune"}:  # its options are read before the run, which is not there
        status, _, error = command(*words)
        assert status == 2
        assert "no run in 'runs/" in error
        return
    if words and words[0] == "audit":  # alone, it audits the scenes (`test_audit_command`)
        assert len(words) == 1 or command(*words)[0] == 2
        return
    if words and words[0] in SHORT_RUNS:
        words = short_run_words(SHORT_RUNS[words[0]], words[1:])
    words = [w for w in words if w != "plan" and w.partition("=")[0] not in {"examples", "seconds"}]
    if words and words[0].startswith("resume="):
        words = words[1:]
    if "hydra/launcher=ray" in words and find_spec("hydra_plugins.hydra_ray_launcher") is None:
        with pytest.raises(ConfigError, match=r"pip install 'groundscope\[ray\]' in a separate environment"):
            read(words)
        words = [w for w in words if "hydra" not in w]
    request = read(words)
    config, own = compose(request.first())
    assert isinstance(config, RunConfig)
    if any(w.startswith("hydra/launcher=submitit") for w in words):
        assert own.launcher._target_.startswith("hydra_plugins.hydra_submitit_launcher")
    pipeline.check(config)


def test_a_signal_is_not_what_stops_a_lock(tmp_path: Path) -> None:
    """A lock's file may be written by whoever came last and died while writing: it is for people only."""
    (tmp_path / "door").write_text('{"process": 1, "ho')
    with lock(tmp_path / "door", refuse=lambda who: who):
        assert json.loads((tmp_path / "door").read_text())["process"] == os.getpid()
    process = holding(tmp_path / "door", "door")
    (tmp_path / "door").write_text("")
    with pytest.raises(ConfigError, match="another process"), lock(tmp_path / "door", refuse=lambda who: who):
        pass
    process.send_signal(signal.SIGTERM)
    process.wait()
