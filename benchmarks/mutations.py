"""Detection of corrupted files: random mutations of stored files must be detected, without a hang or a crash.

    python benchmarks/mutations.py [--quick] [--store 5000] [--others 1000] [--seed 0] [--batch 100] [--save]

A small store, a probe grid, head scores, a steering vector and the receipt of a run's stage are written. Each mutation
changes one file: a bit or a byte is flipped, the end is cut off, blocks are swapped, bytes are zeroed or inserted. The
changed file is read in a worker process with limits on time and memory; a worker processes a batch of mutations, and after a
hang or a crash the rest of its batch continues in a new worker. The baseline is the content that was written. Figures, for
each kind of file, with goal 0:

hangs, crashes
    of the worker; exceptions other than `GroundscopeError` count as crashes;
silent
    mutations that change the content without being detected, neither by `verify` (of a store) nor by reading. A receipt is
    read by ``status`` and ``resume``: both must refuse it, or both must return what they returned before;
wrong_advice
    errors or reports that name another file than the mutated one, or say that an existing file is missing.

``store_unverified_reads`` has no goal: reading a store does not compare the digests of arrays, so it can return wrong numbers
without an error for a shard in which `verify` detects damage.
"""

from __future__ import annotations

import io
import multiprocessing
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
from rich.table import Table

from activation_store import ActivationStore, ArrayInfo, Ragged, Schema, StoreWriter, verify
from benchmarks._harness import Figure, describe_device, figure, finish, option_parser, progress, wide_console
from circuits import HeadScores
from experiments.cli.overrides import compose
from experiments.cli.resume import configured
from experiments.cli.status import status
from experiments.pipeline import execute
from experiments.run.folder import read_receipt
from groundscope.core.errors import GroundscopeError
from lvlm.sites import Head
from mitigation import SteeringVector
from mitigation.steering.changes import AddChange
from probes import ProbeGrid, fit_grid

TIME_LIMIT = 60.0
"""Seconds for one mutation, after which a worker is considered to hang."""
MEMORY_LIMIT = 8 << 30
"""Bytes of address space of a worker."""
WAYS = ("flip a bit", "flip a byte", "cut the end", "swap blocks", "zero a run", "insert bytes")


