"""Values read equal the values written, against arrays in memory."""

from __future__ import annotations

import hashlib
import json
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

from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter, verify
from groundscope.core.errors import SiteError, StoreError
from lvlm.sites import Site
from lvlm.token_selection import TokenSelection

ROOT = Path(__file__).resolve().parents[2]
Z = ("decoder", "z", "last")
RESID = ("decoder", "resid_post", "image:mean")
OUT = ("projector", "out", "image:mean")
SCHEMA = Schema(
    (
        ArrayInfo("decoder", "z", "last", n_layers=3, width=8, n_heads=4),
        ArrayInfo("decoder", "resid_post", "image:mean", n_layers=4, width=6),
        ArrayInfo("projector", "out", "image:mean", n_layers=1, width=5),
    )
)


def arrays(n: int, seed: int = 0, schema: Schema = SCHEMA) -> dict:
    rng = np.random.default_rng(seed)
    return {a.key: rng.normal(size=(n, a.n_layers, a.width)).astype(np.float32) for a in schema.arrays}


def table(n: int) -> dict:
    return {"id": [f"e{i}" for i in range(n)], "group": [f"scene{i // 2}" for i in range(n)]}


def written(path: Path, n: int = 100, **options) -> dict:
    data = arrays(n)
    with StoreWriter(path, SCHEMA, {"model": "tiny"}, **{"shard_size": 40, **options}) as writer:
        for at in range(0, n, 7):
            rows = slice(at, at + 7)
            writer.append({k: v[rows] for k, v in data.items()}, {k: v[rows] for k, v in table(n).items()})
    return data


@pytest.fixture(scope="module")
def written_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("store") / "activations"
    return path, written(path)


@pytest.mark.parametrize(
    "rows",
    [
        None,
        slice(None, None, 3),
        slice(35, 45),
        slice(10, 0, -1),
        slice(5, 5),
        [99, 3, 3, -1, 41, 40, 39],
        np.arange(100) % 3 == 0,
        np.zeros(100, bool),
        [],
        np.arange(99, -1, -1),
    ],
)
def test_reads_equal_memory(written_store: tuple[Path, dict], rows) -> None:
    path, data = written_store
    pick = slice(None) if rows is None else np.asarray(rows, dtype=int) if isinstance(rows, list) else rows
    with ActivationStore(path) as store:
        for layer in range(3):
            for head in range(4):
                got = store.read(f"decoder.L{layer}.z", "last", head=head, examples=rows)
                np.testing.assert_array_equal(got, data[Z][pick, layer, head * 2 : head * 2 + 2])
                assert got.dtype == np.float32
            got = store.read(Site("decoder", layer, "z"), TokenSelection("last"), examples=rows)
            np.testing.assert_array_equal(got, data[Z][pick, layer])
        np.testing.assert_array_equal(store.read("projector.out", "image:mean", examples=rows), data[OUT][pick, 0])


def test_info_and_repr_describe_the_store(written_store: tuple[Path, dict]) -> None:
    path, _ = written_store
    store = ActivationStore(path)
    assert len(store) == 100
    assert store.complete
    assert store.arrays == SCHEMA.arrays
    assert store.layers("decoder", "z") == 3
    assert store.width("decoder", "resid_post") == 6
    assert store.n_heads("decoder") == 4
    assert store.has("decoder", "z", "last")
    assert not store.has("decoder", "z", "image:mean")
    assert store.provenance == {"model": "tiny"}
    shards = [f"shard-0-0000{i}.h5" for i in range(3)]
    assert sorted(p.name for p in path.iterdir()) == ["index.h5", "manifest.json", *shards]
    store.close()
    assert store.read("decoder.L0.z", "last").shape == (100, 8)  # opens its files again
    store.close()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_agree_with_torch(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(33, 1, 64)) * 10.0 ** rng.integers(-9, 3, size=(33, 1, 64))).astype(np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0x00000001, 0x80008000, 0x7F800000, 0xFF800000, 0x7FC00000], np.uint32)
    values[0, 0, :7] = ties.view(np.float32)
    info = ArrayInfo("decoder", "resid_mid", "last", 1, 64)
    with StoreWriter(tmp_path, Schema((info,), dtype), {}) as writer:
        writer.append({info.key: values}, table(33))
    expected = torch.tensor(values).to(getattr(torch, dtype)).float().numpy()
    got = ActivationStore(tmp_path).read("decoder.L0.resid_mid", "last")
    np.testing.assert_array_equal(got, expected[:, 0])
    numbers = ~np.isnan(got)
    np.testing.assert_array_equal(np.signbit(got)[numbers], np.signbit(expected[:, 0])[numbers])


