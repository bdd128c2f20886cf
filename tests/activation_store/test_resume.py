"""Writing that is interrupted, resumed, repeated, or out of disk: sealed shards stay, and the result is the same."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter, verify
from groundscope.core.errors import StoreError

ROOT = Path(__file__).resolve().parents[2]
Z = ("decoder", "z", "last")
SCHEMA = Schema((ArrayInfo("decoder", "z", "last", n_layers=2, width=8, n_heads=2),), "float16")
N = 150
DATA = np.random.default_rng(0).normal(size=(N, 2, 8)).astype(np.float32)
IDS = [f"e{i}" for i in range(N)]
PROVENANCE = {"model": {"id": "tiny", "weights": "ab"}, "dataset": "cd", "environment": {"numpy": "1"}}


def append(writer: StoreWriter, rows: range, batch: int = 7, *, skip: bool = True) -> None:
    todo = [i for i in rows if not skip or IDS[i] not in writer.sealed_ids]
    for at in range(0, len(todo), batch):
        some = todo[at : at + batch]
        columns = {
            "id": [IDS[i] for i in some],
            "group": [f"scene{i}" for i in some],
            "attribute:green": [None if i % 3 == 0 else i % 2 == 0 for i in some],
            "prior_answer": [None if i < 100 else "red" for i in some],
        }
        writer.append({Z: DATA[some]}, columns)


def whole(path: Path, **options) -> Path:
    with StoreWriter(path, SCHEMA, PROVENANCE, **{"shard_size": 40, **options}) as writer:
        append(writer, range(N))
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.glob("[!.]*"))}  # not the record of an unfinished run


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("skip", [True, False], ids=["skips-written", "appends-everything"])
@pytest.mark.parametrize("stopped_at", [0, 20, 40, 100, 149])
def test_resumed_run_is_bit_identical(tmp_path: Path, reference: Path, stopped_at: int, *, skip: bool) -> None:
    with contextlib.suppress(KeyboardInterrupt), StoreWriter(tmp_path, SCHEMA, PROVENANCE, shard_size=40) as writer:
        append(writer, range(stopped_at), batch=11)
        raise KeyboardInterrupt
    assert not list(tmp_path.glob("*.part"))
    with StoreWriter(tmp_path, SCHEMA, {**PROVENANCE, "environment": {"numpy": "2"}}, shard_size=40) as writer:
        assert list(writer.sealed_ids) == IDS[: stopped_at // 40 * 40]
        append(writer, range(N), batch=13, skip=skip)
    if stopped_at >= 40:  # otherwise nothing remembers the first run's environment
        assert contents(tmp_path) == contents(reference)
    assert verify(tmp_path).ok


def test_bytes_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    infos = [ArrayInfo("decoder", c, "last", n_layers=2, width=8) for c in ("resid_pre", "resid_mid", "resid_post")]
    for batch in (1, 7, 32, 150):
        with StoreWriter(tmp_path / str(batch), Schema(tuple(infos)), PROVENANCE, shard_size=110) as writer:
            for at in range(0, N, batch):
                rows = slice(at, at + batch)
                writer.append({a.key: DATA[rows] for a in infos}, {"id": IDS[rows], "group": IDS[rows]})
    assert (
        contents(tmp_path / "1") == contents(tmp_path / "7") == contents(tmp_path / "32") == contents(tmp_path / "150")
    )


def test_repeated_run_changes_nothing(tmp_path: Path) -> None:
    whole(tmp_path)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    with StoreWriter(tmp_path, SCHEMA, PROVENANCE, shard_size=40) as writer:
        append(writer, range(N), skip=False)
    assert before == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}


@pytest.mark.parametrize("lost", ["shard-0-00001.h5", "shard-0-00003.h5", "manifest.json"])
def test_lost_file_is_rebuilt(tmp_path: Path, reference: Path, lost: str) -> None:
    whole(tmp_path)
    (tmp_path / lost).unlink()
    whole(tmp_path)
    assert contents(tmp_path) == contents(reference)


def test_a_damaged_manifest_is_rewritten(tmp_path: Path, reference: Path) -> None:
    whole(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="the manifest is damaged; delete it and run the same trace again"):
        ActivationStore(tmp_path)
    whole(tmp_path)
    assert contents(tmp_path) == contents(reference)


def test_damaged_shard_stops_a_resumed_run(tmp_path: Path) -> None:
    whole(tmp_path)
    (tmp_path / "manifest.json").unlink()
    shard = tmp_path / "shard-0-00001.h5"
    raw = bytearray(shard.read_bytes())
    at = raw.find(DATA[40, 0].astype(np.float16).tobytes())
    raw[at] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(StoreError, match=r"shard-0-00001.h5: damaged, the values of decoder.z \[last\].*delete"):
        whole(tmp_path)


WRITER = """
import sys, time
import tests.activation_store.test_resume as t
with t.StoreWriter({path!r}, t.SCHEMA, t.PROVENANCE, shard_size=10) as writer:
    for i in range(t.N):
        t.append(writer, range(i, i + 1))
        if i % 10 == 9:
            print(len(writer.sealed_ids), flush=True)  # acknowledged
        time.sleep(0.002)
