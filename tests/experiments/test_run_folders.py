"""Run folders that are received, damaged, or contain other files: nothing outside is changed, nothing is lost."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from rich.console import Console

from concepts import scenes
from concepts.scenes import splits
from experiments import pipeline
from experiments.cli.overrides import compose, quoted, read, to_config
from experiments.cli.resume import _allowed, configured
from experiments.config import RunConfig, key_options
from experiments.pipeline import execute
from experiments.results.run_files import RunFiles
from experiments.run import folder
from experiments.run.context import Context, fingerprint
from experiments.run.folder import RunFolder, read_receipt, write_json
from experiments.stages.export import make_exports
from experiments.stages.registry import TABLE
from experiments.stages.steer import make_steering
from experiments.validation import check
from groundscope.core.document_digest import document_digest
from groundscope.core.errors import ConfigError
from tests.toys.command_line import FEW, ROOT, Command, run_command

QUIET = Console(file=io.StringIO())
EXAMPLES = ("stages=[examples]", *FEW)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *arguments: run_command(arguments, tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has made its examples."""
    root = tmp_path_factory.mktemp("made") / "runs"
    execute(compose([*EXAMPLES, f"root={root}", "name=sent"])[0], QUIET)
    return root / "sent"


@pytest.fixture
def received(finished_folder: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage: ``runs/sent``."""
    shutil.copytree(finished_folder, tmp_path / "runs" / "sent")
    return tmp_path / "runs" / "sent"


def change(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file, and its digest if it has one, as an attacker would."""
    record = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(record | ({"digest": document_digest(record)} if "digest" in record else {})))


def receipt_with(received: Path, name: str) -> None:
    path = received / "examples" / "stage.json"
    change(path, files=json.loads(path.read_text())["files"] | {name: "0" * 64})


def refused(result: tuple[int, str, str], *words: str) -> None:
    status, _, complaint = result
    assert status == 2, complaint
    assert complaint.startswith("error: ")
    assert len(complaint.strip().splitlines()) == 1
    for word in words:
        assert word in complaint


# -- names, links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../../id_rsa", "{root}/id_rsa", "", "a/../../../../id_rsa", "a\0b", "./x", "a//b"]
)
def test_a_receipt_names_files_of_its_folder_only(received: Path, tmp_path: Path, command: Command, name: str) -> None:
    (tmp_path / "id_rsa").write_text("key")
    receipt_with(received, name.format(root=tmp_path))
    for words in (["resume=runs/sent"], ["resume=runs/sent", "stages=[examples]", "data.n_images=11"]):
        refused(command(*words), "stage.json", "is not a name below")
    assert (tmp_path / "id_rsa").read_text() == "key"
    status, output, _ = command("status")
    assert status == 0
    assert "is not a name below" in " ".join(output.split())  # the table wraps long paths


def test_another_runs_receipt_overwrites_nothing(finished_folder: Path, tmp_path: Path, command: Command) -> None:
    from hashlib import sha256

    shutil.copytree(finished_folder, tmp_path / "runs" / "sweeps" / "s" / "j")
    theirs, mine = tmp_path / "runs" / "sweeps" / ".bashrc", tmp_path / ".bashrc"
    theirs.write_text("theirs")
    mine.write_text("mine")
    path = tmp_path / "runs" / "sweeps" / "s" / "j" / "examples" / "stage.json"
    files = json.loads(path.read_text())["files"]
    change(path, files=files | {"../../../.bashrc": sha256(b"theirs").hexdigest()})
    status, output, _ = command("name=x", *EXAMPLES)
    assert status == 0
    assert "shared" not in output
    assert mine.read_text() == "mine"


