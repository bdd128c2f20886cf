"""Robustness against damaged run folders: every command must end with an answer or a clear error.

    python benchmarks/hostile_folders.py [--quick] [--cases 1000] [--workers N] [--seed 0] [--limit 60] [--run FOLDER]

A small run of all stages is made. Each case copies it and damages the copy in one way: file names with ``..`` or absolute
paths in receipts, symbolic links in place of files and folders, FIFOs in place of files, a wrong type for each field of each
JSON and YAML file, files that are empty, truncated, not UTF-8 or deeply nested, and files of the user in the folders of stages.
Then ``status``, ``compare``, ``resume`` and the report are run on it in a child process with a time limit. There is no
baseline; every figure is a count whose goal is 0:

hangs
    commands that exceeded the time limit;
touched_outside
    files outside the damaged run that were changed, created or removed;
tracebacks
    Python exceptions instead of an error message;
user_files_removed
    files of the user in the run folder that were removed;
undetected
    damage that no command reported, although one of them must.

Cases run in parallel (``--workers``). Each has its own temporary folder, and its commands run in their own process, so the
number of workers does not change the counts.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from benchmarks._harness import describe_device, figure, finish, option_parser, print_figures, progress, wide_console
from experiments.cli.main import main as command
from experiments.config import DEFAULT_STAGES
from experiments.report import write_report
from experiments.run.context import Context
from experiments.run.folder import RECEIPT, file_digest, stamp
from experiments.stages.registry import TABLE
from groundscope.core.document_digest import KEY, document_digest
from groundscope.core.errors import GroundscopeError

FOLDERS = tuple(TABLE[stage].folder for stage in DEFAULT_STAGES)
"""Folders of the stages of a default run."""
OPTIONS = (
    "model.twin=null", "data.n_images=30", "data.test_images=10", "trace.sites=[resid_post,z]", "trace.tokens=[last]",
    "probe=quick", "probe.concepts=[object:named]", "patch.kinds=[object]", "patch.pairs=4", "steer.compare=false",
    "steer.strengths=[1.0]", "evaluate.conditions=[before,after]", "diagnose.limit=0", "export.formats=[safetensors]",
    "threads=1",
)  # fmt: skip
"""A run of all stages that takes less than a minute."""
OUTSIDE_FILE = "mine.txt"
"""File in the folder outside the run; its content must not change."""
NAMES = (
    "../../../outside/mine.txt",
    "{outside}/mine.txt",
    "",
    "a/../../../../outside/mine.txt",
    "x\0y",
    ".",
    "..",
    "a//b",
)
"""File names that leave the folder of a stage or are invalid; ``{outside}`` is the absolute path of the folder outside."""
WRONG_VALUES: tuple[Any, ...] = ({"x": 1}, [[1]], None, True, "text", -1.5, 10**40)
WRONG_BYTES = (
    b"",
    b"{",
    b"[" * 100000,
    b"\xff\xfe\x00",
    b'{"a": 1, "a": 2}',
    b"NaN",
    b"\xef\xbb\xbf{}",
    b"null",
    b"3",
    b'"x"',
)
UNCHECKED_FIELDS = frozenset(
    {
        "environment", "loader", "stamps", "origin", "outside", "inputs", "basis", "error", "when", "plugins", "packages",
        "jobs",
    }
)  # fmt: skip
"""Fields in which any value is valid: information for the reader, or a cache key whose change only makes a stage run again."""


@dataclass(frozen=True)
class Damage:
    """One way to damage a run."""

    name: str
    kind: str
    apply: Callable[[Path, Path], None]
    """Damages the run's folder (first argument); the second argument is the folder outside the run."""
    must_be_detected: bool = True
    """Whether at least one command must report the damage."""
    reseal: bool = False
    """Whether the receipts are recomputed to match the damaged files, as an attacker would do."""
    user_file: str = ""
    """Path, relative to the run's folder, of a user's file that must not be removed."""


# -- ways to damage a run --------------------------------------------------------------------------------------------------


