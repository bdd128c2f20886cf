"""What changed bytes cost: files are mutated at random, and each mutation must be found, without a hang or a crash.

    python benchmarks/mutations.py [--quick] [--store 5000] [--others 1000] [--seed 0] [--batch 100] [--save]

A small store, a probe grid, head scores, a steering vector and the receipt of a run's stage are written, and one file of each
is mutated at a time: bits flipped, the end cut off, blocks swapped, a run of bytes zeroed, bytes inserted. Each mutation is
read in a worker process with limits on time and memory, in batches; a worker that hangs or crashes is counted and the batch
goes on in another one.
Counted are

hangs, crashes
    of the worker, or exceptions that are not the project's own;
silent
    the numbers that are read differ from those written, and neither `verify` (of a store) nor reading says so. A store is
    read after `verify`, as reading alone does not compare the values of arrays (``unverified_reads`` counts how often it
    returned other numbers without an error where `verify` names the shard);
    A receipt is read by ``status`` and by ``resume``: each must refuse it, or both give what they gave before;
wrong_advice
    an error or report about another file than the mutated one, or about a missing file where none is missing.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import h5py
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from activation_store import ActivationStore, ArrayInfo, Ragged, Schema, StoreWriter, verify
from circuits import HeadScores
from experiments.cli.overrides import composed
from experiments.cli.resume import configured
from experiments.cli.status import status
from experiments.pipeline import execute
from experiments.run.folder import read_receipt
from groundscope.core.errors import GroundscopeError
from lvlm.sites import Head
from mitigation import SteeringVector
from mitigation.steering.changes import AddChange
from probes import ProbeGrid, fit_grid

SECONDS = 60.0
"""Wall-clock time after which a worker that says nothing hangs."""
MEMORY = 8 << 30
RESULTS = Path(__file__).parent / "results" / "mutations.json"
WAYS = ("flip a bit", "flip a byte", "cut the end", "swap blocks", "zero a run", "insert bytes")


def mutate(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Return how some bytes were mutated, and the result, which differs from them."""
    while True:
        way, at, size = chance.choice(WAYS), chance.randrange(len(data)), chance.choice((1, 8, 64, 512, 4096))
        out = bytearray(data)
        if way == "flip a bit":
            out[at] ^= 1 << chance.randrange(8)
        elif way == "flip a byte":
            out[at] = chance.randrange(256)
        elif way == "cut the end":
            del out[at:]
        elif way == "swap blocks":
            other = chance.randrange(len(data))
            first, second = sorted((at, other))
            size = min(size, second - first, len(data) - second)
            out[first : first + size], out[second : second + size] = (
                data[second : second + size],
                data[first : first + size],
            )
        elif way == "zero a run":
            out[at : at + size] = bytes(len(out[at : at + size]))
        else:
            out[at:at] = chance.randbytes(size)
        if bytes(out) != data:
            return way, bytes(out)


@dataclass(frozen=True)
class Subject:
    """Files of one kind, and how they are read."""

    name: str
    folder: Path
    read: Callable[[Path], dict[str, np.ndarray]]
    """Returns every number and text that the files hold."""
    check: Callable[[Path], list[str]] | None = None
    """Returns the names of the files in which damage was found, where the kind has such a check."""

    def files(self) -> list[str]:
        """Return the names of the files."""
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())


# ---- subjects


def make_store(folder: Path) -> None:
    """Write a small store with dense and ragged arrays, lists, and model-level arrays, in two shards."""
    z = ArrayInfo("decoder", "z", "last", n_layers=2, width=8, n_heads=2)
    tokens = ArrayInfo("vision", "resid_post", "image:all", n_layers=2, width=4, ragged=True)
    rng = np.random.default_rng(0)
    names = [f"e{i}" for i in range(8)]
    with StoreWriter(
        folder, Schema((z, tokens)), {"model": "toy"}, shard_size=5, extra={"unembedding.weight": np.eye(3, dtype="f4")}
    ) as writer:
        writer.append(
            {
                z.key: rng.normal(size=(8, 2, 8)).astype("f4"),
                tokens.key: Ragged.of([rng.normal(size=(i % 3, 2, 4)).astype("f4") for i in range(8)]),
            },
            {
                "id": names,
                "group": names,
                "question": [f"Is it {name}?" for name in names],
                "object:cat": [i % 2 == 0 for i in range(8)],
                "margin": rng.normal(size=8).tolist(),
                "boxes": [[[0.0, 1.0, 2.0, float(i)]] for i in range(8)],
            },
        )