def mutate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Return the way in which bytes were mutated (one of `WAYS`), and the result, which differs from `data`."""
    while True:
        way, at, size = rng.choice(WAYS), rng.randrange(len(data)), rng.choice((1, 8, 64, 512, 4096))
        out = bytearray(data)
        if way == "flip a bit":
            out[at] ^= 1 << rng.randrange(8)
        elif way == "flip a byte":
            out[at] = rng.randrange(256)
        elif way == "cut the end":
            del out[at:]
        elif way == "swap blocks":
            other = rng.randrange(len(data))
            first, second = sorted((at, other))
            size = min(size, second - first, len(data) - second)
            out[first : first + size], out[second : second + size] = (
                data[second : second + size],
                data[first : first + size],
            )
        elif way == "zero a run":
            out[at : at + size] = bytes(len(out[at : at + size]))
        else:
            out[at:at] = rng.randbytes(size)
        if bytes(out) != data:
            return way, bytes(out)


@dataclass(frozen=True)
class Subject:
    """Files of one kind, and the functions that read and check them."""

    name: str
    folder: Path
    read: Callable[[Path], dict[str, np.ndarray]]
    """Returns every number and text in the files."""
    check: Callable[[Path], list[str]] | None = None
    """Returns the names of the damaged files; None if the kind has no such check."""

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
    """Return the names of the files in which `verify` detects damage."""
    return [p.file for p in verify(folder).problems]


def make_grid(folder: Path) -> None:
    """Fit a small grid and save it."""
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
    SteeringVector(entries, "last+generated", 2.0, "toy", "c" * 64, {"method": "random"}).save(
        folder / "vector.safetensors"
    )


def _unit(rng: np.random.Generator, size: int) -> np.ndarray:
    values = rng.normal(size=size)
    return (values / np.linalg.norm(values)).astype("f4")


def read_vector(folder: Path) -> dict[str, np.ndarray]:
    """Read everything in a steering vector."""
    return _fields(SteeringVector.load(folder / "vector.safetensors"))


def make_receipt(folder: Path) -> None:
    """Run the first stage of a small run; its receipt is mutated."""
    execute(
        compose(["stages=[examples]", "data.n_images=10", "data.test_images=10", "threads=1", f"root={folder}"])[0],
        _quiet(),
    )
    (record,) = folder.glob("*/run.json")
    for path in record.parent.iterdir():
        path.rename(folder / path.name)
    record.parent.rmdir()
    shutil.rmtree(folder / ".locks", ignore_errors=True)


def read_run(folder: Path) -> dict[str, np.ndarray]:
    """Get the status of a copy of a run and resume it; return the results of both.

    Raises
    ------
    GroundscopeError
        If both refuse the run.
    RuntimeError
        If only one of them refuses it.
    """
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        shutil.copytree(folder, run)
        state = status(run)
        out = {"status": np.array(repr((state.stages, state.figures)))}
        try:
            out |= _fields(read_receipt(run / "examples"))
            config = configured(run)
            config.stages = ["examples"]
            execute(config, _quiet())
        except GroundscopeError as error:
            if not state.errors:
                msg = f"status accepts a run that resume refuses: {error}"
                raise RuntimeError(msg) from error
            raise
        if state.errors:
            msg = f"resume accepts a run that status refuses: {state.errors}"
            raise RuntimeError(msg)
        # The receipt is compared by content, above: different whitespace in its JSON is not a difference.
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


def try_mutation(
    subject: Subject, mutation: Mutation, expected: dict[str, np.ndarray], folder: Path
) -> dict[str, object]:
    """Mutate one file of a copy, read the copy, restore the file, and return the outcome.

    The outcome's ``result`` is ``found`` (detected), ``harmless`` (equal content), ``silent``, ``unverified_read``,
    ``wrong_advice`` or ``crash``.
    """
    original = (subject.folder / mutation.file).read_bytes()
    way, data = mutate(original, random.Random(mutation.seed))
    (folder / mutation.file).write_bytes(data)
    out: dict[str, object] = {"way": way, "file": mutation.file, "seed": mutation.seed, "result": "found"}
    try:
        damaged = subject.check(folder) if subject.check is not None else []
        try:
            values, error = subject.read(folder), None
        except GroundscopeError as caught:
            values, error = None, str(caught)
        same = values is not None and _equal(values, expected)
        if any(name != mutation.file for name in damaged) or (
            error is not None and _misleads(error, mutation.file, subject)
        ):
            out |= {"result": "wrong_advice", "damaged": damaged, "error": error}
        elif not damaged and error is None:
            out["result"] = "silent" if not same else "harmless"
        elif damaged and error is None and not same:
            out["result"] = "unverified_read"
    except GroundscopeError as error:
        out |= {
            "result": "wrong_advice" if _misleads(str(error), mutation.file, subject) else "found",
            "error": str(error),
        }
    except Exception as error:  # noqa: BLE001  # any other exception counts as a crash
        out |= {"result": "crash", "error": repr(error)}
    finally:
        (folder / mutation.file).write_bytes(original)
    return out


def _equal(values: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return values.keys() == expected.keys() and all(
        values[name].shape == array.shape and values[name].tobytes() == array.tobytes()
        for name, array in expected.items()
    )


def _misleads(error: str, file: str, subject: Subject) -> bool:
    """Return whether a message names another file than the mutated one, or says that a file is missing."""
    others = [name for name in subject.files() if name != file and name in error]
    # grid.json contains the digest of grid.safetensors: if either is changed, the error may name both.
    if {file, *others} <= {"grid.json", "grid.safetensors"}:
        others = []
    return (bool(others) and file not in error) or "is missing" in error or "there is no such file" in error


def try_batch(subjects: Sequence[Subject], mutations: Sequence[Mutation], sender: Connection) -> None:
    """Test mutations in a worker process with limited memory, and send the outcome of each."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError):
        pass
    with tempfile.TemporaryDirectory() as name:
        expected: dict[int, dict[str, np.ndarray]] = {}
        for mutation in mutations:
            subject = subjects[mutation.subject]
            folder = Path(name) / subject.name
            if mutation.subject not in expected:
                shutil.copytree(subject.folder, folder)
                expected[mutation.subject] = subject.read(folder)
            sender.send(try_mutation(subject, mutation, expected[mutation.subject], folder))
    sender.close()