def list_damages(run: Path) -> Iterator[Damage]:
    """Yield every way to damage a run, in a fixed order."""
    files = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    texts = [f for f in files if f.endswith((".json", ".yaml")) and "probes/decoder" not in f]
    yield from _name_damages()
    yield from _link_damages(files)
    for file in [f for f in files if f.endswith((".json", ".jsonl", ".yaml", ".key", ".lock"))]:
        must = not file.endswith((".key", ".lock"))
        yield Damage(f"FIFO {file}", "FIFO", functools.partial(_replace_by_fifo, file), must_be_detected=must)
    for file in texts:
        for number, path in enumerate(_field_paths(_load(run / file))):
            unchecked = bool(set(path) & UNCHECKED_FIELDS) or file == "environment.json" or "n_images" in path
            for value in WRONG_VALUES:
                reseal = file.partition("/")[2] not in {"", RECEIPT}
                name = f"{file}:{'.'.join(map(str, path)) or 'all'} = {str(value)[:12]} ({number})"
                change = functools.partial(_replace_field, file, path, value)
                # OmegaConf converts numbers to text and text to numbers if the conversion is lossless.
                converted = file == "config.yaml" and not isinstance(value, dict)
                must = not (unchecked or converted or reseal)
                yield Damage(name, "type", change, must_be_detected=must, reseal=reseal)
    for file in files:
        for content in WRONG_BYTES:
            reseal = file.partition("/")[2] not in {"", RECEIPT, ".key"} and file.endswith((".json", ".jsonl"))
            replaceable = file in {"report.html", ".lock", "environment.json"} or file.endswith(".key")
            change = functools.partial(_replace_bytes, file, content)
            must = not (replaceable or reseal)
            yield Damage(f"bytes {file} {content[:8]!r}", "bytes", change, must_be_detected=must, reseal=reseal)
    for folder in FOLDERS:
        change = functools.partial(_add_user_file, folder)
        name, file = f"user's file in {folder}", f"{folder}/{OUTSIDE_FILE}"
        yield Damage(name, "user", change, must_be_detected=False, user_file=file)


def _name_damages() -> Iterator[Damage]:
    for folder in FOLDERS:
        for name in NAMES:
            change = functools.partial(_add_name_to_receipt, folder, name)
            yield Damage(f"name {name!r} in {folder}/{RECEIPT}", "name", change)
    for name in NAMES[:4]:
        for file, change in (
            ("circuits/top.json", lambda v, n: v["kinds"].append(n)),
            ("circuits/top.json", lambda v, n: v["heads"].append(n)),
            ("probes/plan.json", lambda v, n: v[0].update(stack=n)),
            ("export/formats.json", lambda v, n: v["written"].update({n: n})),
            ("steering/sweep.json", lambda v, n: v.update(method=n)),
        ):
            edit = functools.partial(_edit, file, name, change)
            yield Damage(f"name {name!r} in {file}", "name", edit, must_be_detected=False, reseal=True)
    for key, value in (
        ("model.trust_remote_code", True), ("report.title", "${oc.env:HOME}"), ("hydra.run.dir", "x"),
        ("data._target_", "os.system"),
    ):  # fmt: skip
        yield Damage(f"config.yaml {key}", "config", functools.partial(_set_option, key, value))


def _link_damages(files: list[str]) -> Iterator[Damage]:
    places = [
        *files,
        *FOLDERS,
        ".locks",
        "steering/vector.safetensors.part",
        f".report.html.{os.getpid()}.part",
        "circuits/.failed.json",
    ]
    for place in dict.fromkeys(places):
        for target in ("copy", OUTSIDE_FILE, "loop", "missing"):
            # A link to a file of equal content may be read, but never written through.
            change = functools.partial(_replace_by_link, place, target)
            yield Damage(f"link {place} -> {target}", "link", change, must_be_detected=False)


def _load(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)


def _write(path: Path, value: Any) -> None:
    text = yaml.safe_dump(value) if path.suffix == ".yaml" else json.dumps(value)
    path.unlink(missing_ok=True)  # runs that share a stage have hard links to the same file
    path.write_text(text, encoding="utf-8")


def _field_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every field; of a list only the first item's."""
    yield path
    if isinstance(value, dict):
        for name, inner in list(value.items())[:12]:
            yield from _field_paths(inner, (*path, name))
    elif isinstance(value, list) and value:
        yield from _field_paths(value[0], (*path, 0))


