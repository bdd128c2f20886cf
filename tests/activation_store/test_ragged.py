"""Ragged arrays, lists in the table, and compression: what is written is what is read."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import ActivationStore, ArrayInfo, Ragged, Schema, StoreWriter, merge, repack, verify
from activation_store.format.schema import runs
from groundscope.core.errors import SiteError, StoreError

ROOT = Path(__file__).resolve().parents[2]
INFO = ArrayInfo("decoder", "z", "image:all", n_layers=2, width=6, n_heads=3, ragged=True)
DENSE = ArrayInfo("decoder", "z", "last", n_layers=2, width=6, n_heads=3)
ITEM = st.lists(st.floats(-1e4, 1e4, width=32) | st.sampled_from([np.nan, np.inf, -np.inf]), min_size=12, max_size=12)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


def table(n: int) -> dict:
    return {"id": [f"e{i}" for i in range(n)], "group": ["g"] * n}


@st.composite
def cases(draw) -> tuple:
    n = draw(st.integers(0, 9))
    lengths = draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    flat = draw(st.lists(ITEM, min_size=sum(lengths), max_size=sum(lengths)))
    tokens = np.array(flat, np.float32).reshape(-1, 2, 6)
    lists = {
        "boxes": st.lists(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), max_size=3),
        "span:image": st.lists(st.lists(st.integers(0, 2**40), min_size=2, max_size=2), max_size=3),
        "box_nouns": st.lists(TEXT, max_size=3),
        "positions": st.none() | st.lists(st.integers(-5, 5), max_size=3),
    }
    columns = {name: draw(st.lists(elements, min_size=n, max_size=n)) for name, elements in lists.items()}
    return (
        Schema((INFO, DENSE), draw(st.sampled_from(["float32", "float16", "bfloat16"]))),
        Ragged(tokens, np.cumsum([0, *lengths])),
        columns,
        draw(st.integers(1, 4)),
        draw(st.integers(1, 9)),
        draw(st.permutations(range(n))),
    )


@settings(max_examples=25, deadline=None)
@given(cases(), st.booleans())
def test_ragged_and_lists_round_trip(case: tuple, packed: bool) -> None:
    schema, tokens, columns, shard_size, batch, order = case
    n = len(tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        with StoreWriter(folder, schema, {}, shard_size=shard_size) as writer:
            for at in range(0, n, batch):
                rows = slice(at, at + batch)
                some = {k: v[rows] for k, v in {**table(n), **columns}.items()}
                writer.append({INFO.key: tokens[rows], DENSE.key: np.zeros((len(some["id"]), 2, 6))}, some)
        assert verify(folder).ok
        store = ActivationStore(folder)
        if packed:
            store = repack(store, Path(name) / "packed")
            assert verify(store.path).ok
        for layer in range(2):
            stored = torch.tensor(tokens.values[:, layer]).to(getattr(torch, schema.dtype)).float().numpy()
            whole = store.ragged(f"decoder.L{layer}.z", "image:all")
            np.testing.assert_array_equal(whole.values, stored)
            np.testing.assert_array_equal(whole.offsets, tokens.offsets)
            some = store.ragged(f"decoder.L{layer}.z", "image:all", head=1, examples=order)
            for i, got in zip(order, some, strict=True):
                np.testing.assert_array_equal(got, stored[tokens.offsets[i] : tokens.offsets[i + 1], 2:4])
        frame = store.frame()
        for column, values in columns.items() if n else ():
            if all(value is None for value in values):
                assert frame[column].isna().all()  # nothing says that it would have held lists
                continue
            for got, given_ in zip(frame[column], values, strict=True):
                expected = given_ or []
                if column == "box_nouns":
                    # A shard of empty lists alone does not know what they are lists of.
                    assert list(got) == expected
                else:
                    np.testing.assert_array_equal(np.asarray(got).reshape(np.shape(expected)), np.array(expected))


def test_ragged_bytes_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = Ragged.of([rng.normal(size=(k % 7, 2, 6)).astype(np.float32) for k in range(50)])
    files = []
    for batch in (1, 13, 50):
        with StoreWriter(tmp_path / str(batch), Schema((INFO,), "float16"), {}, shard_size=20) as writer:
            for at in range(0, 50, batch):
                rows = slice(at, at + batch)
                writer.append({INFO.key: tokens[rows]}, {k: v[rows] for k, v in table(50).items()})
            writer.append({INFO.key: tokens[:20]}, {"id": [f"x{i}" for i in range(20)], "group": ["g"] * 20})
        files.append({p.name: p.read_bytes() for p in (tmp_path / str(batch)).iterdir()})
    assert files[0] == files[1] == files[2]
    with StoreWriter(tmp_path / "13", Schema((INFO,), "float16"), {}, shard_size=20) as writer:
        writer.append({INFO.key: tokens}, table(50))
    assert {p.name: p.read_bytes() for p in (tmp_path / "13").iterdir()} == files[1]


@pytest.mark.parametrize(
    ("bring", "message"),
    [
        (lambda: np.zeros((3, 2, 6), np.float32), r"decoder.z/image:all must be Ragged\(values"),
        (lambda: Ragged(np.zeros((4, 2, 6)), np.array([0, 1, 4])), r"has 2 examples.*must be 3"),
        (lambda: Ragged(np.zeros((4, 2, 5)), np.array([0, 1, 4, 4])), r"shape \[2, 5\]"),
        (lambda: Ragged(np.zeros((4, 2, 6), int), np.array([0, 1, 4, 4])), "int64"),
        (lambda: Ragged(np.zeros((4, 2, 6)), np.array([0, 2, 1, 4])), "never decrease"),
        (lambda: Ragged(np.zeros((4, 2, 6)), np.array([0, 1, 2, 3])), "do not fit 4 tokens"),
    ],
)
def test_ragged_batches_that_do_not_fit(tmp_path: Path, bring, message: str) -> None:
    with StoreWriter(tmp_path, Schema((INFO,)), {}) as writer, pytest.raises(StoreError, match=message):
        writer.append({INFO.key: bring()}, table(3))


def test_overflow_in_a_ragged_array_names_the_example(tmp_path: Path) -> None:
    values = np.zeros((4, 2, 6), np.float32)
    values[3, 1, 5] = 1e6
    tokens = Ragged(values, np.array([0, 1, 1, 4]))
    with (
        StoreWriter(tmp_path, Schema((INFO,), "float16"), {}) as writer,
        pytest.raises(StoreError, match=r"decoder.z/image:all has 1 value beyond the largest of float16.*'e2'"),
    ):
        writer.append({INFO.key: tokens}, table(3))


def test_each_reading_method_names_the_other_for_the_wrong_kind_of_array(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, Schema((INFO, DENSE)), {}) as writer:
        tokens = Ragged.of([np.zeros((1, 2, 6)), np.zeros((2, 2, 6))])
        writer.append({INFO.key: tokens, DENSE.key: np.zeros((2, 2, 6))}, table(2))
    store = ActivationStore(tmp_path)
    with pytest.raises(SiteError, match=r"many tokens per example; use ragged"):
        store.read("decoder.L0.z", "image:all")
    with pytest.raises(SiteError, match=r"one vector per example; use read"):
        store.ragged("decoder.L0.z", "last")
    assert store.ragged("decoder.L0.z", "image:all", examples=[1, 0, 1]).lengths.tolist() == [2, 1, 2]
    assert len(store.ragged("decoder.L0.z", "image:all", examples=[])) == 0
    with pytest.raises(StoreError, match="example 2 not in store"):
        store.ragged("decoder.L0.z", "image:all", examples=[2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, "a"], [], []], "int, str"),
        ([[[1, 2], [3]], [], []], "unequal length"),
        ([[[1, 2], 3], [], []], "unequal length"),
        ([["a\0"], [], []], "zero character"),
        ([["\ud800"], [], []], "surrogate"),
        ([[{}], [], []], "dict"),
    ],
)
def test_lists_that_cannot_be(tmp_path: Path, values: list, message: str) -> None:
    with StoreWriter(tmp_path, Schema((DENSE,)), {}) as writer:
        with pytest.raises(StoreError, match=rf"column 'boxes' of the example table holds lists with .*{message}"):
            writer.append({DENSE.key: np.zeros((3, 2, 6))}, {**table(3), "boxes": values})
        writer.append({DENSE.key: np.zeros((3, 2, 6))}, {**table(3), "boxes": [[[1, 2]], [], None]})
        more = {"id": ["x"], "group": ["g"]}
        with pytest.raises(
            StoreError,
            match="lists of text in this batch, lists of 2 numbers in earlier ones; give all batches lists of 2 numbers",
        ):
            writer.append({DENSE.key: np.zeros((1, 2, 6))}, {**more, "boxes": [["a"]]})
    assert verify(tmp_path).ok


def test_runs_are_neighbours_joined() -> None:
    assert runs([5, 3, 4, 9, 11, 10]) == [[3, 6], [9, 12]]
    assert runs([]) == []
    assert runs(range(4)) == [[0, 4]]


@pytest.mark.parametrize("compression", ["bitshuffle-lz4", "blosc2-zstd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compressed_reads_the_same(tmp_path: Path, compression: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    wide = ArrayInfo("decoder", "resid_post", "last", 2, 256)
    values = (rng.normal(size=(70, 2, 256)).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    tokens = Ragged.of([rng.integers(-8, 8, size=(k % 5, 2, 6)).astype(np.float32) for k in range(70)])
    contents = []
    for name, batch in (("a", 70), ("b", 9)):
        with StoreWriter(tmp_path / name, Schema((wide, INFO), dtype, compression), {}, shard_size=50) as writer:
            for at in range(0, 70, batch):
                rows = slice(at, at + batch)
                some = {k: v[rows] for k, v in table(70).items()}
                writer.append({wide.key: values[rows], INFO.key: tokens[rows]}, some)
        contents.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert verify(tmp_path / "a").ok
    store = ActivationStore(tmp_path / "a")
    rows = [69, 3, 3, 50, 49, 0]
    np.testing.assert_array_equal(store.read("decoder.L1.resid_post", "last", examples=rows), values[rows, 1])
    np.testing.assert_array_equal(store.ragged("decoder.L0.z", "image:all").values, tokens.values[:, 0])
    with h5py.File(tmp_path / "a" / "shard-0-00000.h5") as file:
        assert file["arrays/decoder.resid_post/last"].id.get_storage_size() < values[:50].nbytes * 0.85
    packed = repack(store, tmp_path / "packed")
    np.testing.assert_array_equal(packed.read("decoder.L1.resid_post", "last"), values[:, 1])
    assert packed.schema.compression is None
    shard = tmp_path / "a" / "shard-0-00001.h5"
    raw = bytearray(shard.read_bytes())
    with h5py.File(shard) as file:
        at = file["arrays/decoder.resid_post/last"].id.get_chunk_info_by_coord((0, 1, 0)).byte_offset + 40
    raw[at] ^= 8
    shard.write_bytes(raw)
    (problem,) = verify(tmp_path / "a").problems
    assert "decoder.resid_post [last] layer 1" in problem.message
    with pytest.raises(StoreError, match=r"the values of decoder.resid_post \[last\] layer 1 changed"):
        merge(store.merge(), tmp_path / "merged")


def test_unknown_and_uninstalled_compression(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unknown compression 'gzip'; choose from None, bitshuffle-lz4, blosc2-zstd"):
        Schema((DENSE,), "float32", "gzip")  # type: ignore[arg-type]
    with StoreWriter(tmp_path / "s", Schema((DENSE,), "float32", "bitshuffle-lz4"), {}) as writer:
        writer.append({DENSE.key: np.zeros((3, 2, 6))}, table(3))
    code = f"""
import sys
sys.modules["hdf5plugin"] = None  # as if it were not installed
from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter
from groundscope.core.errors import StoreError
store = ActivationStore({str(tmp_path / "s")!r})
print(len(store.frame()))
info = store.arrays[0]
for call in (
    lambda: store.read("decoder.L0.z", "last"),
    lambda: StoreWriter({str(tmp_path / "t")!r}, Schema((info,), "float32", "blosc2-zstd"), {{}}),
):
    try:
        call()
    except StoreError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "3"
    assert len(lines) == 3
    for line, name in zip(lines[1:], ("bitshuffle-lz4", "blosc2-zstd"), strict=True):
        assert f"compression '{name}' needs the package hdf5plugin" in line
        assert "pip install 'groundscope[compression]'" in line
    assert not (tmp_path / "t").exists()