def try_in_workers(
    subjects: Sequence[Subject], mutations: Sequence[Mutation], batch_size: int, advance: Callable[[int], None]
) -> dict[str, list[dict[str, object]]]:
    """Test mutations in batches, each in a worker process; return the outcomes by subject."""
    context = multiprocessing.get_context("fork")
    out: dict[str, list[dict[str, object]]] = {subject.name: [] for subject in subjects}
    start = 0
    while start < len(mutations):
        batch = mutations[start : start + batch_size]
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=try_batch, args=(subjects, batch, sender))
        process.start()
        sender.close()
        for mutation in batch:
            try:
                result = receiver.recv() if receiver.poll(TIME_LIMIT) else {"result": "hang", "seed": mutation.seed}
            except EOFError:
                process.join()
                result = {
                    "result": "crash",
                    "seed": mutation.seed,
                    "error": f"the worker ended with exit code {process.exitcode}",
                }
            out[subjects[mutation.subject].name].append({"file": mutation.file, **result})
            start += 1
            advance(1)
            if result["result"] == "hang" or "the worker ended" in str(result.get("error")):
                break
        process.kill()
        process.join()
        receiver.close()
    return out


def mutate_all(
    counts: dict[str, int], seed: int, batch_size: int = 100, advance: Callable[[int], None] = lambda _: None
) -> dict[str, list[dict[str, object]]]:
    """Write the files of each kind, mutate them, and return the outcome of each mutation, by kind.

    Parameters
    ----------
    counts
        Number of mutations by kind: ``store``, ``grid``, ``scores``, ``vector``, ``receipt``.
    seed
        Seed of all mutations.
    batch_size
        Mutations that a worker process tests.
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
        subjects, mutations = [], []
        for number, (kind, count) in enumerate(counts.items()):
            make, read, check = makers[kind]
            folder = Path(name) / kind
            folder.mkdir()
            make(folder)
            subjects.append(Subject(kind, folder, read, check))
            rng = random.Random(f"{seed} {kind}")
            files = [f for f in subjects[-1].files() if _may_mutate(kind, f)]
            weights = [(folder / f).stat().st_size for f in files]
            sample = rng.choices(files, [w + sum(weights) / len(files) for w in weights], k=count)
            mutations += [Mutation(number, file, f"{seed} {kind} {i}") for i, file in enumerate(sample)]
        return try_in_workers(subjects, mutations, batch_size, advance)


def _may_mutate(kind: str, file: str) -> bool:
    """Return whether a file is mutated: of a run only the receipt; of a vector not the JSON copy, which is never read."""
    return file.endswith("/stage.json") if kind == "receipt" else not (kind == "vector" and file.endswith(".json"))


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(__doc__, quick="300 mutations of a store, 60 of each other kind", save=True)
    parser.add_argument("--store", type=int, default=5000, help="mutations of a store")
    parser.add_argument("--others", type=int, default=1000, help="mutations of each other kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of all mutations")
    parser.add_argument("--batch", type=int, default=100, help="mutations that a worker process tests")
    options = parser.parse_args()
    store, others = (300, 60) if options.quick else (options.store, options.others)
    counts = {"store": store, "grid": others, "scores": others, "vector": others, "receipt": others}
    wide_console().print("Compares the content read from mutated files with the content that was written.")
    start = time.perf_counter()
    with progress("mutations", sum(counts.values())) as advance:
        outcomes = mutate_all(counts, options.seed, options.batch, advance)
    seconds = round(time.perf_counter() - start)
    figures: dict[str, Figure] = {}
    results = ("found", "harmless", "hang", "crash", "silent", "wrong_advice", "unverified_read")
    failures = {"hang": "hangs", "crash": "crashes", "silent": "silent", "wrong_advice": "wrong_advice"}
    table = Table("kind", "mutations", *(name.replace("_", " ") for name in results))
    for kind, outcomes_of_kind in outcomes.items():
        n, by_result = len(outcomes_of_kind), Counter(str(outcome["result"]) for outcome in outcomes_of_kind)
        table.add_row(kind, str(n), *(str(by_result[result]) for result in results))
        figures |= {f"{kind}_{name}": figure(by_result[result], "= 0", n) for result, name in failures.items()}
        if kind == "store":
            figures["store_unverified_reads"] = figure(by_result["unverified_read"], "", n)
    wide_console().print(table)
    failed = [(kind, outcome) for kind in outcomes for outcome in outcomes[kind] if outcome["result"] in failures]
    for kind, outcome in failed[:10]:
        wide_console().print(f"{kind}: {outcome}", markup=False)
    device = f"{describe_device('h5py')}, HDF5 {h5py.version.hdf5_version}"
    finish("mutations", device, figures, save=options.save, seed=options.seed, seconds=seconds)


if __name__ == "__main__":
    main()