def _replace_field(file: str, path: tuple[Any, ...], wrong: Any, run: Path, _: Path) -> None:
    value = copy.deepcopy(_load(run / file))
    if not path:
        value = wrong
    else:
        parent = functools.reduce(lambda v, key: v[key], path[:-1], value)
        parent[path[-1]] = wrong if type(parent[path[-1]]) is not type(wrong) else {"x": [wrong]}
    _write(run / file, value)


def _replace_bytes(file: str, content: bytes, run: Path, _: Path) -> None:
    (run / file).unlink(missing_ok=True)
    (run / file).write_bytes(content)


def _replace_by_fifo(file: str, run: Path, _: Path) -> None:
    (run / file).unlink(missing_ok=True)
    os.mkfifo(run / file)


def _add_user_file(folder: str, run: Path, _: Path) -> None:
    (run / folder / OUTSIDE_FILE).write_text("mine", encoding="utf-8")


def _replace_by_link(place: str, target: str, run: Path, outside: Path) -> None:
    path = run / place
    targets = {
        "copy": outside / "copy",
        OUTSIDE_FILE: outside / OUTSIDE_FILE,
        "loop": path,
        "missing": outside / "missing",
    }
    if target == "copy":
        if path.is_dir():
            shutil.copytree(path, outside / "copy")
        elif path.is_file():
            shutil.copy2(path, outside / "copy")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(targets[target])


def _add_name_to_receipt(folder: str, name: str, run: Path, outside: Path) -> None:
    value = _load(run / folder / RECEIPT)
    digest = hashlib.sha256((outside / OUTSIDE_FILE).read_bytes()).hexdigest()
    value["files"][name.format(outside=outside)] = digest
    _write_receipt(run / folder, value)


def _write_receipt(folder: Path, value: dict[str, Any]) -> None:
    """Write a receipt with the digest of its content, as an attacker would do."""
    _write(folder / RECEIPT, value | {KEY: document_digest(value)})


def _edit(file: str, name: str, change: Callable[[Any, str], None], run: Path, outside: Path) -> None:
    value = _load(run / file)
    change(value, name.format(outside=outside))
    _write(run / file, value)


def _set_option(key: str, value: Any, run: Path, _: Path) -> None:
    config = _load(run / "config.yaml")
    *path, last = key.split(".")
    functools.reduce(lambda v, part: v.setdefault(part, {}), path, config)[last] = value
    _write(run / "config.yaml", config)


def _reseal(run: Path) -> None:
    """Recompute every receipt from the files in the folder."""
    for folder in FOLDERS:
        receipt = run / folder / RECEIPT
        value = _load(receipt)
        for name in value["files"]:
            path = run / folder / name
            if path.is_file() and not path.is_symlink():
                value["files"][name], value["stamps"][name] = file_digest(path), stamp(path)
        _write_receipt(run / folder, value)


# -- commands --------------------------------------------------------------------------------------------------------------


def _call_command(arguments: list[str]) -> tuple[int, str]:
    """Run the command line in this process; return its exit status and output."""
    from hydra.core.global_hydra import GlobalHydra

    output = io.StringIO()
    sys.argv = ["groundscope", *arguments]
    status = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            command()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:  # noqa: BLE001  # tracebacks are counted
            status = 1
            output.write(traceback.format_exc())
        finally:
            GlobalHydra.instance().clear()
    return status, output.getvalue()


def _call_report(run: Path) -> tuple[int, str]:
    """Write the report of a run from its files, independent of its receipts."""
    try:
        return 0, str(len(write_report(run)))
    except GroundscopeError as error:
        return 2, f"error: {error}"
    except BaseException:  # noqa: BLE001  # tracebacks are counted
        return 1, traceback.format_exc()