def read_store(folder: Path) -> dict[str, np.ndarray]:
    """Read everything in a store."""
    store = ActivationStore(folder)
    out = {f"column {name}": np.array([str(v) for v in values]) for name, values in store.columns.items()}
    out |= {f"z {layer}": store.read(f"decoder.L{layer}.z", "last") for layer in range(2)}
    for layer in range(2):
        ragged = store.ragged(f"vision.L{layer}.resid_post", "image:all")
        out |= {f"tokens {layer}": ragged.values, f"offsets {layer}": ragged.offsets}
    return out | {name: store.tensor(name) for name in store.tensors}


def check_store(folder: Path) -> list[str]:
    """Return the files that `verify` names."""
    return [p.file for p in verify(folder).problems]


def make_grid(folder: Path) -> None:
    """Fit a small grid."""
    rng = np.random.default_rng(0)
    n, z = 60, ArrayInfo("decoder", "z", "last", n_layers=1, width=8, n_heads=2)
    names = [f"e{i}" for i in range(n)]
    labels = rng.integers(0, 2, n)
    values = rng.normal(size=(n, 1, 8)).astype("f4") + labels[:, None, None]
    with tempfile.TemporaryDirectory() as name:
        with StoreWriter(name, Schema((z,)), {"model": "toy"}) as writer:
            writer.append({z.key: values}, {"id": names, "group": names, "object:cat": labels.tolist()})
        fit_grid(ActivationStore(name), ["object:cat"], progress=False).save(folder)


def read_grid(folder: Path) -> dict[str, np.ndarray]:
    """Read everything in a grid."""
    return _fields(ProbeGrid.load(folder))


def make_scores(folder: Path) -> None:
    """Write head scores of random effects."""
    rng = np.random.default_rng(0)
    names = tuple(f"p{i}" for i in range(6))
    HeadScores(
        effects=rng.normal(size=(6, 2, 3)).astype("f4"),
        clean=rng.normal(size=6).astype("f4") + 3,
        corrupt=rng.normal(size=6).astype("f4") - 3,
        ids=names,
        groups=names,
        levels=("object",) * 6,
        kinds=("object",) * 6,
        tokens="last",
        mode="denoise",
        min_effect=0.5,
        excluded=1,
        model="toy",
        config_hash="c" * 64,
        weights_hash="w" * 64,
        pairs_digest="d" * 64,
    ).save(folder / "scores.safetensors")


def read_scores(folder: Path) -> dict[str, np.ndarray]:
    """Read everything in head scores."""
    return _fields(HeadScores.load(folder / "scores.safetensors"))


def make_vector(folder: Path) -> None:
    """Write a steering vector of random entries."""
    rng = np.random.default_rng(0)
    entries = {Head(1, 2): AddChange(_unit(rng, 8), 0.5), 1: AddChange(_unit(rng, 16), 1.5)}
    SteeringVector(entries, "last", 2.0, "toy", "c" * 64, {"method": "random"}).save(folder / "vector.safetensors")


def _unit(rng: np.random.Generator, size: int) -> np.ndarray:
    values = rng.normal(size=size)
    return (values / np.linalg.norm(values)).astype("f4")


def read_vector(folder: Path) -> dict[str, np.ndarray]:
    """Read everything in a steering vector."""
    return _fields(SteeringVector.load(folder / "vector.safetensors"))


def make_receipt(folder: Path) -> None:
    """Make the examples of a small run."""
    execute(
        composed(["stages=[examples]", "data.n_images=10", "data.test_images=10", "threads=1", f"root={folder}"])[0],
        _quiet(),
    )
    (made,) = folder.glob("*/run.json")
    for path in made.parent.iterdir():
        path.rename(folder / path.name)
    made.parent.rmdir()
    shutil.rmtree(folder / ".locks", ignore_errors=True)


def read_run(folder: Path) -> dict[str, np.ndarray]:
    """Ask for the status of a run and resume it, on a copy; return everything that both tell.

    Raises
    ------
    GroundscopeError
        Where both refuse it.
    """
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        shutil.copytree(folder, run)
        found = status(run)
        out = {"status": np.array(repr((found.stages, found.figures)))}
        try:
            out |= _fields(read_receipt(run / "examples"))
            config = configured(run)
            config.stages = ["examples"]
            execute(config, _quiet())
        except GroundscopeError as error:
            if not found.errors:
                msg = f"status took for whole what resume refuses: {error}"
                raise RuntimeError(msg) from error
            raise
        if found.errors:
            msg = f"resume took for whole what status refuses: {found.errors}"
            raise RuntimeError(msg)
        # Of the receipt what it says is compared: another blank in it says nothing else.
        files = [path for path in sorted(run.glob("examples/*")) if path.name != "stage.json"]
        return out | {path.name: np.array(path.read_bytes()) for path in files}