"""


def test_kill_9_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path, random_ = tmp_path / "store", random.Random(0)
    code = WRITER.format(path=str(path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for target in (10, 60, 110):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as run:
            assert run.stdout is not None
            acknowledged = 0
            while acknowledged < target:
                line = run.stdout.readline()
                assert line, "the writer ended before it was killed"
                acknowledged = int(line)
            time.sleep(random_.uniform(0, 0.03))
            run.kill()
            acknowledged = max([acknowledged, *(int(text) for text in run.stdout.read().split())])
        store = ActivationStore(path)
        assert len(store) >= acknowledged
        assert not store.complete
        assert store.columns["id"].tolist() == IDS[: len(store)]
        expected = DATA[: len(store), 1].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(store.read("decoder.L1.z", "last"), expected)
        assert {p.kind for p in verify(path).problems} <= {"unfinished"}
    whole(path, shard_size=10)
    assert verify(path).ok
    assert contents(path) == contents(whole(tmp_path / "uninterrupted", shard_size=10))


@pytest.mark.parametrize(
    ("schema", "provenance", "field", "old", "new"),
    [
        (SCHEMA, {**PROVENANCE, "model": {"id": "large", "weights": "ab"}}, "provenance.model.id", "tiny", "large"),
        (SCHEMA, {**PROVENANCE, "dataset": "xy"}, "provenance.dataset", "cd", "xy"),
        (SCHEMA, {**PROVENANCE, "seed": 1}, "provenance.seed", "nothing", "1"),
        (Schema(SCHEMA.arrays, "float32"), PROVENANCE, "dtype", "float16", "float32"),
        (
            Schema((ArrayInfo("decoder", "z", "last", 2, 6),), "float16"),
            PROVENANCE,
            "decoder.z/last.n_heads",
            "2",
            "None",
        ),
        (
            Schema((ArrayInfo("decoder", "z", "image:mean", 2, 8, 2),), "float16"),
            PROVENANCE,
            "image:mean",
            "nothing",
            "",
        ),
    ],
)
@pytest.mark.parametrize("state", ["finished", "unfinished", "empty"])
def test_mixing_is_refused(tmp_path: Path, state: str, schema, provenance, field: str, old: str, new: str) -> None:
    with StoreWriter(tmp_path, SCHEMA, PROVENANCE, shard_size=40) as writer:
        append(writer, range(0 if state == "empty" else 50))
        if state == "unfinished":
            writer.abandon()
    with pytest.raises(StoreError) as caught:
        StoreWriter(tmp_path, schema, provenance)
    for text in (field, old, new, "differs", "another folder"):
        assert text in str(caught.value)
    StoreWriter(tmp_path, SCHEMA, PROVENANCE).abandon()  # the refusal left no lock and no change


def test_shard_from_elsewhere_is_refused_by_the_reader(tmp_path: Path) -> None:
    whole(tmp_path / "a")
    with StoreWriter(tmp_path / "b", SCHEMA, {**PROVENANCE, "dataset": "xy"}, worker=1, workers=2) as writer:
        append(writer, range(3))
    (tmp_path / "b" / "shard-1-00000.h5").rename(tmp_path / "a" / "shard-1-00000.h5")
    with pytest.raises(StoreError, match=r"field 'provenance.dataset' is 'xy', but 'cd'"):
        ActivationStore(tmp_path / "a")


def test_workers_share_a_folder(tmp_path: Path) -> None:
    a = StoreWriter(tmp_path, SCHEMA, PROVENANCE, worker=0, workers=2, shard_size=40)
    b = StoreWriter(tmp_path, SCHEMA, PROVENANCE, worker=1, workers=2, shard_size=40)
    with pytest.raises(StoreError, match="worker 1 is in use by another process"):
        StoreWriter(tmp_path, SCHEMA, PROVENANCE, worker=1, workers=2)
    append(b, range(1, N, 2))
    append(a, range(0, N, 2))
    a.close()
    assert not ActivationStore(tmp_path).complete
    b.close()
    b.close()
    store = ActivationStore(tmp_path)
    assert store.complete
    assert store.columns["id"].tolist() == IDS[::2] + IDS[1::2]
    order = [*range(0, N, 2), *range(1, N, 2)]
    np.testing.assert_array_equal(store.read("decoder.L0.z", "last"), DATA[order, 0].astype(np.float16))
    assert verify(tmp_path).ok
    with pytest.raises(StoreError, match="worker=2 must be 0 to 1"):
        StoreWriter(tmp_path, SCHEMA, PROVENANCE, worker=2, workers=2)


def test_foreign_shard_of_the_same_name_is_never_replaced(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "a", SCHEMA, PROVENANCE, shard_size=40)
    append(writer, range(10))
    whole(tmp_path / "b")
    foreign = (tmp_path / "b" / "shard-0-00000.h5").rename(tmp_path / "a" / "shard-0-00000.h5")
    before = foreign.read_bytes()
    with pytest.raises(StoreError, match="already exists: another writer with the same worker number"):
        writer.close()
    assert foreign.read_bytes() == before


def test_disk_full_at_sync(tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path, SCHEMA, PROVENANCE, shard_size=40)
    append(writer, range(45))
    assert len(writer.sealed_ids) == 40

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError) as caught:  # noqa: PT012  # the disk's refusal may come with the next call
            append(writer, range(45, N))
            writer.close()
    for text in (str(tmp_path), "No space left on device", "kept: 40 examples", "run again"):
        assert text in str(caught.value)
    assert sorted(contents(tmp_path)) == ["shard-0-00000.h5"]
    with pytest.raises(StoreError, match="this writer is closed"):
        append(writer, range(45, N))
    whole(tmp_path)
    assert contents(tmp_path) == contents(reference)


def test_disk_full_at_the_manifest(tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StoreWriter(tmp_path, SCHEMA, PROVENANCE, shard_size=40)
    append(writer, range(N))
    assert len(writer.sealed_ids) == 120
    real, remaining = os.fsync, [2]  # the last shard and its folder pass, the manifest does not

    def full(descriptor: int) -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="kept: 150 examples"):
            writer.close()
    assert sorted(contents(tmp_path)) == [f"shard-0-0000{i}.h5" for i in range(4)]
    whole(tmp_path)
    assert contents(tmp_path) == contents(reference)


@pytest.mark.parametrize("limit", [1, 3000, 9000, 12000])
def test_write_refused_by_the_system_inside_hdf5(tmp_path: Path, limit: int) -> None:
    # A real refusal of write(2) at several depths of a shard: HDF5 must neither hang, crash nor leave a sealed half.
    code = textwrap.dedent(f"""
        import resource, signal, sys
        import tests.activation_store.test_resume as t
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = t.StoreWriter({str(tmp_path)!r}, t.SCHEMA, t.PROVENANCE, shard_size=40)
        t.append(writer, range(45))
        assert len(writer.sealed_ids) == 40
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
        try:
            t.append(writer, range(45, t.N))
            writer.close()
        except t.StoreError as error:
            print(error)
    """)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "File too large; kept: 40 examples" in done.stdout
    assert sorted(contents(tmp_path)) == ["shard-0-00000.h5"]
    assert len(ActivationStore(tmp_path)) == 40


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written: Not a directory"):
        StoreWriter(tmp_path / "file" / "store", SCHEMA, PROVENANCE)


def test_provenance_must_be_plain(tmp_path: Path) -> None:
    for value in ({1, 2}, float("nan"), Path("x")):
        with pytest.raises(StoreError, match="provenance must be plain JSON"):
            StoreWriter(tmp_path, SCHEMA, {"model": value})
    with StoreWriter(tmp_path, SCHEMA, {"sizes": (1, 2)}):
        pass
    with StoreWriter(tmp_path, SCHEMA, {"sizes": [1, 2]}):
        pass


def test_several_writers_are_killed_at_random_moments() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "crash.py"), "--kills", "8", "--workers", "2", "--seed", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert {name: figure["value"] for name, figure in figures.items()} == {
        "lost": 0,
        "runs_not_identical": 0,
        "runs_not_clean": 0,
    }
    assert figures["lost"]["n"] == 8


def test_a_store_is_read_while_it_is_written(tmp_path: Path) -> None:
    lengths: list[int] = []
    with StoreWriter(tmp_path, SCHEMA, PROVENANCE, shard_size=10) as writer:
        for i in range(0, N, 5):
            append(writer, range(i, i + 5))
            acknowledged = len(writer.sealed_ids) if i % 15 == 0 else 0
            try:
                store = ActivationStore(tmp_path)
            except StoreError:
                assert not acknowledged
                continue
            assert not store.complete
            assert store.columns["id"].tolist() == IDS[: len(store)]
            expected = DATA[: len(store), 1].astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(store.read("decoder.L1.z", "last"), expected)
            assert len(store) >= acknowledged
            lengths.append(len(store))
    assert lengths == sorted(lengths)
    assert len(ActivationStore(tmp_path)) == N


def test_a_shard_that_the_disk_refuses_ends_the_writer_while_it_writes_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard before it is kept; of the next one, begun meanwhile, nothing is."""
    real, files = os.fsync, []

    def sync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            files.append(descriptor)
            if len(files) == 2:
                time.sleep(0.05)  # the caller is well into the third shard by then
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    writer = StoreWriter(tmp_path, SCHEMA, PROVENANCE, shard_size=10)
    append(writer, range(25))
    with pytest.raises(StoreError, match="No space left on device; kept: 10 examples in sealed shards"):
        _ = writer.sealed_ids
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["shard-0-00000.h5"]
    assert len(ActivationStore(tmp_path)) == 10
