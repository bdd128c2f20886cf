"""Ways of reading: queries, batches, torch, several stores as one, repacked stores; and messages of errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter, merge, repack, verify
from activation_store.__main__ import main
from groundscope.core.errors import SiteError, StoreError

ROOT = Path(__file__).resolve().parents[2]
INFO = ArrayInfo("decoder", "z", "last", n_layers=2, width=8, n_heads=2)
N = 90
DATA = np.random.default_rng(0).normal(size=(N, 2, 8)).astype(np.float32)
PROVENANCE = {"model": {"name": "tiny", "weights": "ab"}, "dataset": {"digest": "one"}, "sites": ["z"]}


def table(rows: range, prefix: str = "e") -> dict:
    return {
        "id": [f"{prefix}{i}" for i in rows],
        "group": [f"scene{i // 3}" for i in rows],
        "split": ["neutral" if i % 4 else "conflict" for i in rows],
        "attribute:green": [None if i % 3 == 0 else i % 2 == 0 for i in rows],
        "margin": [None if i % 5 == 0 else i / 2 for i in rows],
        "boxes": [[[1, 2, 3, 4]] * (i % 2) for i in rows],
    }


def write(path: Path, rows: range = range(N), *, prefix: str = "e", dtype: str = "float32", **provenance) -> Path:
    with StoreWriter(
        path, Schema((INFO,), dtype), {**PROVENANCE, **provenance}, shard_size=40, extra={"W": np.eye(2)}
    ) as w:
        w.append({INFO.key: DATA[rows.start : rows.stop]}, table(rows, prefix))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return ActivationStore(write(tmp_path_factory.mktemp("reading") / "store"))


# ---- queries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "query"),
    [
        ({"attribute:green": True}, "green == 1"),
        ({"attribute:green": False, "split": "neutral"}, "green == 0 and split == 'neutral'"),
        ({"attribute:green": None}, "green.isna()"),
        ({"attribute:green": [True, None]}, "green == 1 or green.isna()"),
        ({"split": ["conflict", "other"]}, "split == 'conflict'"),
        ({"margin": [3.0, 0.5, None]}, "margin == 3 or margin == 0.5 or margin.isna()"),
        ({"group": "scene7"}, "group == 'scene7'"),
        ({"split": []}, "group == 'none'"),
        ({"answer": None}, "group != 'none'"),
        ({}, "group != 'none'"),
    ],
)
def test_select_agrees_with_pandas(store: ActivationStore, where: dict, query: str) -> None:
    frame = store.frame().rename(columns={"attribute:green": "green"})
    rows = store.select(where)
    assert rows.tolist() == frame.query(query, engine="python").index.tolist()
    np.testing.assert_array_equal(store.read("decoder.L1.z", "last", examples=rows), DATA[rows, 1])


def test_select_takes_keywords(store: ActivationStore) -> None:
    rows = store.select({"attribute:green": True}, split="neutral")
    assert rows.tolist() == [i for i in range(N) if i % 3 and i % 2 == 0 and i % 4]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"attribute:red": True}, "label 'attribute:red' not in store; choose from attribute:green"),
        ({"part": "x"}, "column 'part' not in store; choose from id, group, question"),
        ({"split": 3}, "column 'split' cannot be compared with 3: it holds text"),
        ({"margin": "3"}, "column 'margin' cannot be compared with '3': it holds numbers"),
        ({"boxes": 1}, "column 'boxes' cannot be compared with 1: it holds lists"),
    ],
)
def test_queries_that_cannot_be(store: ActivationStore, where: dict, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        store.select(where)


# ---- batches and torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, slice(5, 70, 3), [80, 2, 2, 41]])
def test_batches_are_the_rows_in_order(store: ActivationStore, rows) -> None:
    order = np.arange(N) if rows is None else np.arange(N)[rows]
    got = list(store.batches("decoder.L0.z", "last", 16, head=1, examples=rows))
    assert [len(r) for r, _ in got[:-1]] == [16] * (len(got) - 1)
    np.testing.assert_array_equal(np.concatenate([r for r, _ in got]), order)
    np.testing.assert_array_equal(np.concatenate([x for _, x in got]), DATA[order, 0, 4:])


def test_batches_check_before_they_begin(store: ActivationStore) -> None:
    with pytest.raises(StoreError, match="size=0"):
        store.batches("decoder.L0.z", "last", 0)
    with pytest.raises(SiteError, match=r"layers 0-1 were traced"):
        store.batches("decoder.L9.z", "last")


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_loads_what_was_written(store: ActivationStore, workers: int) -> None:
    view = store.torch("decoder.L1.z", "last", ["attribute:green"], examples=slice(10, None))
    assert len(view) == N - 10
    x, y = view[3]
    torch.testing.assert_close(x, torch.tensor(DATA[13, 1]), rtol=0, atol=0)
    assert y.tolist() == [0.0]
    # Workers are fresh processes: a fork of one that runs threads may hang.
    loader = DataLoader(view, 32, num_workers=workers, multiprocessing_context="spawn" if workers else None)
    xs, ys = (torch.cat(parts) for parts in zip(*loader, strict=True))
    np.testing.assert_array_equal(xs.numpy(), DATA[10:, 1])
    np.testing.assert_array_equal(ys[:, 0].numpy(), store.columns["attribute:green"][10:])
    with pytest.raises(StoreError, match="label 'attribute:red' not in store"):
        store.torch("decoder.L1.z", "last", ["attribute:red"])


def test_a_store_larger_than_memory_is_read_in_parts(tmp_path: Path) -> None:
    # 400 MB of values under a limit that leaves far less for reading them.
    info = ArrayInfo("decoder", "resid_post", "last", 8, 4096)
    with StoreWriter(tmp_path, Schema((info,)), {}, shard_size=256) as writer:
        block = np.ones((64, 8, 4096), np.float32)
        for at in range(0, 3072, 64):
            block[:, :, 0] = np.arange(at, at + 64)[:, None]
            writer.append({info.key: block}, {"id": [str(at + i) for i in range(64)], "group": ["g"] * 64})
    code = f"""