PLACES = [
    "examples",
    "examples/discovery.jsonl",
    "examples/stage.json",
    "examples/.key",
    ".lock",
    "config.yaml",
    "run.json",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_link_is_not_followed(received: Path, tmp_path: Path, command: Command, place: str) -> None:
    """Whatever is a link in a run's folder: what it points to is as it was."""
    outside = tmp_path / "outside"
    if place == "examples":
        shutil.copytree(received / place, outside)
        (outside / "thesis.tex").write_text("mine")
        shutil.rmtree(received / place)
    else:
        source = received / place
        outside.write_bytes(source.read_bytes() if source.exists() else b"mine")
        source.unlink(missing_ok=True)
    (received / place).symlink_to(outside)

    def state() -> list[tuple[str, bytes]]:
        files = [outside] if outside.is_file() else sorted(outside.iterdir())
        return [(p.name, p.read_bytes()) for p in files]

    before = state()
    for words in (["resume=runs/sent"], ["resume=runs/sent", "data.n_images=11"], ["name=sent", *EXAMPLES]):
        status, _, complaint = command(*words)
        assert status in {0, 2}
        assert "Traceback" not in complaint
        assert state() == before
    assert command("status")[0] in {0, 2}
    assert state() == before


def test_a_run_folder_that_is_a_link_is_refused(received: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "runs" / "other").symlink_to(received)
    refused(command("resume=runs/other"), "symbolic link")
    refused(command("name=other", *EXAMPLES), "symbolic link")


def test_a_part_file_cannot_be_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in (f".x.json.{os.getpid()}.part", f"x.json.{os.getpid()}.part", "x.json.part", ".x.json.part"):
        (tmp_path / name).symlink_to(outside)
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
    (tmp_path / f"y.json.{os.getpid()}-{'0' * 16}.part").symlink_to(outside)  # even one who foresees the name
    write_json(tmp_path / "x.json", [1])
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "y.json", [1])
    assert outside.read_text() == "mine"
    assert json.loads((tmp_path / "x.json").read_text()) == [1]


# -- consent ---------------------------------------------------------------------------------------------------------------


def test_consent_to_code_is_given_in_this_call_only(
    received: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[bool] = []
    work = dataclasses.replace(TABLE["examples"], work=lambda c, _: str(flags.append(c.config.model.trust_remote_code)))
    monkeypatch.setattr(pipeline, "TABLE", {**TABLE, "examples": work})
    path = received / "config.yaml"
    path.write_text(path.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    refused(
        command("resume=runs/sent", "force=true"),
        "config.yaml",
        "add model.trust_remote_code=true to this command line",
    )
    assert flags == []
    assert command("resume=runs/sent", "force=true", "model.trust_remote_code=true")[0] == 0
    assert command("resume=runs/sent", "force=true", "model.trust_remote_code=false")[0] == 0
    assert flags == [True, False]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("name: ${oc.env:HOME}\n", "interpolation"),
        ("report:\n  title: ${oc.env:HOME}\n", "interpolation"),
        ("data:\n  loader:\n    _target_: os.system\n", "options of Hydra"),
        ("hydra:\n  run:\n    dir: /tmp/x\n", "options of Hydra"),
        ("hydra.run.dir: /tmp/x\n", "options of Hydra"),
        ("name: x\nname: y\n", "does not fit"),
        ("name: [\n", "does not fit"),
        ("- 1\n", "does not fit"),
        ("data: &a {source: scenes}\nmodel: *a\n", "aliases"),
        ("model: 3\n", "does not fit"),
        ("{" * 100000, "16 levels"),
        ("probe:\n  folds: many\n", "does not fit"),
        ("name: \udcff\n", "UTF-8"),
    ],
)
def test_a_stored_configuration_is_data(received: Path, command: Command, line: str, words: str) -> None:
    (received / "config.yaml").write_bytes(line.encode(errors="surrogateescape"))
    refused(command("resume=runs/sent"), "config.yaml", words)


@pytest.mark.parametrize(
    "word",
    ["--config-dir=evil", "-cd", "hydra.run.dir=/tmp/x", "+hydra/launcher=x", "model.trust_remote_code=true",
     "++model={trust_remote_code: true}", "report.title=${oc.env:HOME}", "+data.loader._target_=os.system"],
)  # fmt: skip
def test_a_stored_command_line_is_data(tmp_path: Path, command: Command, word: str) -> None:
    folder = tmp_path / "runs" / "sweeps" / "s"
    folder.mkdir(parents=True)
    write_json(folder / "sweep.json", {"command": ["-m", word, "probe.folds=2,3", *EXAMPLES]})
    refused(command("resume=runs/sweeps/s"), "sweep.json", "not taken from a file")
    assert sorted(p.name for p in folder.iterdir()) == ["sweep.json"]