def test_bfloat16_keeps_every_bit_pattern(tmp_path: Path) -> None:
    values = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32).reshape(64, 1, 1024)
    info = ArrayInfo("decoder", "resid_mid", "last", 1, 1024)
    with StoreWriter(tmp_path, Schema((info,), "bfloat16"), {}) as writer:
        writer.append({info.key: values}, table(64))
    got = ActivationStore(tmp_path).read("decoder.L0.resid_mid", "last")
    np.testing.assert_array_equal(got.view(np.uint32), values[:, 0].view(np.uint32))


def test_bfloat16_nan_with_low_payload_stays_nan(tmp_path: Path) -> None:
    values = np.array([0x7F800001, 0x7FFFFFFF, 0xFF80FFFF, 0xFFFFFFFF], np.uint32).view(np.float32).reshape(1, 1, 4)
    info = ArrayInfo("decoder", "resid_mid", "last", 1, 4)
    with StoreWriter(tmp_path, Schema((info,), "bfloat16"), {}) as writer:
        writer.append({info.key: values}, table(1))
    assert np.isnan(ActivationStore(tmp_path).read("decoder.L0.resid_mid", "last")).all()


def test_the_layout_on_disk_is_the_documented_one(written_store: tuple[Path, dict]) -> None:
    path, data = written_store
    with h5py.File(path / "shard-0-00001.h5") as file:
        z = file["arrays/decoder.z/last"]
        assert z.shape == (40, 3, 8)
        assert z.chunks == (32, 1, 8)
        np.testing.assert_array_equal(z[...], data[Z][40:80])
        elements = ["/"]
        file.visit(elements.append)
        for name in elements:
            assert "encoding-type" in file[name].attrs, name
            assert "encoding-version" in file[name].attrs, name
        assert file["examples/id"].asstr()[0] == "e40"


def test_chunks_are_clipped_to_a_small_store(tmp_path: Path) -> None:
    written(tmp_path, n=5)
    with h5py.File(tmp_path / "shard-0-00000.h5") as file:
        assert file["arrays/decoder.z/last"].chunks == (5, 1, 8)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
COLUMN = TEXT.filter(bool).filter(lambda name: name.partition(":")[0] not in ("object", "attribute", "relation"))
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@st.composite
def stores(draw) -> tuple:
    n = draw(st.integers(0, 12))
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    shapes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=2))
    infos = tuple(
        ArrayInfo("decoder", c, "last", L, D) for c, (L, D) in zip(("resid_pre", "resid_post"), shapes, strict=False)
    )
    numbers = st.floats(-60000, 60000, width=32) | st.sampled_from([np.nan, np.inf, -np.inf, -0.0])
    data = {}
    for a in infos:
        size = n * a.n_layers * a.width
        flat = draw(st.lists(numbers, min_size=size, max_size=size))
        data[a.key] = np.array(flat, np.float32).reshape(n, a.n_layers, a.width)
    ids = draw(st.lists(TEXT.filter(bool), min_size=n, max_size=n, unique=True))
    columns: dict = {"id": ids, "group": draw(st.lists(TEXT, min_size=n, max_size=n))}
    for name in draw(st.lists(COLUMN.filter(lambda c: c not in columns), max_size=2, unique=True)):
        kind = (
            TEXT if name in ("question", "answer", "split", "kind", "level") else draw(st.sampled_from([TEXT, FLOATS]))
        )
        columns[name] = draw(st.lists(kind, min_size=n, max_size=n))
    for name in draw(st.lists(TEXT, max_size=2, unique=True)):
        undefined = st.none() | st.booleans() | st.sampled_from([0.0, 1.0, np.nan])
        columns[f"object:{name}"] = draw(st.lists(undefined, min_size=n, max_size=n))
    return Schema(infos, dtype), data, columns, draw(st.integers(1, 5)), draw(st.integers(1, 12))