import resource
from activation_store import ActivationStore
store = ActivationStore({str(tmp_path)!r})
store.read("decoder.L0.resid_post", "last", examples=[0])
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + 40 * 2**20, -1))
total = sum(float(x[:, 0].sum()) for _, x in store.batches("decoder.L7.resid_post", "last", 512))
print(total)
try:
    store.read("decoder.L7.resid_post", "last")
except MemoryError:
    print("the whole layer does not fit")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [str(float(sum(range(3072)))), "the whole layer does not fit"]


# ---- several stores as one ---------------------------------------------------------------------------------------------


def test_merged_stores_read_as_one(tmp_path: Path, store: ActivationStore) -> None:
    a, b = write(tmp_path / "a", range(50)), write(tmp_path / "b", range(50, N), dataset={"digest": "two"})
    both = ActivationStore(a).merge(b)
    written = merge(both, tmp_path / "c")
    assert verify(tmp_path / "c").ok
    for merged in (both, written):
        assert (len(merged), merged.complete) == (N, True)
        assert merged.provenance["dataset"] == {"merged": [{"digest": "one"}, {"digest": "two"}]}
        np.testing.assert_array_equal(merged.read("decoder.L1.z", "last"), DATA[:, 1])
        rows = [89, 0, 50, 49]
        np.testing.assert_array_equal(merged.read("decoder.L1.z", "last", 1, rows), DATA[rows, 1, 4:])
        pd.testing.assert_frame_equal(merged.frame(), store.frame())
        np.testing.assert_array_equal(merged.tensor("W"), np.eye(2))
        np.testing.assert_array_equal(
            repack(merged, tmp_path / f"r{id(merged)}").read("decoder.L0.z", "last"), DATA[:, 0]
        )
    assert both.digest != ActivationStore(a).digest
    assert ActivationStore(a).merge(b).digest == both.digest
    third = written.merge(write(tmp_path / "d", range(5), prefix="x"))
    assert third.provenance["dataset"] == {"merged": [{"digest": "one"}, {"digest": "two"}]}
    assert len(third) == N + 5


def test_stores_that_cannot_be_one(tmp_path: Path, store: ActivationStore) -> None:
    for name, change, message in (
        (
            "model",
            {"model": {"name": "tiny", "weights": "cd"}},
            r"field 'provenance.model.weights' differs: 'cd'.*'ab'",
        ),
        ("sites", {"sites": ["q"]}, r"field 'provenance.sites' differs"),
        ("dtype", {"dtype": "float16"}, r"field 'dtype' differs: 'float16' instead of 'float32'"),
        ("ids", {}, "the example 'e0' is in both; ids must be unique"),
    ):
        other = write(tmp_path / name, range(3), **change)
        with pytest.raises(StoreError, match=message):
            store.merge(other)


