"""Every kind of damage is found and named, with the affected examples."""

from __future__ import annotations

import random
from pathlib import Path

import h5py
import numpy as np
import pytest
from rich.progress import Progress

from activation_store import ActivationStore, ArrayInfo, Ragged, Schema, StoreWriter, verify
from groundscope.core.errors import StoreError
from groundscope.core.progress import watched

Z = ("decoder", "z", "last")
SCHEMA = Schema((ArrayInfo("decoder", "z", "last", n_layers=2, width=8, n_heads=2),))
N = 30
DATA = np.random.default_rng(0).normal(size=(N, 2, 8)).astype(np.float32)
IDS = [f"e{i}" for i in range(N)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with StoreWriter(tmp_path, SCHEMA, {"model": "tiny"}, shard_size=10, extra={"W_U": np.eye(4)}) as writer:
        writer.append({Z: DATA}, {"id": IDS, "group": IDS, "question": [f"is it number {i}?" for i in range(N)]})
    return tmp_path


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x04
    path.write_bytes(raw)


def only_problem(path: Path):
    report = verify(path)
    assert not report.ok
    assert len(report.problems) == 1, str(report)
    assert report.problems[0].message in str(report)
    return report.problems[0]


def test_whole(store: Path) -> None:
    bars: list[Progress] = []
    with watched(bars.append):
        report = verify(store)
    assert (report.ok, report.complete, report.shards, report.rows, report.affected) == (True, True, 3, N, ())
    (task,) = bars[0].tasks
    assert (task.completed, task.total) == (3, 3)


@pytest.mark.parametrize("listed", [True, False], ids=["finished", "unfinished"])
def test_flipped_byte_in_values(store: Path, *, listed: bool) -> None:
    shard = store / "shard-0-00001.h5"
    flip(shard, shard.read_bytes().find(DATA[15, 1].tobytes()) + 3)
    if not listed:
        (store / "manifest.json").unlink()
    problem = next(p for p in verify(store).problems if p.file == shard.name)
    assert (problem.kind, "decoder.z [last]" in problem.message) == ("damaged", True)
    assert "run the same trace again" in problem.message
    if listed:
        assert problem.examples == tuple(IDS[10:20])
        assert verify(store).affected == tuple(IDS[10:20])


@pytest.mark.parametrize("listed", [True, False], ids=["finished", "unfinished"])
def test_flipped_byte_in_the_table(store: Path, *, listed: bool) -> None:
    shard = store / "shard-0-00002.h5"
    flip(shard, shard.read_bytes().find(b"is it number 25?"))
    if not listed:
        (store / "manifest.json").unlink()
    problem = next(p for p in verify(store).problems if p.file == shard.name)
    # Nothing of a file with changed bytes is parsed to name the column: HDF5 may hang or crash over them.
    assert "its table of examples" in problem.message


def test_any_flipped_byte_is_found(store: Path) -> None:
    chance = random.Random(0)
    for name in ("manifest.json", "shard-0-00000.h5", "tensors.h5", "index.h5"):
        raw = (store / name).read_bytes()
        for _ in range(60):
            flip(store / name, chance.randrange(len(raw)))
            assert name in {p.file for p in verify(store).problems}
            (store / name).write_bytes(raw)
    assert verify(store).ok


def test_damaged_manifest_is_reported_and_refused(store: Path) -> None:
    flip(store / "manifest.json", (store / "manifest.json").read_bytes().find(b"tiny"))
    problem = only_problem(store)
    assert (problem.file, problem.kind, problem.examples) == ("manifest.json", "damaged", ())
    with pytest.raises(StoreError, match="the manifest is damaged"):
        ActivationStore(store)


def test_missing_shard(store: Path) -> None:
    (store / "shard-0-00001.h5").unlink()
    problem = only_problem(store)
    assert (problem.file, problem.kind, problem.examples) == ("shard-0-00001.h5", "missing", tuple(IDS[10:20]))
    with pytest.raises(StoreError, match=r"10 examples \('e10' to 'e19'\) is missing"):
        ActivationStore(store)


@pytest.mark.parametrize("length", [0, 100, 5000, -1])
def test_truncated_shard(store: Path, length: int) -> None:
    shard = store / "shard-0-00001.h5"
    shard.write_bytes(shard.read_bytes()[:length])
    problem = only_problem(store)
    assert (problem.file, problem.kind, problem.examples) == (shard.name, "damaged", tuple(IDS[10:20]))
    assert "truncated" in problem.message
    with pytest.raises(StoreError, match=r"damaged, \d+ bytes instead of"):
        ActivationStore(store)
    (store / "manifest.json").unlink()
    assert shard.name in {p.file for p in verify(store).problems}
    with pytest.raises(StoreError, match="damaged or truncated"):
        ActivationStore(store).read("decoder.L0.z", "last")


def test_unfinished_files_are_reported(store: Path) -> None:
    (store / "shard-0-00003.h5.123.part").write_bytes(b"half")
    problem = only_problem(store)
    assert (problem.kind, problem.examples) == ("unfinished", ())
    assert verify(store).complete
    ActivationStore(store)


def test_a_missing_manifest_is_reported(store: Path) -> None:
    (store / "manifest.json").unlink()
    problem = only_problem(store)
    assert (problem.file, problem.kind) == ("manifest.json", "unfinished")
    assert verify(store).rows == N


def test_rows_that_disagree_are_damage(store: Path) -> None:
    (store / "manifest.json").unlink()
    with h5py.File(store / "shard-0-00001.h5", "a") as file:
        file.attrs["rows"] = 2**50
    with pytest.raises(StoreError, match=r"shard-0-00001.h5: damaged"):
        ActivationStore(store)
    assert "shard-0-00001.h5" in {p.file for p in verify(store).problems}


def test_missing_tensors(store: Path) -> None:
    (store / "tensors.h5").unlink()
    problem = only_problem(store)
    assert (problem.file, problem.kind, "W_U" in problem.message) == ("tensors.h5", "missing", True)


def test_only_the_examples_of_a_damaged_block_are_affected(tmp_path: Path) -> None:
    tokens = ArrayInfo("vision", "resid_post", "image:all", n_layers=2, width=4, ragged=True)
    rng = np.random.default_rng(1)
    ragged = Ragged.of([rng.normal(size=(i % 6, 2, 4)).astype(np.float32) for i in range(100)])
    dense = rng.normal(size=(100, 2, 8)).astype(np.float32)
    names = [f"e{i}" for i in range(100)]
    with StoreWriter(tmp_path, Schema((SCHEMA.arrays[0], tokens)), {}, shard_size=80) as writer:
        writer.append({Z: dense, tokens.key: ragged}, {"id": names, "group": names})
    shard = tmp_path / "shard-0-00000.h5"
    whole = shard.read_bytes()
    flip(shard, whole.find(dense[40, 1].tobytes()) + 2)
    problem = only_problem(tmp_path)
    assert "decoder.z [last] layer 1;" in problem.message
    assert problem.examples == tuple(names[32:64])
    assert verify(tmp_path).rows == 100 - 32
    shard.write_bytes(whole)
    flip(shard, whole.find(ragged.values[70, 0].tobytes()) + 2)  # in the third block of 32 tokens
    problem = only_problem(tmp_path)
    assert "vision.resid_post [image:all] layer 0;" in problem.message
    begins, ends = ragged.offsets[:-1], ragged.offsets[1:]
    inside = np.flatnonzero((begins < 96) & (ends > 64) & (ends > begins))
    assert set(problem.examples) >= {names[i] for i in inside}
    assert set(problem.examples) <= {names[i] for i in range(inside[0], inside[-1] + 1)}


def test_a_missing_index_is_reported_and_not_needed(store: Path) -> None:
    (store / "index.h5").unlink()
    problem = only_problem(store)
    assert (problem.file, problem.kind, problem.examples) == ("index.h5", "missing", ())
    np.testing.assert_array_equal(ActivationStore(store).read("decoder.L1.z", "last"), DATA[:, 1])
    with StoreWriter(store, SCHEMA, {"model": "tiny"}, shard_size=10, extra={"W_U": np.eye(4)}):
        pass
    assert verify(store).ok


def test_damaged_tensors_of_an_unfinished_store(store: Path) -> None:
    (store / "manifest.json").unlink()
    path = store / "tensors.h5"
    flip(path, path.read_bytes().find(np.eye(4).tobytes()))
    assert "W_U changed" in str(verify(store))


def test_a_full_disk_while_the_index_is_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HDF5 says while it closes a file it could not write would be an unraisable exception, an error here."""
    import errno
    import os

    from activation_store.format.buffered_file import create_hdf5

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"), create_hdf5(tmp_path / "index.h5") as file:
        file.create_dataset("x", data=np.arange(100_000))