def _quiet() -> Console:
    return Console(file=io.StringIO())


def _fields(result: object) -> dict[str, np.ndarray]:
    return {
        name: value if isinstance(value, np.ndarray) else np.array(repr(value)) for name, value in vars(result).items()
    }


# ---- workers


@dataclass(frozen=True)
class Mutation:
    """One mutation of one file."""

    subject: int
    file: str
    seed: str


def examine(subject: Subject, mutation: Mutation, whole: dict[str, np.ndarray], folder: Path) -> dict[str, object]:
    """Mutate one file of a copy, read the copy, and return what happened."""
    original = (subject.folder / mutation.file).read_bytes()
    way, data = mutate(original, random.Random(mutation.seed))
    (folder / mutation.file).write_bytes(data)
    out: dict[str, object] = {"way": way, "file": mutation.file, "seed": mutation.seed, "result": "found"}
    try:
        named = subject.check(folder) if subject.check is not None else []
        try:
            values, error = subject.read(folder), None
        except GroundscopeError as caught:
            values, error = None, str(caught)
        same = values is not None and _same(values, whole)
        if any(name != mutation.file for name in named) or (
            error is not None and _wrong(error, mutation.file, subject)
        ):
            out |= {"result": "wrong_advice", "named": named, "error": error}
        elif not named and error is None:
            out["result"] = "silent" if not same else "harmless"
        elif named and error is None and not same:
            out["result"] = "unverified_read"
    except GroundscopeError as error:
        out |= {
            "result": "wrong_advice" if _wrong(str(error), mutation.file, subject) else "found",
            "error": str(error),
        }
    except Exception as error:  # noqa: BLE001  # that is what is looked for
        out |= {"result": "crash", "error": repr(error)}
    finally:
        (folder / mutation.file).write_bytes(original)
    return out


def _same(values: dict[str, np.ndarray], whole: dict[str, np.ndarray]) -> bool:
    return values.keys() == whole.keys() and all(
        values[name].shape == whole[name].shape and values[name].tobytes() == whole[name].tobytes() for name in whole
    )


def _wrong(error: str, file: str, subject: Subject) -> bool:
    """Whether a message names another file than the mutated one, or says that a file is missing."""
    others = [name for name in subject.files() if name != file and name in error]
    # The card of a grid has the digest of its tensors: where either changed, they do not match.
    pairs = {"grid.json", "grid.safetensors"}
    if {file, *others} <= pairs:
        others = []
    return (bool(others) and file not in error) or "is missing" in error or "there is no such file" in error