def list_calls(damage: Damage) -> dict[str, Callable[[], tuple[int, str]]]:
    """Return the calls on a damaged run by name; none recomputes expensive stages, which would take minutes."""
    calls: dict[str, Callable[[], tuple[int, str]]] = {
        "status": lambda: _call_command(["status", "runs"]),
        "compare": lambda: _call_command(["compare", "runs/whole", "runs/bad"]),
        "resume": lambda: _call_command(["resume=runs/bad", "stages=[examples]"]),
        "resume changed": lambda: _call_command(["resume=runs/bad", "stages=[examples]", "data.test_images=11"]),
        "resume report": lambda: _call_command(["resume=runs/bad", "stages=[report]"]),
    }
    if damage.reseal:
        calls["report"] = lambda: _call_report(Path("runs/bad"))
    return calls


def _run_calls(damage: Damage, folder: Path, sender: Connection) -> None:
    """Run all calls in `folder`; send ("begin", name, "") before each, and (name, status, output) after it."""
    os.chdir(folder)
    sys.stdin.close()
    for name, call in list_calls(damage).items():
        sender.send(("begin", name, ""))
        status, output = call()
        sender.send((name, status, output[-2000:]))
    sender.close()


# -- cases -----------------------------------------------------------------------------------------------------------------


def hash_files(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder; of links the target, of folders and special files the mode."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        name = str(path.relative_to(folder))
        if path.is_symlink():
            digests[name] = f"-> {path.readlink()}"
        elif path.is_file():
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            digests[name] = str(mode)
    return digests


def _without_locks(digests: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in digests.items() if not name.endswith(".lock")}


def run_case(whole: Path, damage: Damage, limit: float) -> tuple[Counter[str], str]:
    """Damage a copy of a run and run all calls on it, in a new temporary folder.

    Returns
    -------
    counts
        Failures by kind.
    message
        The first failure; empty if there was none.
    """
    counts: Counter[str] = Counter()
    message = ""

    def add_failure(kind: str, details: str) -> None:
        nonlocal message
        counts[kind] += 1
        message = message or f"{kind}: {damage.name}: {details}"

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for target in ("whole", "bad"):
            shutil.copytree(whole, folder / "runs" / target)
        outside = folder / "outside"
        (outside / "deep").mkdir(parents=True)
        for file in (OUTSIDE_FILE, f"deep/{OUTSIDE_FILE}"):
            (outside / file).write_text("mine", encoding="utf-8")
        run, other_run = folder / "runs" / "bad", folder / "runs" / "whole"
        damage.apply(run, outside)
        if damage.reseal:
            _reseal(run)
        before, before_run, before_other = hash_files(outside), hash_files(run), hash_files(other_run)
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_calls, args=(damage, folder, sender))
        process.start()
        sender.close()
        answers: dict[str, tuple[int, str]] = {}
        running, deadline = "", time.monotonic() + limit
        while True:
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                add_failure("hangs", f"{running} after {limit:.0f} s")
                process.kill()
                break
            try:
                call, status, output = receiver.recv()
            except EOFError:
                break
            if call == "begin":
                running = status
                continue
            answers[call] = (status, output)
            if status not in {0, 1, 2} or "Traceback (most recent call last)" in output:
                add_failure("tracebacks", f"{call}: {output.strip().splitlines()[-1] if output.strip() else status}")
        process.join()
        receiver.close()
        if process.exitcode not in {0, -signal.SIGKILL}:
            add_failure("tracebacks", f"the process ended with exit code {process.exitcode}")
        if hash_files(outside) != before:
            add_failure("touched_outside", "the folder outside the run")
        if _without_locks(hash_files(other_run)) != _without_locks(before_other):
            add_failure("touched_outside", "another run")
        if damage.user_file and not (run / damage.user_file).is_file():
            add_failure("user_files_removed", damage.user_file)
        # A command reports damage by exit status 2, or by a cross before the summary of its output.
        reported = any(status == 2 or "✗" in output.partition("● done")[0] for status, output in answers.values())
        if damage.must_be_detected and not reported and hash_files(run) == before_run:
            add_failure("undetected", ", ".join(f"{call} {status}" for call, (status, _) in answers.items()))
    return counts, message


def _send_case(sender: Connection, whole: Path, damage: Damage, limit: float) -> None:
    sender.send(run_case(whole, damage, limit))
    sender.close()