@settings(max_examples=60, deadline=None)
@given(stores())
def test_round_trip(case: tuple) -> None:
    schema, data, columns, shard_size, batch = case
    n = len(columns["id"])
    with tempfile.TemporaryDirectory() as folder:
        with StoreWriter(folder, schema, {"ü": [1, None]}, shard_size=shard_size) as writer:
            for at in range(0, n, batch):
                rows = slice(at, at + batch)
                writer.append({k: v[rows] for k, v in data.items()}, {k: v[rows] for k, v in columns.items()})
            if n:
                assert list(writer.sealed_ids) == columns["id"][: n // shard_size * shard_size]
        assert verify(folder).ok
        with ActivationStore(folder) as store:
            assert len(store) == n
            for a in schema.arrays:
                for layer in range(a.n_layers):
                    stored = torch.tensor(data[a.key][:, layer]).to(getattr(torch, schema.dtype)).float().numpy()
                    np.testing.assert_array_equal(store.read(f"decoder.L{layer}.{a.component}", "last"), stored)
            frame = store.frame()
            assert len(frame) == n
            for name, values in columns.items() if n else ():
                got = frame[name].tolist()
                if name.startswith("object:"):
                    expected = np.array([np.nan if v is None else v for v in values], np.float32)
                    assert frame[name].dtype == np.float32
                    np.testing.assert_array_equal(frame[name].to_numpy(), expected)
                elif isinstance(values[0], str):
                    assert got == values
                else:
                    np.testing.assert_array_equal(np.array(got), np.array(values))


def test_nonfinite_and_overflow_are_counted(tmp_path: Path) -> None:
    info = ArrayInfo("decoder", "resid_post", "last", 1, 4)
    values = np.array([[[np.nan, np.inf, 1e5, -1e6]], [[0, 1, 2, 65504]]], np.float32)
    schema = Schema((info,), "float16")
    with StoreWriter(tmp_path, schema, {}) as writer:
        with pytest.raises(
            StoreError, match=r"decoder.resid_post/last has 2 values beyond the largest of float16.*'e0'.*bfloat16"
        ):
            writer.append({info.key: values}, table(2))
        writer.append({info.key: values[1:]}, table(1))  # the refused batch left nothing behind
    assert len(ActivationStore(tmp_path)) == 1
    with StoreWriter(tmp_path / "b", schema, {}, allow_overflow=True) as writer:
        writer.append({info.key: values}, table(2))
        assert writer.overflow == {"decoder.resid_post/last": 2}
    with h5py.File(tmp_path / "b" / "shard-0-00000.h5") as file:
        assert dict(file["arrays/decoder.resid_post/last"].attrs).items() >= {"overflow": 2, "nonfinite": 2}.items()
    read = ActivationStore(tmp_path / "b").read("decoder.L0.resid_post", "last")
    np.testing.assert_array_equal(read, [[np.nan, np.inf, np.inf, -np.inf], [0, 1, 2, 65504]])


def test_tensors_are_kept_beside(tmp_path: Path) -> None:
    extra = {"W_U": np.arange(6.0).reshape(2, 3), "a/b": np.array([1, 2], np.int32)}
    written(tmp_path, extra=extra)
    written(tmp_path, extra=extra)
    store = ActivationStore(tmp_path)
    assert store.tensors == ("W_U", "a/b")
    for name, values in extra.items():
        np.testing.assert_array_equal(store.tensor(name), values)
        assert store.tensor(name).dtype == values.dtype
    with pytest.raises(StoreError, match=r"no tensor 'W_E'.*W_U, a/b"):
        store.tensor("W_E")
    with pytest.raises(StoreError, match=r"field 'extra.W_U' differs"):
        written(tmp_path, extra={**extra, "W_U": np.zeros((2, 3))})


def test_layers_need_not_start_at_zero(tmp_path: Path) -> None:
    info = ArrayInfo("decoder", "cross.z", "last", 2, 4, n_heads=2, layers=(3, 8))
    values = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    with StoreWriter(tmp_path, Schema((info,)), {}) as writer:
        writer.append({info.key: values}, table(1))
    store = ActivationStore(tmp_path)
    np.testing.assert_array_equal(store.read("decoder.L8.cross.z", "last", head=1), [[6, 7]])
    with pytest.raises(SiteError, match=r"'decoder.L4.cross.z' not in store: layers 3, 8 were traced"):
        store.read("decoder.L4.cross.z", "last")


def test_unknown_names_list_the_choices(written_store: tuple[Path, dict]) -> None:
    store = ActivationStore(written_store[0])
    wrong = [
        (
            lambda: store.read("decoder.L40.z", "last"),
            r"site 'decoder.L40.z' not in store: layers 0-2 were traced; trace",
        ),
        (
            lambda: store.read("vision.L0.z", "last"),
            r"'vision.z' not in store: decoder.resid_post, decoder.z, projector",
        ),
        (
            lambda: store.read("decoder.L0.z", "image:mean"),
            r"selection 'image:mean' of site 'decoder.L0.z'.*'last' were",
        ),
        (lambda: store.read("decoder.L0.zz", "last"), "is not a site"),
        (lambda: store.read("decoder.L0.z", "first"), "unknown token selection"),
        (
            lambda: store.read("decoder.L0.z", "last", head=4),
            "head 4 of site 'decoder.L0.z' not in store: it has heads 0-3",
        ),
        (lambda: store.read("decoder.L0.z", "last", head=-1), "head -1"),
        (lambda: store.read("decoder.L0.resid_post", "image:mean", head=0), "has no heads"),
        (lambda: store.layers("vision", "z"), "were traced"),
        (lambda: store.n_heads("vision"), "were traced"),
    ]
    for call, message in wrong:
        with pytest.raises(SiteError, match=message):
            call()
    for rows, message in (
        ([3, 100], "example 100 not in store: it has 100, numbered 0 to 99"),
        (np.ones(99, bool), "mask of length 100"),
        ([0.5], "row numbers"),
    ):
        with pytest.raises(StoreError, match=message):
            store.read("decoder.L0.z", "last", examples=rows)


def test_folders_that_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        ActivationStore(tmp_path / "nothing")
    with pytest.raises(StoreError, match="the folder is empty"):
        ActivationStore(tmp_path)
    with pytest.raises(StoreError, match="neither manifest"):
        verify(tmp_path)
    plain = tmp_path / "plain.h5"
    with h5py.File(plain, "w") as file:
        file["x"] = [1, 2]
    with pytest.raises(StoreError, match="is a file"):
        ActivationStore(plain)
    with pytest.raises(StoreError, match=r"plain.h5 is HDF5 but not a shard of a store"):
        ActivationStore(tmp_path)
    plain.rename(tmp_path / "shard-0-00000.h5")
    with pytest.raises(StoreError, match="HDF5 but not part of an activation store"):
        ActivationStore(tmp_path)
    (tmp_path / "shard-0-00000.h5").write_bytes(b"text")
    with pytest.raises(StoreError, match="damaged or truncated"):
        ActivationStore(tmp_path)


def test_newer_layout_is_refused(tmp_path: Path) -> None:
    written(tmp_path, n=3)
    (tmp_path / "manifest.json").unlink()
    with h5py.File(tmp_path / "shard-0-00000.h5", "a") as file:
        file.attrs["layout-version"] = 5
    for call in (lambda: ActivationStore(tmp_path), lambda: written(tmp_path, n=3)):
        with pytest.raises(StoreError, match="layout version 5 is newer than 4"):
            call()
    manifest = {"layout-version": 7, "something": "else"}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True, indent=1).encode()).hexdigest()
    text = json.dumps({**manifest, "sha256": digest}, sort_keys=True, indent=1)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="layout version 7 is newer than 4"):
        ActivationStore(tmp_path)