def test_options_of_an_earlier_version_are_read_under_their_present_names(received: Path, command: Command) -> None:
    """Stored names are translated, with keys as before; a name that is typed now is answered with the present one."""
    path = received / "config.yaml"
    present = yaml.safe_load(path.read_text())
    former = copy.deepcopy(present)
    former["probe"]["penalties"] = [0.5]
    former["patch"]["tokens"] = "suffix"
    del former["probe"]["C"]
    path.write_text(yaml.safe_dump(former))
    config = configured(received)
    assert config.probe.C == [0.5]
    assert key_options("probe", dataclasses.asdict(config.probe)) == former["probe"]
    assert config.patch.tokens == "suffix:all"
    assert key_options("patch", dataclasses.asdict(config.patch)) == former["patch"]
    refused(command("probe.penalties=[1]"), "option 'probe.penalties' is now called 'probe.C'")
    stored = ["-m", "++probe.penalties=[1],[2]", "patch.tokens=suffix", "probe.folds=2,3"]
    assert _allowed(stored, [], path) == ["-m", "++probe.C=[1],[2]", "patch.tokens=suffix:all", "probe.folds=2,3"]


# -- runs, and files that are not ours -------------------------------------------------------------------------------------


def test_a_run_is_never_inside_another(received: Path, command: Command) -> None:
    before = {p: p.read_bytes() for p in received.rglob("*") if p.is_file()}
    refused(command("name=sent/examples", *EXAMPLES), "is inside the run")
    refused(command("name=sent/deep/er", *EXAMPLES), "is inside the run")
    assert command("name=exp/examples", *EXAMPLES)[0] == 0
    refused(command("name=exp", *EXAMPLES), "contains the run")
    assert len(list((received.parent / "exp" / "examples").rglob("*.jsonl"))) == 2
    assert before == {p: p.read_bytes() for p in before}


def test_a_folder_that_is_no_run_is_not_used(tmp_path: Path, command: Command) -> None:
    mine = tmp_path / "runs" / "mine"
    (mine / "examples").mkdir(parents=True)
    (mine / "examples" / "thesis.tex").write_text("mine")
    refused(command("name=mine", *EXAMPLES), "is not a run and contains 'examples'")
    write_json(mine / "run.json", {"layout": 1})  # the marker alone does not make its folders ours
    refused(command("name=mine", *EXAMPLES), "thesis.tex", "not written by this stage")
    assert (mine / "examples" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("finished", [True, False])
def test_a_users_file_in_a_stage_folder_is_never_removed(received: Path, command: Command, *, finished: bool) -> None:
    notes = received / "examples" / "deep" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    assert "unchanged" in command("resume=runs/sent")[1]  # harmless while nothing is removed
    if not finished:
        (received / "examples" / "stage.json").unlink()
        assert (
            command("resume=runs/sent")[0] == 0
        )  # the same key: nothing has to be cleared, and the file stays the user's
        assert "deep/notes.txt" not in read_receipt(received / "examples").files  # type: ignore[union-attr]
        (received / "examples" / "stage.json").unlink()
    before = {p: p.read_bytes() for p in received.rglob("*") if p.is_file() and p.name != ".lock"}
    refused(command("resume=runs/sent", "data.n_images=11"), "notes.txt", "move that file away")
    refused(command("resume=runs/sent", "force=true"), "notes.txt")
    remaining = {
        p: p.read_bytes() for p in received.rglob("*") if p.is_file() and p.name not in {".lock", ".failed.json"}
    }
    assert remaining == before
    shutil.rmtree(notes.parent)
    assert command("resume=runs/sent", "data.n_images=11")[0] == 0


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", "", "a\0b"])
def test_a_sweep_stays_under_the_root(tmp_path: Path, command: Command, name: str) -> None:
    refused(command("-m", "probe.folds=2,3", f"sweep.name={quoted(name)}", *EXAMPLES), "sweep.name=", "plain name")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["a/../b", "", "x" * 300, "\udcff", "sweeps", "sweeps/s", ".locks", "a//b"])
def test_a_name_is_plain_text(tmp_path: Path, command: Command, name: str) -> None:
    refused(command(f"name={quoted(name)}", *EXAMPLES), "name=")
    assert not (tmp_path / "runs").exists()