def test_new_stores_go_only_where_nothing_is(tmp_path: Path, store: ActivationStore) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for work in (repack, merge):
        with pytest.raises(StoreError, match="exists and is not empty"):
            work(store, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    half = tmp_path / "half"
    shutil.copytree(store.path, half)
    (half / "manifest.json").unlink()
    for work in (repack, merge):
        with pytest.raises(StoreError, match="is not complete"):
            work(ActivationStore(half), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_repacked_is_contiguous_and_the_same_to_the_bit(tmp_path: Path, dtype: str) -> None:
    patterns = (
        np.arange(N * 16, dtype=np.uint32).reshape(N, 2, 8) * 2**21 // 2**16 * 2**16
    )  # NaNs and infinities among them
    values = patterns.view(np.float32) if dtype != "float16" else DATA * 1e-6
    with StoreWriter(tmp_path / "a", Schema((INFO,), dtype), {}, shard_size=33) as writer:
        writer.append({INFO.key: values}, table(range(N)))
    packed = repack(ActivationStore(tmp_path / "a"), tmp_path / "b")
    with h5py.File(tmp_path / "b" / "shard-0-00000.h5") as file:
        z = file["arrays/decoder.z/last"]
        assert (z.shape, z.chunks, z.attrs["order"]) == ((2, N, 8), None, "LND")
        stored = z[...]
        attributes = dict(z.attrs)
    parts, nonfinite = [], []
    for k in range(3):
        with h5py.File(tmp_path / "a" / f"shard-0-0000{k}.h5") as file:
            parts.append(file["arrays/decoder.z/last"][...])
            nonfinite.append(int(file["arrays/decoder.z/last"].attrs["nonfinite"]))
    assert attributes["nonfinite"] == sum(nonfinite)
    assert stored.tobytes() == np.concatenate(parts).swapaxes(0, 1).tobytes()
    assert verify(tmp_path / "b").ok
    for rows in (None, slice(3, 70), [4, 88, 4], []):
        for head in (None, 1):
            got = packed.read("decoder.L1.z", "last", head, rows)
            np.testing.assert_array_equal(got, ActivationStore(tmp_path / "a").read("decoder.L1.z", "last", head, rows))


def test_flipped_byte_in_a_repacked_store_names_its_rows(tmp_path: Path, store: ActivationStore) -> None:
    repack(store, tmp_path / "b")
    shard = tmp_path / "b" / "shard-0-00000.h5"
    raw = bytearray(shard.read_bytes())
    raw[raw.find(DATA[70, 1].tobytes()) + 5] ^= 1
    shard.write_bytes(raw)
    report = verify(tmp_path / "b")
    assert report.affected == tuple(f"e{i}" for i in range(64, N))
    assert "decoder.z [last] layer 1" in str(report)


# ---- the folder refuses ------------------------------------------------------------------------------------------------


def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    # As a user whom the system holds to it, which root is not.
    folder = Path(tempfile.mkdtemp(prefix="groundscope-"))
    try:
        write(folder / "store")
        for path in (folder, folder / "store", *(folder / "store").iterdir()):
            path.chmod(0o555 if path.is_dir() else 0o444)
        code = textwrap.dedent(f"""
            import os, sys
            import tests.activation_store.test_reading as t
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            path = t.Path({str(folder)!r})
            store = t.ActivationStore(path / "store")
            print(len(store), t.verify(store.path).ok, (store.read("decoder.L1.z", "last") == t.DATA[:, 1]).all())
            for work in (lambda: t.write(path / "store"), lambda: t.repack(store, path / "new"), lambda: t.write(path / "n")):
                try:
                    work()
                except t.StoreError as error:
                    print(error)
        """)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0] == "90 True True"
        for line, name in zip(lines[1:], ("store", "new", "n"), strict=True):
            assert line.startswith(f"{folder / name}: cannot be written: Permission denied")
    finally:
        for path in (folder, folder / "store"):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_a_repack_that_the_disk_refuses_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "store")
    code = textwrap.dedent(f"""
        import resource, signal, sys
        import tests.activation_store.test_reading as t
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = t.ActivationStore({str(tmp_path / "store")!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        for work in (t.repack, t.merge):
            try:
                work(store, {str(tmp_path / "new")!r})
            except t.StoreError as error:
                print(error)
    """)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("File too large; its contents were removed") == 2
    assert not (tmp_path / "new").exists()


def test_a_shard_open_in_another_handle_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    with h5py.File(tmp_path / "shard-0-00000.h5", "r") as theirs:
        assert theirs.attrs["rows"] == 40
        np.testing.assert_array_equal(ActivationStore(tmp_path).read("decoder.L0.z", "last"), DATA[:, 0])
        assert verify(tmp_path).ok


# ---- the command line --------------------------------------------------------------------------------------------------


def test_commands_write_stores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", range(50)), write(tmp_path / "b", range(50, N))
    assert main(["merge", str(a), str(b), "--out", str(tmp_path / "c")]) == 0
    assert f"{tmp_path / 'c'}: 90 examples, 1 array" in capsys.readouterr().out
    assert main(["repack", str(tmp_path / "c")]) == 0
    assert f"{tmp_path / 'c-repacked'}: 90 examples" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "c-repacked")]) == 0
    np.testing.assert_array_equal(ActivationStore(tmp_path / "c-repacked").read("decoder.L1.z", "last"), DATA[:, 1])
    assert main(["merge", str(a), str(a), "--out", str(tmp_path / "d")]) == 2
    assert "the example 'e0' is in both" in capsys.readouterr().err
    assert main(["repack", str(tmp_path / "c")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_info_is_readable_at_a_glance(store: ActivationStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(store.path)]) == 0
    output = capsys.readouterr().out
    for text in (
        "90 examples in 3 shards, float32, not compressed",
        "[90, 2, 8]",
        "2 x 4",
        "attribute:green 30 30 30",
        "neutral 67, conflict 23",
        "lists, 45 items in total",
        "tensors: W",
        '"weights": "ab"',
    ):
        assert text in " ".join(output.split()), output
    assert max(map(len, output.splitlines()[3:])) <= 80