def work(subjects: Sequence[Subject], todo: Sequence[Mutation], pipe: Connection) -> None:
    """Examine some mutations, and send what happened to each."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError):
        pass
    with tempfile.TemporaryDirectory() as name:
        whole: dict[int, dict[str, np.ndarray]] = {}
        for mutation in todo:
            subject = subjects[mutation.subject]
            folder = Path(name) / subject.name
            if mutation.subject not in whole:
                shutil.copytree(subject.folder, folder)
                whole[mutation.subject] = subject.read(folder)
            pipe.send(examine(subject, mutation, whole[mutation.subject], folder))
    pipe.close()


def run(
    subjects: Sequence[Subject], todo: Sequence[Mutation], size: int, advance: Callable[[int], None]
) -> dict[str, list[dict[str, object]]]:
    """Examine mutations in batches, each in a worker process; returns what happened, by subject."""
    context = multiprocessing.get_context("fork")
    out: dict[str, list[dict[str, object]]] = {subject.name: [] for subject in subjects}
    at = 0
    while at < len(todo):
        batch = todo[at : at + size]
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(subjects, batch, sender))
        process.start()
        sender.close()
        for mutation in batch:
            try:
                result = receiver.recv() if receiver.poll(SECONDS) else {"result": "hang", "seed": mutation.seed}
            except EOFError:
                process.join()
                result = {
                    "result": "crash",
                    "seed": mutation.seed,
                    "error": f"the worker ended with {process.exitcode}",
                }
            out[subjects[mutation.subject].name].append({"file": mutation.file, **result})
            at += 1
            advance(1)
            if result["result"] == "hang" or "the worker ended" in str(result.get("error")):
                break
        process.kill()
        process.join()
        receiver.close()
    return out


def mutate_all(
    counts: dict[str, int], seed: int, size: int = 100, advance: Callable[[int], None] = lambda _: None
) -> dict[str, list[dict[str, object]]]:
    """Write the subjects, mutate each so many times, and return what happened to each mutation, by subject.

    Parameters
    ----------
    counts
        Mutations by subject: ``store``, ``grid``, ``scores``, ``vector``, ``receipt``.
    seed
        Decides all mutations.
    size
        Mutations in a worker process.
    advance
        Called after each mutation.
    """
    makers = {
        "store": (make_store, read_store, check_store),
        "grid": (make_grid, read_grid, None),
        "scores": (make_scores, read_scores, None),
        "vector": (make_vector, read_vector, None),
        "receipt": (make_receipt, read_run, None),
    }
    with tempfile.TemporaryDirectory() as name:
        subjects, todo = [], []
        for number, (kind, count) in enumerate(counts.items()):
            make, read, check = makers[kind]
            folder = Path(name) / kind
            folder.mkdir()
            make(folder)
            subjects.append(Subject(kind, folder, read, check))
            chance = random.Random(f"{seed} {kind}")
            files = [f for f in subjects[-1].files() if _may_mutate(kind, f)]
            weights = [(folder / f).stat().st_size for f in files]
            chosen = chance.choices(files, [w + sum(weights) / len(files) for w in weights], k=count)
            todo += [Mutation(number, file, f"{seed} {kind} {i}") for i, file in enumerate(chosen)]
        return run(subjects, todo, size, advance)


def _may_mutate(kind: str, file: str) -> bool:
    """Whether a file is mutated: of a vector not the JSON for people, which is never read, and of a run the receipt alone."""
    return file.endswith("/stage.json") if kind == "receipt" else not (kind == "vector" and file.endswith(".json"))


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="300 mutations of a store, 60 of each other kind")
    parser.add_argument("--store", type=int, default=5000, help="mutations of a store")
    parser.add_argument("--others", type=int, default=1000, help="mutations of each other kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100, help="mutations in a worker process")
    parser.add_argument("--save", action="store_true", help=f"write the result to {RESULTS.name}")
    options = parser.parse_args()
    store, others = (300, 60) if options.quick else (options.store, options.others)
    Console().print("Compares what is read from mutated files with what was written.")
    start = time.perf_counter()
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("mutating", total=store + 4 * others)
        counts = {"store": store, "grid": others, "scores": others, "vector": others, "receipt": others}
        results = mutate_all(counts, options.seed, options.batch, lambda n: progress.advance(task, n))
    took = time.perf_counter() - start
    figures: dict[str, dict[str, object]] = {}
    table = Table(
        "kind", "mutations", "found", "harmless", "hangs", "crashes", "silent", "wrong advice", "unverified reads"
    )
    for kind, each in results.items():
        results_of_kind = Counter(str(one["result"]) for one in each)
        row = [
            results_of_kind[r]
            for r in ("found", "harmless", "hang", "crash", "silent", "wrong_advice", "unverified_read")
        ]
        table.add_row(kind, str(len(each)), *map(str, row))
        for name, result in (
            ("hangs", "hang"),
            ("crashes", "crash"),
            ("silent", "silent"),
            ("wrong_advice", "wrong_advice"),
        ):
            count = results_of_kind[result]
            figures[f"{kind}_{name}"] = {"value": count, "goal": "= 0", "holds": count == 0, "n": len(each)}
        if kind == "store":
            figures["store_unverified_reads"] = {
                "value": results_of_kind["unverified_read"],
                "goal": "none",
                "holds": True,
                "n": len(each),
            }
    Console().print(table)
    bad = [(kind, one) for kind, each in results.items() for one in each]
    bad = [(kind, one) for kind, one in bad if one["result"] in ("hang", "crash", "silent", "wrong_advice")]
    for kind, one in bad[:10]:
        Console().print(f"{kind}: {one}", markup=False)
    device = f"{platform.machine()}, {os.cpu_count()} cores, h5py {h5py.__version__}, HDF5 {h5py.version.hdf5_version}"
    record = {
        "benchmark": "mutations",
        "device": device,
        "seed": options.seed,
        "seconds": round(took),
        "figures": figures,
    }
    if options.save:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