# -- receipts that cannot be read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "invalid JSON"),
        (b"[]", "must be an object"),
        (b'{"stage": "examples", "stage": "x"}', "occurs twice"),
        (b"\xff\xfe", "UTF-8"),
        (None, "FIFO"),
        ({"files": {"discovery.json": 3}}, "must be text"),
        ({"files": {"discovery.json": "x"}}, "SHA-256"),
        ({"seconds": "long"}, "must be a number"),
        ({"stamps": {"discovery.json": [1]}}, "must be a list of 2"),
        ({"wings": 2}, "of a newer release"),
        ({"outside": {"../x": "0" * 64}}, "not the plain name"),
    ],
)
def test_a_receipt_that_cannot_be_used_is_not_a_missing_one(
    received: Path, command: Command, content: bytes | dict[str, Any] | None, words: str
) -> None:
    path = received / "examples" / "stage.json"
    if isinstance(content, dict):
        change(path, **content)
    else:
        path.unlink()
        os.mkfifo(path) if content is None else path.write_bytes(content)
    refused(command("resume=runs/sent"), "stage.json", words)
    status, output, _ = command("status")  # of a root with one such receipt
    assert status == 0
    assert words in output
    refused(command("compare", "runs/sent", "runs/sent"), "stage.json")
    path.unlink()
    assert command("resume=runs/sent")[0] == 0


def test_an_unreadable_receipt_names_the_reason(received: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr("experiments.records.read_json", refuse)
    with pytest.raises(ConfigError, match=r"stage\.json: cannot be read: Input/output error"):
        read_receipt(received / "examples")


def test_a_receipt_of_an_older_release_is_read_and_its_stage_made_again(received: Path, command: Command) -> None:
    path = received / "examples" / "stage.json"
    old = {
        k: v
        for k, v in json.loads(path.read_text()).items()
        if k in {"stage", "key", "files", "seconds", "summary", "stamps", "origin"}
    }
    path.write_text(json.dumps(old | {"key": "0" * 64}))
    (received / "examples" / ".key").write_text("0" * 64)
    assert "●" in command("status")[1].splitlines()[1]
    refused(
        command("resume=runs/sent", "stages=[patch]"), "needs 'examples'", "older release", "stages=[examples,patch]"
    )
    status, output, _ = command("resume=runs/sent")
    assert (status, "unchanged" in output) == (0, False)
    assert "unchanged" in command("resume=runs/sent")[1]


# -- what enters a key -----------------------------------------------------------------------------------------------------


def test_a_call_that_makes_nothing_writes_nothing(received: Path, command: Command) -> None:
    change(received / "environment.json", python="2.7")
    before = {
        p: (p.read_bytes(), p.stat().st_mtime_ns) for p in received.rglob("*") if p.is_file() and p.name != ".lock"
    }
    assert command("resume=runs/sent", "probe.folds=3")[0] == 0
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before}


