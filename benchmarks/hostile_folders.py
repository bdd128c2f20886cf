"""What a run folder from somewhere else can do: it is damaged in many ways, and every command must answer, soon and plainly.

    python benchmarks/hostile_folders.py [--quick] [--cases 1000] [--seed 0] [--limit 60] [--run FOLDER]

A finished small run is copied and damaged in one way: names with ``..`` or absolute names, symbolic links in every place,
part files planted ahead, FIFOs in place of files, a wrong JSON type for every field of every JSON and YAML file, files that
are empty, cut, not UTF-8 or nested deeply, files of a user's in the stages' folders. Then ``status``, ``compare``, ``resume``
and the report's maker are called in a child process with a time limit. Counted are hangs, files outside the run that were
touched, tracebacks, files of the user's that were removed, and damage that no command noticed although one of them must.
"""

from __future__ import annotations

import argparse
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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.cli.main import main as command
from experiments.cli.resume import configured
from experiments.config import STAGES
from experiments.report import make_report
from experiments.run.context import Context
from experiments.run.folder import OWN, RECEIPT, RunFolder, file_digest, stamp
from groundscope.core.document_digest import KEY, document_digest
from groundscope.core.errors import GroundscopeError

OPTIONS = (
    "model.twin=null", "data.n_images=30", "data.test_images=10", "trace.sites=[resid_post,z]", "trace.tokens=[last]",
    "probe=quick", "probe.concepts=[object:named]", "patch.kinds=[object]", "patch.pairs=4", "steer.compare=false",
    "steer.strengths=[1.0]", "evaluate.conditions=[before,after]", "diagnose.limit=0", "export.formats=[safetensors]",
    "threads=1",
)  # fmt: skip
"""A run of all stages that takes under a minute."""
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
"""Names that lead out of a stage's folder, or are none; ``{outside}`` is the folder that must stay as it is."""
TYPES: tuple[Any, ...] = ({"x": 1}, [[1]], None, True, "text", -1.5, 10**40)
BYTES = (
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
READ = ("status", "compare", "resume", "again", "report")
FREE = (
    "environment",
    "loader",
    "stamps",
    "origin",
    "outside",
    "inputs",
    "basis",
    "error",
    "when",
    "plugins",
    "packages",
    "jobs",
)
"""Fields that any value may have: what is told, or what a missing or other value only makes a stage run again."""


@dataclass(frozen=True)
class Damage:
    """One way to damage a run."""

    name: str
    kind: str
    do: Callable[[Path, Path], None]
    """Called with the run's folder and the folder outside."""
    must: bool = True
    """Whether one of the commands has to notice it."""
    forged: bool = False
    """Whether the receipt is made to fit what was changed, as somebody would who means harm."""
    mine: str = ""
    """A user's file that must be there afterwards, below the run's folder."""


# -- ways to damage --------------------------------------------------------------------------------------------------------


def damages(run: Path) -> Iterator[Damage]:
    """Yield every way, in a fixed order."""
    files = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    texts = [f for f in files if f.endswith((".json", ".yaml")) and "probes/decoder" not in f]
    yield from _names()
    yield from _links(run, files)
    for file in [f for f in files if f.endswith((".json", ".jsonl", ".yaml", ".key", ".lock"))]:
        yield Damage(f"FIFO {file}", "FIFO", functools.partial(_fifo, file), must=not file.endswith((".key", ".lock")))
    for file in texts:
        for at, path in enumerate(_fields(_load(run / file))):
            free = bool(set(path) & set(FREE)) or file == "environment.json" or "n_images" in path
            for kind in TYPES:
                forged = file.partition("/")[2] not in {"", RECEIPT}
                what = f"{file}:{'.'.join(map(str, path)) or 'all'} = {str(kind)[:12]} ({at})"
                change = functools.partial(_retype, file, path, kind)
                # OmegaConf reads numbers as text and the other way where that loses nothing.
                loose = file == "config.yaml" and not isinstance(kind, dict)
                yield Damage(what, "type", change, must=not free and not loose and not forged, forged=forged)
    for file in files:
        for content in BYTES:
            forged = file.partition("/")[2] not in {"", RECEIPT, ".key"} and file.endswith((".json", ".jsonl"))
            known = file in {"report.html", ".lock", "environment.json"} or file.endswith(".key")
            change = functools.partial(_bytes, file, content)
            yield Damage(f"bytes {file} {content[:8]!r}", "bytes", change, must=not known and not forged, forged=forged)
    for folder in OWN:
        yield Damage(
            f"user's file in {folder}", "user", functools.partial(_plant, folder), must=False, mine=f"{folder}/mine.txt"
        )


def _names() -> Iterator[Damage]:
    for folder in OWN:
        for name in NAMES:
            yield Damage(
                f"name {name!r} in {folder}/{RECEIPT}", "name", functools.partial(_name_in_receipt, folder, name)
            )
    for name in NAMES[:4]:
        for file, change in (
            ("circuits/top.json", lambda v, n: v["kinds"].append(n)),
            ("circuits/top.json", lambda v, n: v["heads"].append(n)),
            ("probes/plan.json", lambda v, n: v[0].update(stack=n)),
            ("export/formats.json", lambda v, n: v["written"].update({n: n})),
            ("steering/sweep.json", lambda v, n: v.update(method=n)),
        ):
            what = functools.partial(_edit, file, name, change)
            yield Damage(f"name {name!r} in {file}", "name", what, must=False, forged=True)
    for key, value in (
        ("model.trust_remote_code", True), ("report.title", "${oc.env:HOME}"), ("hydra.run.dir", "x"),
        ("data._target_", "os.system"),
    ):  # fmt: skip
        yield Damage(f"config.yaml {key}", "consent", functools.partial(_configure, key, value))


def _links(run: Path, files: list[str]) -> Iterator[Damage]:
    places = [
        *files,
        *OWN,
        ".locks",
        "steering/vector.safetensors.part",
        f".report.html.{os.getpid()}.part",
        "circuits/.failed.json",
    ]
    for place in dict.fromkeys(places):
        for target in ("copy", "mine.txt", "loop", "gone"):
            # A link that shows the very same bytes may be read; it is never written through.
            yield Damage(f"link {place} -> {target}", "link", functools.partial(_link, place, target), must=False)


def _load(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)


def _write(path: Path, value: Any) -> None:
    text = yaml.safe_dump(value) if path.suffix == ".yaml" else json.dumps(value)
    path.unlink(missing_ok=True)  # stages that runs share are the same file
    path.write_text(text, encoding="utf-8")


def _fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every field, of lists the first item's alone."""
    yield path
    if isinstance(value, dict):
        for name, inner in list(value.items())[:12]:
            yield from _fields(inner, (*path, name))
    elif isinstance(value, list) and value:
        yield from _fields(value[0], (*path, 0))


def _retype(file: str, path: tuple[Any, ...], kind: Any, run: Path, _: Path) -> None:
    value = copy.deepcopy(_load(run / file))
    if not path:
        value = kind
    else:
        inner = functools.reduce(lambda v, key: v[key], path[:-1], value)
        inner[path[-1]] = kind if type(inner[path[-1]]) is not type(kind) else {"x": [kind]}
    _write(run / file, value)


def _bytes(file: str, content: bytes, run: Path, _: Path) -> None:
    (run / file).unlink(missing_ok=True)
    (run / file).write_bytes(content)


def _fifo(file: str, run: Path, _: Path) -> None:
    (run / file).unlink(missing_ok=True)
    os.mkfifo(run / file)


def _plant(folder: str, run: Path, _: Path) -> None:
    (run / folder / "mine.txt").write_text("mine", encoding="utf-8")


def _link(place: str, target: str, run: Path, outside: Path) -> None:
    path = run / place
    aims = {"copy": outside / "copy", "mine.txt": outside / "mine.txt", "loop": path, "gone": outside / "gone"}
    if target == "copy":
        if path.is_dir():
            shutil.copytree(path, outside / "copy")
        elif path.is_file():
            shutil.copy2(path, outside / "copy")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(aims[target])


def _name_in_receipt(folder: str, name: str, run: Path, outside: Path) -> None:
    value = _load(run / folder / RECEIPT)
    digest = hashlib.sha256((outside / "mine.txt").read_bytes()).hexdigest()
    value["files"][name.format(outside=outside)] = digest
    _write_receipt(run / folder, value)


def _write_receipt(folder: Path, value: dict[str, Any]) -> None:
    """Write a receipt whose own digest fits its content, as somebody would who means harm."""
    _write(folder / RECEIPT, value | {KEY: document_digest(value)})


def _edit(file: str, name: str, change: Callable[[Any, str], None], run: Path, outside: Path) -> None:
    value = _load(run / file)
    change(value, name.format(outside=outside))
    _write(run / file, value)


def _configure(key: str, value: Any, run: Path, _: Path) -> None:
    whole = _load(run / "config.yaml")
    *path, last = key.split(".")
    functools.reduce(lambda v, part: v.setdefault(part, {}), path, whole)[last] = value
    _write(run / "config.yaml", whole)


def _forge(run: Path) -> None:
    """Make every receipt fit the files that are there."""
    for folder in OWN:
        receipt = run / folder / RECEIPT
        value = _load(receipt)
        for name in value["files"]:
            path = run / folder / name
            if path.is_file() and not path.is_symlink():
                value["files"][name], value["stamps"][name] = file_digest(path), stamp(path)
        _write_receipt(run / folder, value)


# -- calls -----------------------------------------------------------------------------------------------------------------


def _call(arguments: list[str]) -> tuple[int, str]:
    """Run the command in this process; return its status and what it said."""
    from hydra.core.global_hydra import GlobalHydra

    said = io.StringIO()
    sys.argv = ["groundscope", *arguments]
    status = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            command()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:  # noqa: BLE001  what is counted
            status = 1
            said.write(traceback.format_exc())
        finally:
            GlobalHydra.instance().clear()
    return status, said.getvalue()


def _report(run: Path) -> tuple[int, str]:
    """Make the report of a run from its files, whatever its receipts say."""
    try:
        folder = RunFolder(run, run.parent)
        with tempfile.TemporaryDirectory() as name:
            return 0, make_report(Context(configured(run), folder, Console(file=io.StringIO())), Path(name))
    except GroundscopeError as error:
        return 2, f"error: {error}"
    except BaseException:  # noqa: BLE001  what is counted
        return 1, traceback.format_exc()


def calls(damage: Damage) -> dict[str, Callable[[], tuple[int, str]]]:
    """Return what is called on a damaged run: stages whose inputs changed are not made again, which would take minutes."""
    found: dict[str, Callable[[], tuple[int, str]]] = {
        "status": lambda: _call(["status", "runs"]),
        "compare": lambda: _call(["compare", "runs/whole", "runs/bad"]),
        "resume": lambda: _call(["resume=runs/bad", "stages=[examples]"]),
        "again": lambda: _call(["resume=runs/bad", "stages=[examples]", "data.test_images=11"]),
        "page": lambda: _call(["resume=runs/bad", "stages=[report]"]),
    }
    if damage.forged:
        found["report"] = lambda: _report(Path("runs/bad"))
    return found


def _child(damage: Damage, work: Path, pipe: Any) -> None:
    os.chdir(work)
    sys.stdin.close()
    for name, call in calls(damage).items():
        pipe.send(("begin", name, ""))
        status, said = call()
        pipe.send((name, status, said[-2000:]))
    pipe.close()


def listing(folder: Path) -> dict[str, str]:
    """Return every file below a folder with its digest, links as what they point to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = str(about.st_mode)
    return found


def attack(whole: Path, damage: Damage, limit: float) -> tuple[Counter[str], str]:
    """Damage a copy of a run and call the commands; return counts of what went wrong, and the first of it in words."""
    counts: Counter[str] = Counter()
    first = ""

    def note(what: str, said: str) -> None:
        nonlocal first
        counts[what] += 1
        first = first or f"{what}: {damage.name}: {said}"

    with tempfile.TemporaryDirectory() as name:
        work = Path(name).resolve()
        for copied in ("whole", "bad"):
            shutil.copytree(whole, work / "runs" / copied, copy_function=_hard)
        outside = work / "outside"
        (outside / "deep").mkdir(parents=True)
        for file in ("mine.txt", "deep/mine.txt"):
            (outside / file).write_text("mine", encoding="utf-8")
        run = work / "runs" / "bad"
        damage.do(run, outside)
        if damage.forged:
            _forge(run)
        before, inside, other = listing(outside), listing(run), listing(work / "runs" / "whole")
        context = multiprocessing.get_context("fork")
        hears, tells = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(damage, work, tells))
        process.start()
        tells.close()
        answers, running, end = {}, "", time.monotonic() + limit
        while True:
            if not hears.poll(max(0.0, end - time.monotonic())):
                note("hangs", f"{running} after {limit:.0f} s")
                process.kill()
                break
            try:
                call, status, said = hears.recv()
            except EOFError:
                break
            if call == "begin":
                running = status
                continue
            answers[call] = (status, said)
            if status not in {0, 1, 2} or "Traceback (most recent call last)" in said:
                note("tracebacks", f"{call}: {said.strip().splitlines()[-1] if said.strip() else status}")
        process.join()
        if process.exitcode not in {0, -signal.SIGKILL}:
            note("tracebacks", f"the process ended with {process.exitcode}")
        if listing(outside) != before:
            note("touched_outside", "")
        if {k: v for k, v in listing(work / "runs" / "whole").items() if not k.endswith(".lock")} != {
            k: v for k, v in other.items() if not k.endswith(".lock")
        }:
            note("touched_outside", "the other run")
        if damage.mine and not (run / damage.mine).is_file():
            note("users_files_removed", damage.mine)
        words = [said for status, said in answers.values() if status == 2 or "✗" in said.partition("● done")[0]]
        if damage.must and not words and listing(run) == inside:
            note("unnoticed", ", ".join(f"{call} {status}" for call, (status, _) in answers.items()))
    return counts, first


def _hard(source: str, target: str) -> None:
    shutil.copy2(source, target)


def make_run(folder: Path) -> Path:
    """Make a finished small run."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        status, said = _call(["name=whole", *OPTIONS])
    finally:
        os.chdir(before)
    if status:
        raise RuntimeError(said)
    return folder / "runs" / "whole"


def prepare() -> None:
    """Load the embedded model once; child processes inherit it."""
    from lvlm import load_lvlm

    model = load_lvlm("tiny")
    Context._load = lambda _self, _path: model  # type: ignore[method-assign]


def chosen(run: Path, count: int, seed: int) -> list[Damage]:
    """Return so many ways, drawn so that every kind has its share."""
    groups: dict[str, list[Damage]] = {}
    for damage in damages(run):
        groups.setdefault(damage.kind, []).append(damage)
    rng = random.Random(seed)
    for group in groups.values():
        rng.shuffle(group)
    picked: list[Damage] = []
    while len(picked) < count and any(groups.values()):
        for group in groups.values():
            if group and len(picked) < count:
                picked.append(group.pop())
    return picked


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 cases")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for all commands on one damaged run")
    parser.add_argument("--run", type=Path, help="a finished run to damage copies of, instead of a new one")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    console = Console(stderr=True)
    Console().print("Compares commands on run folders that were damaged on purpose with what they must do.")
    start = time.perf_counter()
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name, Progress(console=console, disable=not console.is_terminal) as progress:
        prepare()
        whole = options.run.resolve() if options.run else make_run(Path(name))
        missing = [stage for stage, folder in zip(STAGES, OWN, strict=True) if not (whole / folder / RECEIPT).is_file()]
        if missing:
            msg = f"the run '{whole}' has not finished {missing[0]}"
            raise SystemExit(msg)
        count = 10**9 if options.only else 40 if options.quick else options.cases
        some = [d for d in chosen(whole, count, options.seed) if options.only in d.name]
        task = progress.add_task("damaging runs", total=len(some))
        for damage in some:
            found, first = attack(whole, damage, options.limit)
            counts += found
            kinds[damage.kind] += 1
            if first:
                wrong.append(first)
                console.print(first, markup=False)
            progress.advance(task)
    figures = {
        name: {"value": counts[name], "goal": "= 0", "holds": counts[name] == 0, "n": sum(kinds.values())}
        for name in ("hangs", "touched_outside", "tracebacks", "users_files_removed", "unnoticed")
    }
    table = Table("figure", "value", "goal", "holds", title=f"{sum(kinds.values())} damaged run folders")
    for name, figure in figures.items():
        table.add_row(name, str(figure["value"]), str(figure["goal"]), str(figure["holds"]))
    Console().print(table)
    Console().print(", ".join(f"{kind} {n}" for kind, n in kinds.items()))
    device = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    record = {"benchmark": "hostile_folders", "device": device, "kinds": kinds, "wrong": wrong[:20]}
    print(json.dumps({**record, "seconds": round(time.perf_counter() - start), "figures": figures}))


if __name__ == "__main__":
    main()