def test_unfinished_store_reads_what_is_sealed(tmp_path: Path) -> None:
    data = arrays(100)
    writer = StoreWriter(tmp_path, SCHEMA, {}, shard_size=40)
    with pytest.raises(StoreError, match="no activation store"):
        ActivationStore(tmp_path)
    writer.append(data, table(100))
    assert len(writer.sealed_ids) == 80
    store = ActivationStore(tmp_path)
    assert (len(store), store.complete) == (80, False)
    assert "not complete" in repr(store)
    np.testing.assert_array_equal(store.read("decoder.L1.z", "last"), data[Z][:80, 1])
    before = store.digest
    writer.close()
    store = ActivationStore(tmp_path)
    assert (len(store), store.complete) == (100, True)
    assert store.digest != before


def test_zero_examples(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, SCHEMA, {}):
        pass
    with ActivationStore(tmp_path) as store:
        assert len(store) == 0
        assert store.complete
        assert store.read("decoder.L0.z", "last").shape == (0, 8)
        assert len(store.frame()) == 0
    assert verify(tmp_path).ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": None}, "must have the columns group"),
        ({"id": ["a", "b"]}, "differ in length"),
        ({"id": ["a", "a", "b"]}, "'a' is appended twice"),
        ({"id": ["a", "", "b"]}, "ids must be non-empty strings"),
        ({"id": [1, 2, 3]}, "'id' must hold text"),
        ({"note": ["a", 1, None]}, "'note' of the example table holds int, str"),
        ({"attribute:green": ["yes", "no", None]}, "because it is a label"),
        ({"note": ["a\0", "", ""]}, "zero character"),
        ({"note": ["\ud800", "", ""]}, "surrogate"),
        ({"": ["a", "", ""]}, "empty name"),
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, change: dict, message: str) -> None:
    columns = {k: v for k, v in {**table(3), **change}.items() if v is not None}
    with StoreWriter(tmp_path, SCHEMA, {}) as writer, pytest.raises(StoreError, match=message):
        writer.append(arrays(3), columns)