def test_packages_and_plugins_enter_the_key_and_threads_the_receipt(
    received: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "unchanged" in command("resume=runs/sent")[1]
    installed = folder._installed
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_installed", lambda name: "1.0.OLD" if name == "torch" else installed(name))
        assert "unchanged" not in command("resume=runs/sent", "threads=1")[1]
        receipt = read_receipt(received / "examples")
        assert receipt is not None
        assert receipt.environment["packages"]["torch"] == "1.0.OLD"
        assert receipt.environment["threads"] == 1
    assert "unchanged" not in command("resume=runs/sent")[1]
    assert "unchanged" in command("resume=runs/sent", "threads=2")[1]
    with monkeypatch.context() as patch:
        patch.setattr(folder, "plugins", lambda: ("groundscope.metrics:m=x:y dist 1.0",))
        assert "unchanged" not in command("resume=runs/sent")[1]


def test_a_stage_of_other_examples_is_not_used(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steering is learned from a trace; the examples are made again with more images, then steering alone is asked for."""

    def written(stage: str) -> Callable[[Context, Path], str]:
        return lambda _, root: str((root / f"{stage}.json").write_text("{}"))

    fakes = {
        name: dataclasses.replace(TABLE[name], work=written(name), check=lambda _: None)
        for name in ("trace", "patch", "steer")
    }
    monkeypatch.setattr(pipeline, "TABLE", {**TABLE, **fakes})
    assert command("name=a", "stages=[examples,trace,patch,steer]", *FEW)[0] == 0
    assert command("resume=runs/a", "stages=[steer]")[1].count("unchanged") == 1
    assert command("resume=runs/a", "stages=[examples]", "data.n_images=12")[0] == 0
    refused(
        command("resume=runs/a", "stages=[steer]"),
        "needs 'trace'",
        "other results of 'examples'",
        "stages=[trace,steer]",
    )
    assert command("resume=runs/a", "stages=[trace,patch,steer]")[0] == 0
    refused(command("resume=runs/a", "stages=[steer]", "trace.dtype=float16"), "needs 'trace'", "other options")
    (tmp_path / "runs" / "a" / "activations" / "trace.json").write_text("[]")
    refused(command("resume=runs/a", "stages=[steer]"), "needs 'trace'", "has changed since it was made ('trace.json')")


FILES = ["chat_template.jinja", "chat_template.json", "additional_chat_templates/tool.jinja", "merges.txt", "tokenizer.model",
         "processor_config.json", "preprocessor_config.json", "generation_config.json", "model.safetensors.index.json",
         "modeling_own.py", "own/layers.py", "special_tokens_map.json", "vocab.txt"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_decides_is_in_the_models_key(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    keys = [fingerprint(str(tmp_path))]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for content in ("a", "b"):
        path.write_text(content)
        keys.append(fingerprint(str(tmp_path)))
    assert len({json.dumps(key) for key in keys}) == 3
    (tmp_path / "README.md").write_text("words")
    assert fingerprint(str(tmp_path)) == keys[-1]


def test_a_large_file_is_sampled_beyond_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.run.context._LARGE", 1000)
    monkeypatch.setattr("experiments.run.context._SMALL", 500)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(5000))
    stamp = path.stat().st_mtime_ns
    before = fingerprint(str(tmp_path))
    path.write_bytes(bytes(2500) + b"x" + bytes(2499))
    os.utime(path, ns=(stamp, stamp))
    assert fingerprint(str(tmp_path)) != before


def test_the_spec_file_is_in_the_models_key_and_consent_is_not(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("a: 1")
    config = compose([f"model.spec={spec}", "name=x"])[0]
    context = Context(config, RunFolder(tmp_path / "x"), QUIET)
    first = json.dumps(context.model_key())
    spec.write_text("a: 2")
    assert json.dumps(context.model_key()) != first
    second = json.dumps(context.model_key())
    config.model.trust_remote_code = True
    assert json.dumps(context.model_key()) == second


def test_runs_of_earlier_versions_have_the_same_model_key(tmp_path: Path) -> None:
    """They had neither the default dtype `auto` nor the options that are null by default."""
    config = compose(["name=x", "model.path=tiny", "model.twin=null"])[0]
    options = Context(config, RunFolder(tmp_path / "x"), QUIET).model_key()[0]  # type: ignore[index]
    assert options == {"path": "tiny", "twin": None, "dtype": "float32", "device": "cpu", "spec": None}
    config.model.min_pixels, config.model.cache_dir = 100, "elsewhere"
    assert Context(config, RunFolder(tmp_path / "x"), QUIET).model_key()[0] == {**options, "min_pixels": 100}  # type: ignore[index]


def test_a_hub_id_counts_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(commit: str) -> Callable[..., Path]:
        return lambda *_: tmp_path / "models--a--b" / "snapshots" / commit / "config.json"

    keys = []
    for commit in ("1" * 40, "2" * 40):
        monkeypatch.setattr("lvlm.model_files.hub_file", cached(commit))
        keys.append(fingerprint("a/b"))
    assert keys == [["a/b", "1" * 40], ["a/b", "2" * 40]]


# -- values ----------------------------------------------------------------------------------------------------------------

WRONG = [
    "patch.pairs=0", "patch.pairs=-1", "patch.top=-1", "patch.top=0", "steer.strengths=[1,-1]", "steer.strengths=[nan]",
    "data.limit=-1", "data.limit=0", "diagnose.limit=-1", "data.seed=-1", "data.test_seed=-3", "probe.seed=-1",
    "diagnose.seed=-1", "probe.test_fraction=0", "probe.test_fraction=1", "probe.test_fraction=nan", "data.test_share=-0.1",
    "probe.folds=1", "probe.C=[]", "probe.C=[0]", "patch.min_effect=-1", "steer.max_drop=nan",
    "model.dtype=bf16", "trace.dtype=float8", "trace.sites=[resid_pst]", "trace.tokens=[lst]",
    "probe.concepts=[objct:dog]", "patch.tokens=lst", "steer.doubt=inf",
    "trace.layers=[]", "trace.layers=[-1]", "trace.heads=[]", "trace.heads=[-1]",
    "trace.shard_size=0", "evaluate.max_new_tokens=0", "evaluate.top_p=2",
]  # fmt: skip


@pytest.mark.parametrize("word", WRONG)
def test_a_value_that_cannot_be_is_refused_before_any_work(word: str) -> None:
    options = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.from_dotlist(["model.path=tiny", word]))
    with pytest.raises(ConfigError, match=re.escape(word.partition("=")[0].removesuffix("s"))):
        check(to_config(options))


def test_a_concept_that_the_data_lack_is_refused_before_any_work(tmp_path: Path, command: Command) -> None:
    refused(command("name=x", *FEW, "probe.concepts=[object:dgo]"), "concept 'object:dgo'", "did you mean object:dog")
    assert not list(tmp_path.rglob("stage.json"))


def test_the_nearest_word_is_named(command: Command) -> None:
    for word, near in (("trace.sites=[resid_pst]", "resid_post"), ("model.dtype=float31", "float32")):
        assert f"did you mean {near}" in command("name=x", *FEW, word)[2]


@pytest.mark.parametrize("count", [*range(10, 70), 300, 333, 500])
def test_so_many_scenes_are_drawn_as_are_asked_for(count: int) -> None:
    counts = splits._counts(count)
    assert sum(counts.values()) == count
    exact = {design: count * share for design, share in splits.SHARES.items()}
    assert all(abs(counts[design] - value) <= 1 for design, value in exact.items())
    if sum(round(value) for value in exact.values()) == count:  # data that were right are as they were
        assert counts == {design: round(value) for design, value in exact.items()}


def test_thirty_images_are_thirty() -> None:
    assert len({e.group for e in scenes.dataset(30, 0)}) == 30


def test_the_advice_for_values_works() -> None:
    for value in ("a=b", "a#b", "(x)", "~x", "a,b", "größe", "文", "it's", "a\\b", "a\\'b\\", "[x", "a b ", "'", ""):
        assert read([f"report.title={quoted(value)}"]).overrides[0].value() == value


def test_a_bad_value_is_answered_by_a_command_that_works(command: Command) -> None:
    complaint = command("name=x", *EXAMPLES, "report.title=a=b#(c~ü")[2]
    assert "\"report.title='a=b#(c~ü'\"" in complaint
    assert command("name=x", *EXAMPLES, "report.title='a=b#(c~ü'")[0] == 0


def test_the_version_is_ours(command: Command) -> None:
    from importlib.metadata import version

    assert command("--version")[:2] == (0, f"groundscope {version('groundscope')}\n")


# -- stages that cannot be made --------------------------------------------------------------------------------------------


def photographs(tmp_path: Path) -> Context:
    """Four photographs with five questions each."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    lines = []
    for i in range(4):
        Image.new("RGB", (64, 64), "red").save(tmp_path / "images" / f"{i}.png")
        for j, noun in enumerate(("apple", "dog", "car", "cat", "bus")):
            about = {"question_id": 5 * i + j, "image": f"{i}.png", "label": "yes" if j % 2 else "no"}
            lines.append(
                json.dumps({**about, "text": f"Is there {'an' if noun == 'apple' else 'a'} {noun} in the image?"})
            )
    (tmp_path / "pope.json").write_text("\n".join(lines))
    words = [
        "data=pope",
        f"data.questions={tmp_path}/pope.json",
        f"data.images={tmp_path}/images",
        "name=x",
        "model.twin=null",
    ]
    return Context(compose(words)[0], RunFolder(tmp_path / "x"), QUIET)


def test_probes_that_few_images_cannot_make_are_left_out(tmp_path: Path) -> None:
    from activation_store import trace
    from experiments.stages.probe import make_probes
    from experiments.stages.trace import traced_examples

    context = photographs(tmp_path)
    trace(
        context.model,
        traced_examples(context),
        sites=["z"],
        tokens=["last"],
        out=context.folder.path / "activations",
        progress=False,
    )
    root = tmp_path / "probes"
    root.mkdir()
    summary = make_probes(context, root)
    assert summary.startswith("left out: no concept has enough images of both classes")
    assert "data.questions" in summary
    assert "n_images" not in summary
    assert json.loads((root / "plan.json").read_text()) == []
    assert json.loads((root / "left_out.json").read_text())["reason"] in summary


def test_pairs_that_photographs_do_not_allow_are_refused_before_work(tmp_path: Path) -> None:
    context = photographs(tmp_path)
    context.config.steer.method = "pair_difference"
    with pytest.raises(
        ConfigError, match="pair_difference: it needs pairs of kind object, color, relation, which only icon scenes"
    ):
        TABLE["steer"].check(context)
    context.config.steer.method = "amplify"
    TABLE["steer"].check(context)


def test_no_vector_is_not_a_vector_without_effect(tmp_path: Path) -> None:
    context = photographs(tmp_path)
    context.config.steer.exportable = []
    write_json(context.folder.path / "circuits" / "top.json", {"heads": [], "left_out": {}, "kinds": []})
    assert make_steering(context, tmp_path) == "no vector: no head to act on, since patching could score none"
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    assert sweep["chosen"] == {"strength": 0.0}
    assert "no head to act on" in sweep["left_out"]["discriminant"]


def test_a_vector_of_strength_0_is_not_exported(tmp_path: Path) -> None:
    import numpy as np

    from lvlm import Head
    from mitigation import SteeringVector
    from mitigation.steering.changes import AddChange

    folder = RunFolder(tmp_path / "x")
    (folder.path / "steering").mkdir()
    vector = SteeringVector({Head(2, 3): AddChange(np.eye(1, 24)[0])}, "all", 0.0, "m", "c")
    vector.save(folder.path / "steering" / "vector.safetensors")
    summary = make_exports(Context(RunConfig(), folder, QUIET), tmp_path)
    assert summary.startswith("nothing to write: no strength made fewer errors")
    assert json.loads((tmp_path / "formats.json").read_text()) == {"written": {}, "refused": {}}


# -- sweeps ----------------------------------------------------------------------------------------------------------------


def test_a_sweep_that_makes_nothing_keeps_its_seconds(tmp_path: Path, command: Command) -> None:
    assert command("-m", "data.seed=1,2", "sweep.name=s", *EXAMPLES)[0] == 0
    record = tmp_path / "runs" / "sweeps" / "s" / "sweep.json"
    about = json.loads(record.read_text())
    for job, seconds in zip(about["jobs"], (111.0, 222.0), strict=True):
        job["seconds"] = seconds
    write_json(record, about)
    (tmp_path / "runs").rename(tmp_path / "moved")
    record = tmp_path / "moved" / "sweeps" / "s" / "sweep.json"
    change(record, jobs=[job | {"folder": job["folder"].replace("runs/", "moved/", 1)} for job in about["jobs"]])
    status, output, _ = command("resume=moved/sweeps/s")
    assert (status, output.count("unchanged")) == (0, 2)
    assert [job["seconds"] for job in json.loads(record.read_text())["jobs"]] == [111.0, 222.0]
    command("resume=moved/sweeps/s", "data.n_images=11")
    assert all(job["seconds"] < 100 for job in json.loads(record.read_text())["jobs"])


# -- files -----------------------------------------------------------------------------------------------------------------


def test_the_page_is_written_whole_and_covered_by_its_receipt(
    received: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(context: Context, root: Path) -> str:
        folder.write_text(context.folder.path / "report.html", "<p>größer → \udcff</p>")
        write_json(root / "sections.json", [])
        return "a page"

    page = dataclasses.replace(TABLE["report"], work=write, needs=())
    monkeypatch.setattr(pipeline, "TABLE", {**TABLE, "report": page})
    path = received / "report.html"
    assert command("resume=runs/sent", "stages=[report]")[0] == 0
    assert path.read_bytes().decode() == "<p>größer → \\udcff</p>"
    assert "unchanged" in command("resume=runs/sent", "stages=[report]")[1]
    path.unlink()
    assert command("resume=runs/sent", "stages=[report]")[0] == 0
    assert path.is_file()
    outside = received.parent / "thesis.tex"
    outside.write_text("mine")
    path.unlink()
    path.symlink_to(outside)
    assert command("resume=runs/sent", "stages=[report]")[0] == 0
    assert outside.read_text() == "mine"
    assert not path.is_symlink()


def test_a_dollar_in_a_label_is_a_dollar() -> None:
    from experiments.report.figures import Point, rates

    figure = rates({"before": {"costs $5 and $x_{": Point(0.5, 0.4, 0.6)}}, {"before": "b"}, "$\\frac")
    for text in ("costs $5 and $x_{", "$\\frac"):
        assert text in figure


def test_a_sample_of_damaged_runs_is_refused_with_one_message(finished_run: Path) -> None:
    """One case of every kind of `benchmarks/hostile_folders.py`, which has thousands."""
    words = [
        "benchmarks/hostile_folders.py",
        "--cases",
        "7",
        "--seed",
        "3",
        "--limit",
        "200",
        "--run",
        str(finished_run),
    ]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=1500)
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["kinds"]) == 7
    assert report["failures"] == []
    assert all(figure["holds"] for figure in report["figures"].values())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mitigation.steering.export.gguf import check as read_vector

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        read_vector(tmp_path / "vector.gguf")


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    import numpy as np

    from circuits.results.head_plot import heatmap

    outside = tmp_path / "outside"
    outside.write_text("mine")
    path = tmp_path / "heads.svg"
    path.symlink_to(outside)
    heatmap(np.zeros((2, 2)), title="costs $5 and $x_{", label="$", path=path)
    assert outside.read_text() == "mine"
    assert not path.is_symlink()
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ConfigError, match="unknown picture format 'doc'; choose from"):
        heatmap(np.zeros((2, 2)), title="", label="", path=tmp_path / "heads.doc")