def run_cases(
    whole: Path, damages: Sequence[Damage], limit: float, workers: int
) -> Iterator[tuple[int, Counter[str], str]]:
    """Run cases in parallel, each in a forked process; yield index, counts and message of each as it finishes."""
    context = multiprocessing.get_context("fork")
    waiting = deque(enumerate(damages))
    running: dict[Any, tuple[int, Any]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            index, damage = waiting.popleft()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send_case, args=(sender, whole, damage, limit))
            process.start()
            sender.close()
            running[receiver] = (index, process)
        ready = wait(list(running))
        for receiver in [receiver for receiver in running if receiver in ready]:
            index, process = running.pop(receiver)
            try:
                counts, message = receiver.recv()
            except EOFError:
                process.join()
                msg = f"case '{damages[index].name}' could not be run: its process ended with {process.exitcode}"
                raise RuntimeError(msg) from None
            process.join()
            receiver.close()
            yield index, counts, message


def sample_damages(run: Path, count: int, seed: int) -> list[Damage]:
    """Return a random sample of damages in which every kind has the same share as far as possible."""
    groups: dict[str, list[Damage]] = {}
    for damage in list_damages(run):
        groups.setdefault(damage.kind, []).append(damage)
    rng = random.Random(seed)
    for group in groups.values():
        rng.shuffle(group)
    sample: list[Damage] = []
    while len(sample) < count and any(groups.values()):
        for group in groups.values():
            if group and len(sample) < count:
                sample.append(group.pop())
    return sample


# -- main ------------------------------------------------------------------------------------------------------------------


def make_run(folder: Path) -> Path:
    """Make a small run of all stages and return its folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        status, output = _call_command(["name=whole", *OPTIONS])
    finally:
        os.chdir(before)
    if status:
        raise RuntimeError(output)
    return folder / "runs" / "whole"


def share_model() -> None:
    """Load the embedded model once; child processes inherit it."""
    from lvlm import load_lvlm

    model = load_lvlm("tiny")
    Context._load = lambda _self, _path: model  # type: ignore[method-assign]


def main() -> None:
    """Run the cases, print a table, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="40 cases")
    parser.add_argument("--cases", type=int, default=1000, help="number of cases, sampled evenly from all kinds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--limit", type=float, default=60.0, help="time limit in seconds for all commands of a case")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="cases that run in parallel")
    parser.add_argument("--run", type=Path, help="a finished run to damage copies of, instead of a new one")
    parser.add_argument("--only", default="", help="run only cases whose name contains this text")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, not {options.workers}")
    wide_console().print("Runs commands on damaged run folders and counts failures; every count must be 0.")
    start = time.perf_counter()
    counts: Counter[str] = Counter()
    messages: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as name:
        with progress("making a run"):
            share_model()
            whole = options.run.resolve() if options.run else make_run(Path(name))
        missing = [s for s in DEFAULT_STAGES if not (whole / TABLE[s].folder / RECEIPT).is_file()]
        if missing:
            parser.error(f"the run '{whole}' has not finished the stage '{missing[0]}'; finish it with resume={whole}")
        count = sys.maxsize if options.only else 40 if options.quick else options.cases
        damages = [d for d in sample_damages(whole, count, options.seed) if options.only in d.name]
        kinds = Counter(damage.kind for damage in damages)
        with progress(f"damaged runs, {options.workers} in parallel", len(damages)) as advance:
            for index, failures, message in run_cases(whole, damages, options.limit, options.workers):
                counts += failures
                if message:
                    messages[index] = message
                advance(note=message)
    figures = {
        name: figure(counts[name], "= 0", len(damages))
        for name in ("hangs", "touched_outside", "tracebacks", "user_files_removed", "undetected")
    }
    print_figures(figures, f"{len(damages)} damaged run folders")
    wide_console().print(f"cases by kind: {', '.join(f'{kind} {n}' for kind, n in kinds.items())}")
    finish(
        "hostile_folders",
        f"{describe_device()}, Python {platform.python_version()}",
        figures,
        kinds=kinds,
        failures=[messages[index] for index in sorted(messages)][:20],
        seconds=round(time.perf_counter() - start),
    )


if __name__ == "__main__":
    main()