def test_batches_that_do_not_fit(tmp_path: Path) -> None:
    good = arrays(3)
    with StoreWriter(tmp_path, SCHEMA, {}) as writer:
        for bad, message in (
            ({Z: good[Z], OUT: good[OUT]}, "arrays missing: decoder.resid_post/image:mean"),
            ({**good, Z: good[Z][:2]}, r"decoder.z/last has shape \[2, 3, 8\]"),
            ({**good, Z: good[Z].astype(int)}, "int64"),
        ):
            with pytest.raises(StoreError, match=message):
                writer.append(bad, table(3))
        writer.append(good, {**table(3), "note": ["a", None, "b"]})
        more = {"id": ["x", "y", "z"], "group": ["g"] * 3}
        with pytest.raises(StoreError, match="missing: note; new: none"):
            writer.append(good, more)
        with pytest.raises(
            StoreError, match="'note' held string values in earlier batches and holds number values in this one"
        ):
            writer.append(good, {**more, "note": [1, 2, 3]})
        writer.append(good, {**more, "note": [None] * 3})
    with pytest.raises(StoreError, match="this writer is closed"):
        writer.append(good, more)
    assert ActivationStore(tmp_path).columns["note"].tolist() == ["a", "", "b", "", "", ""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stack": "encoder"}, "vision, projector or decoder"),
        ({"component": "resid"}, "component must be one of"),
        ({"tokens": "image:all"}, "use ':mean' for one vector"),
        ({"n_heads": 3}, "does not divide"),
        ({"layers": (1, 0)}, "2 different increasing"),
        ({"width": 0}, "at least 1"),
    ],
)
def test_arrays_that_cannot_be(options: dict, message: str) -> None:
    usual = {"stack": "decoder", "component": "z", "tokens": "last", "n_layers": 2, "width": 8}
    with pytest.raises(SiteError, match=message):
        ArrayInfo(**{**usual, **options})


def test_schemas_that_cannot_be() -> None:
    info = ArrayInfo("decoder", "z", "last", 2, 8)
    for build, message in (
        (lambda: Schema(()), "has no array; give at least one"),
        (lambda: Schema((info, info)), "repeated arrays: decoder.z/last"),
        (lambda: Schema((info,), "int8"), "dtype 'int8'"),
    ):
        with pytest.raises(StoreError, match=message):
            build()


def test_reading_needs_no_model_stack() -> None:
    code = (
        "import sys, activation_store as a; a.ActivationStore, a.StoreWriter, a.ConceptDirection, a.verify; "
        "import activation_store.__main__; dir(a); "
        "print([m for m in ('torch', 'transformers', 'nnsight', 'transformer_lens', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_command_line(written_store: tuple[Path, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from activation_store.__main__ import main

    path, _ = written_store
    assert main(["info", str(path)]) == 0
    output = capsys.readouterr().out
    for text in ("100 examples", "complete", "decoder.z", "projector.out", "tiny", "image:mean"):
        assert text in output
    assert main(["verify", str(path)]) == 0
    assert "every byte verified" in capsys.readouterr().out
    assert main(["info", str(tmp_path)]) == 2
    assert "the folder is empty" in capsys.readouterr().err
    written(tmp_path, n=50)
    (tmp_path / "shard-0-00001.h5").unlink()
    assert main(["verify", str(tmp_path)]) == 1
    assert "shard-0-00001.h5 is missing" in capsys.readouterr().out


def test_info_shows_markup_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from activation_store.__main__ import main

    with StoreWriter(tmp_path, SCHEMA, {"model": "[bold]x[/bold][/red]"}) as writer:
        writer.append(arrays(2), {**table(2), "note": ["[/x]", "[/x]"], "object:[red]": [True, None]})
    assert main(["info", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    for text in ("[bold]x[/bold][/red]", "[/x]", "object:[red]"):
        assert text in output