def test_concepts_asked_for_that_few_images_cannot_fit_are_left_out(tmp_path: Path) -> None:
    from activation_store import trace
    from experiments.stages.probe import make_probes
    from experiments.stages.trace import traced_examples

    context = photographs(tmp_path)
    context.config.probe.concepts = ["object:named"]
    trace(
        context.model,
        traced_examples(context),
        sites=["z"],
        tokens=["last"],
        out=context.folder.path / "activations",
        progress=False,
    )
    root = tmp_path / "probes"
    root.mkdir()
    summary = make_probes(context, root)
    assert summary.startswith("left out: ")
    assert json.loads((root / "plan.json").read_text()) == []


def test_control_characters_of_a_file_are_escaped_in_the_terminal(received: Path, command: Command) -> None:
    write_json(received / "circuits" / ".failed.json", {"error": "\x1b]0;owned\x07\x1b[2J"})
    change(received / "examples" / "stage.json", summary="\x1b[31mred")
    for words in (["status"], ["resume=runs/sent"]):
        status, output, _ = command(*words)
        assert status == 0
        assert "\x1b" not in output
        assert "\\x1b" in output


@pytest.mark.parametrize(
    ("file", "text", "result", "field"),
    [
        ("behavior/rates.json", "{}", "rates", "before"),
        ("behavior/rates.json", '{"before": {"all: right": {"value": 1, "low": 1, "high": 1}}}', "rates", "n"),
        (
            "steering/sweep.json",
            '{"method": "m", "rule": "r", "chosen": {}, "sweep": [], "curves": {}, "left_out": {}}',
            "sweep",
            "strength",
        ),
        ("circuits/top.json", '{"heads": [], "left_out": {}}', "top_heads", "kinds"),
        ("export/formats.json", '{"written": {}}', "exports", "refused"),
        ("environment.json", '{"python": "3", "system": "x"}', "environment", "packages"),
    ],
)
def test_a_missing_field_of_a_result_is_named(tmp_path: Path, file: str, text: str, result: str, field: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=rf"{Path(file).name}.* has no field '{field}'"):
        getattr(RunFiles(tmp_path), result)
