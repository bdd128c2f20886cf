"""Faults that stores met in use: damage that hangs HDF5, copies, swaps, forks, few open files, other types, other folders."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from activation_store import ActivationStore, ArrayInfo, Ragged, Schema, StoreWriter, verify
from groundscope.core.errors import SiteError, StoreError

ROOT = Path(__file__).resolve().parents[2]
KEPT = Path(__file__).parents[1] / "stores"
Z = ArrayInfo("decoder", "z", "last", n_layers=2, width=4, n_heads=2)
TOKENS = ArrayInfo("vision", "resid_post", "image:all", n_layers=1, width=2, ragged=True)
SCHEMA = Schema((Z, TOKENS), "float16")
PROVENANCE = {"model": {"name": "toy", "weights": "0123456789abcdef"}, "dataset": "toys", "environment": {"numpy": "1"}}
EXTRA = {"unembedding.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


def value(i: int, layer: int, d: int) -> float:
    return (i + 10 * layer + d) / 4


def batch(numbers: list[int], shift: int = 0) -> dict:
    z = [[[value(i + shift, layer, d) for d in range(4)] for layer in range(2)] for i in numbers]
    tokens = [
        np.array([[[value(i + shift + k, 0, d) for d in range(2)]] for k in range(i % 3)], np.float32).reshape(-1, 1, 2)
        for i in numbers
    ]
    return {Z.key: np.array(z, np.float32), TOKENS.key: Ragged.of(tokens)}


def table(numbers: list[int], prefix: str = "e") -> dict:
    return {
        "id": [f"{prefix}{i}" for i in numbers],
        "group": [f"g{i // 2}" for i in numbers],
        "object:cat": [[None, True, False][i % 3] for i in numbers],
        "margin": [i / 8 for i in numbers],
    }


def write(
    path: Path, n: int = 6, *, prefix: str = "e", shift: int = 0, shard: int = 4, finish: bool = True, **options
) -> Path:
    provenance = {**PROVENANCE, **options}
    with StoreWriter(path, SCHEMA, provenance, shard_size=shard, extra=EXTRA) as writer:
        names = [i for i in range(n) if f"{prefix}{i}" not in writer.sealed_ids]
        if names:
            writer.append(batch(names, shift), table(names, prefix))
        _ = writer.sealed_ids
        if not finish:
            writer.abandon()
    return path


def rewrite_manifest(path: Path, change: Callable[[dict], None]) -> None:
    """Change a manifest as another program would that writes a digest that fits."""
    document = json.loads((path / "manifest.json").read_text())
    del document["sha256"]
    change(document)
    text = json.dumps(document, sort_keys=True, indent=1)
    document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(document, sort_keys=True, indent=1))


# ---- stores of the release before


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT / "v2-continued", tmp_path / "old"))


def check_values(store: ActivationStore, numbers: list[int]) -> None:
    expected = [[value(i, 1, d) for d in range(4)] for i in numbers]
    np.testing.assert_array_equal(store.read("decoder.L1.z", "last"), np.array(expected, np.float32))
    ragged = store.ragged("vision.L0.resid_post", "image:all")
    assert ragged.lengths.tolist() == [i % 3 for i in numbers]
    flat = [[value(i + k, 0, d) for d in range(2)] for i in numbers for k in range(i % 3)]
    np.testing.assert_array_equal(ragged.values, np.array(flat, np.float32))
    assert store.columns["margin"].tolist() == [i / 8 for i in numbers]


def test_a_store_of_version_2_is_read(old: Path) -> None:
    assert verify(old).ok
    store = ActivationStore(old)
    assert (store.complete, store.columns["id"].tolist()) == (True, [f"e{i}" for i in range(6)])
    check_values(store, list(range(6)))
    np.testing.assert_array_equal(store.tensor("unembedding.weight"), EXTRA["unembedding.weight"])


@pytest.mark.parametrize("lost", [(), ("manifest.json",), ("manifest.json", "shard-0-00001.h5"), ("shard-0-00000.h5",)])
def test_a_store_of_version_2_is_continued(old: Path, lost: tuple[str, ...]) -> None:
    for name in lost:
        (old / name).unlink()
    write(old, 11)
    assert verify(old).ok
    store = ActivationStore(old)
    order = [int(name[1:]) for name in store.columns["id"]]
    assert (store.complete, sorted(order)) == (True, list(range(11)))
    check_values(store, order)


def test_a_store_of_version_2_is_merged_with_one_of_today(old: Path, tmp_path: Path) -> None:
    from activation_store import merge

    write(tmp_path / "new", 5, prefix="n", dataset="others")
    both = merge(ActivationStore(old).merge(tmp_path / "new"), tmp_path / "both")
    assert verify(tmp_path / "both").ok
    assert both.columns["id"].tolist() == [f"e{i}" for i in range(6)] + [f"n{i}" for i in range(5)]
    check_values(both, [*range(6), *range(5)])


def test_a_changed_value_of_version_2_is_found(old: Path) -> None:
    shard = old / "shard-0-00001.h5"
    raw = bytearray(shard.read_bytes())
    raw[raw.find(np.array([value(4, 1, d) for d in range(4)], np.float16).tobytes())] ^= 1
    shard.write_bytes(raw)
    report = verify(old)
    assert [(p.file, p.kind, p.examples) for p in report.problems] == [(shard.name, "damaged", ("e4", "e5"))]


# ---- damage that hangs or crashes HDF5


@pytest.mark.parametrize("name", ["hanging", "crashing"])
def test_damage_that_ends_hdf5_is_found_and_refused(name: str) -> None:
    start = time.process_time()
    report = verify(KEPT / name)
    shards = [p for p in report.problems if p.file.startswith("shard")]
    assert [(p.file, p.kind, p.examples) for p in shards] == [("shard-0-00000.h5", "damaged", ("e0-0", "e0-1", "e0-2"))]
    assert report.rows == 3
    store = ActivationStore(KEPT / name)
    with pytest.raises(StoreError, match=r"shard-0-00000\.h5: damaged"):
        store.read("decoder.L0.z", "last")
    with pytest.raises(StoreError, match=r"shard-0-00000\.h5: damaged"):
        _ = ActivationStore(KEPT / name).digest and ActivationStore(KEPT / name).ragged(
            "decoder.L0.resid_post", "image:all"
        )
    assert time.process_time() - start < 20


def test_no_byte_of_a_damaged_shard_reaches_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write(tmp_path) / "shard-0-00000.h5"
    raw = bytearray(shard.read_bytes())
    opened: list[str] = []
    real = h5py.File.__init__

    def watched(self: h5py.File, name: object, *args: object, **options: object) -> None:
        opened.append(str(name))
        real(self, name, *args, **options)

    monkeypatch.setattr(h5py.File, "__init__", watched)
    (tmp_path / "index.h5").unlink()
    for at in range(0, 2000, 97):  # superblock, groups, headers
        shard.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        assert [p.file for p in verify(tmp_path).problems if p.kind == "damaged"] == [shard.name]
        with pytest.raises(StoreError, match="changed bytes"):
            ActivationStore(tmp_path).read("decoder.L0.z", "last")
    assert not opened


@pytest.mark.parametrize("kind", ["external storage", "external link", "soft link", "virtual"])
@pytest.mark.parametrize("version", [2, 3])
def test_nothing_outside_a_shard_is_read(tmp_path: Path, kind: str, version: int) -> None:
    from activation_store.format.seal import block_table, write_seal

    path = write(tmp_path / "store", finish=False, shard=6)
    shard = path / "shard-0-00000.h5"
    shutil.rmtree(path / ".sealed-0.jsonl", ignore_errors=True)
    (path / ".sealed-0.jsonl").unlink(missing_ok=True)
    secret = tmp_path / "secret"
    secret.write_bytes(np.arange(6, dtype="<f8").tobytes())
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["margin"] = np.arange(6.0)
    with h5py.File(shard, "a") as file:  # HDF5 cuts the seal off
        attributes = dict(file["examples/margin"].attrs)
        file.attrs["layout-version"] = version
        del file["examples/margin"]
        if kind == "external storage":
            file["examples"].create_dataset("margin", (6,), "<f8", external=[(str(secret), 0, 48)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((6,), "<f8")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "margin", (6,))
            file["examples"].create_virtual_dataset("margin", layout)
        elif kind == "external link":
            file["examples/margin"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "margin")
        else:
            file["examples/margin"] = h5py.SoftLink("/examples/object:cat")
        if kind in ("external storage", "virtual"):
            file["examples/margin"].attrs.update(attributes)
    if version == 3:
        write_seal(shard, block_table(*np.zeros((3, 0), np.int64)), 6)
    with pytest.raises(StoreError, match=r"shard-0-00000\.h5: damaged"):
        _ = ActivationStore(path).columns


# ---- copies and swaps


def test_a_copied_shard_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    shutil.copy(tmp_path / "shard-0-00000.h5", tmp_path / "shard-0-00009.h5")
    for call in (lambda: write(tmp_path), lambda: ActivationStore(tmp_path)):
        with pytest.raises(StoreError, match=r"shard-0-00009\.h5: the example 'e0' is also in shard-0-00000\.h5"):
            call()
    problems = {(p.file, p.kind) for p in verify(tmp_path).problems}
    assert ("shard-0-00009.h5", "duplicate") in problems


@pytest.mark.parametrize("finish", [True, False], ids=["finished", "unfinished"])
def test_shards_swapped_between_stores_are_refused(tmp_path: Path, *, finish: bool) -> None:
    a = write(tmp_path / "a", 8, finish=finish)
    b = write(tmp_path / "b", 8, shift=100, finish=finish)  # the same ids, model and dataset; other values
    names = [path / "shard-0-00000.h5" for path in (a, b)]
    assert names[0].stat().st_size == names[1].stat().st_size
    names[0].rename(tmp_path / "aside")
    names[1].rename(names[0])
    (tmp_path / "aside").rename(names[1])
    for path in (a, b):
        for call in (lambda path=path: write(path, 8), lambda path=path: ActivationStore(path)):
            with pytest.raises(StoreError, match=r"shard-0-00000\.h5: damaged or from another store"):
                call()
        assert {(p.file, p.kind) for p in verify(path).problems} >= {("shard-0-00000.h5", "damaged")}


def test_a_swapped_shard_of_version_2_is_refused(old: Path, tmp_path: Path) -> None:
    """Its size fits; its digest is compared by what such files have."""
    rewrite_manifest(old, lambda m: m["shards"][0].update(sha256="0" * 64))
    with pytest.raises(StoreError, match=r"shard-0-00000\.h5: damaged or from another store"):
        write(old, 11)
    with pytest.raises(StoreError, match=r"shard-0-00000\.h5: damaged or from another store"):
        ActivationStore(old).read("decoder.L0.z", "last")


# ---- the writer


@pytest.mark.parametrize("column", ["k", "lists", "object:dog"])
def test_a_value_beyond_float64_is_named_and_loses_nothing(tmp_path: Path, column: str) -> None:
    def columns(k: int) -> dict:
        values = [1, 2, 3, 10**400 if k == 1 else 4]
        return table(list(range(4 * k, 4 * k + 4))) | {column: [[v] for v in values] if column == "lists" else values}

    writer = StoreWriter(tmp_path, SCHEMA, {}, shard_size=4)
    writer.append(batch([0, 1, 2, 3]), columns(0))
    with pytest.raises(StoreError, match=column) as caught, writer:
        writer.append(batch([4, 5, 6, 7]), columns(1))
    assert "e7" in str(caught.value) or "row 3" in str(caught.value)
    assert len(ActivationStore(tmp_path)) == 4
    StoreWriter(tmp_path, SCHEMA, {}).close()  # the lock is released


@pytest.mark.parametrize("other", [None, 0.5, 2**70])
def test_an_integer_that_float64_rounds_is_refused_next_to_what_makes_it_float64(tmp_path: Path, other: object) -> None:
    wide = 2**53 + 1
    for first, second in (([1, wide], [other, 1]), ([other, 1], [1, wide]), ([1, 1], [wide, other])):
        with StoreWriter(tmp_path, SCHEMA, {}) as writer:
            writer.append(batch([0, 1]), table([0, 1]) | {"k": first})
            with pytest.raises(StoreError, match=r"column 'k' holds integers beyond 2\*\*53"):
                writer.append(batch([2, 3]), table([2, 3]) | {"k": second})
            writer.abandon()
    with StoreWriter(tmp_path, SCHEMA, {}) as writer:
        writer.append(batch([0, 1]), table([0, 1]) | {"k": [wide, -wide], "m": [None, 2**53]})
    assert ActivationStore(tmp_path).columns["k"].tolist() == [wide, -wide]
    assert ActivationStore(tmp_path).columns["m"][1] == 2**53


def test_an_unexpected_error_ends_the_writer_and_keeps_whole_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from activation_store.writing import shard_writer

    real = shard_writer.finish_shard
    calls: list[int] = []

    def failing(*args: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        real(*args)

    monkeypatch.setattr(shard_writer, "finish_shard", failing)
    writer = StoreWriter(tmp_path, SCHEMA, {}, shard_size=2)
    writer.append(batch(list(range(4))), table(list(range(4))))
    with pytest.raises(ZeroDivisionError):
        writer.close()
    with pytest.raises(StoreError, match="this writer is closed"):
        writer.append(batch([8]), table([8]))
    assert len(ActivationStore(tmp_path)) == 2
    assert not list(tmp_path.glob("*.part"))
    StoreWriter(tmp_path, SCHEMA, {}).abandon()


FORK = """
import os, sys, time
import tests.activation_store.test_faults as t
with t.StoreWriter({path!r}, t.SCHEMA, t.PROVENANCE, shard_size=4) as writer:
    writer.append(t.batch([0, 1]), t.table([0, 1]))
    children = []
    for how in range(12):
        writer.append(t.batch([2 + how]), t.table([2 + how]))
        child = os.fork()
        if child == 0:
            if how % 3 == 0:
                try:
                    writer.append(t.batch([90]), t.table([90]))
                except t.StoreError as error:
                    assert "fork" in str(error)
            if how % 3 == 1:
                len(t.ActivationStore({other!r}).columns)  # HDF5 works in the child
            sys.exit(0)  # through the writer's own exit, and that of the interpreter
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
print(len(t.ActivationStore({path!r})))
"""


def test_the_child_of_a_fork_leaves_the_writer_alone(tmp_path: Path) -> None:
    other = write(tmp_path / "other")
    code = FORK.format(path=str(tmp_path / "store"), other=str(other))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=60,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["14"]), done.stderr
    assert done.stderr == ""
    assert verify(tmp_path / "store").ok


# ---- errors of the system


def run_with_open_files(path: Path, most: int, what: str) -> str:
    """Run in a separate process: this one has other files open."""
    code = textwrap.dedent("""
        import resource, sys
        import numpy as np
        from activation_store import ActivationStore, verify
        store = ActivationStore(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            print(eval(sys.argv[3]))
        except ValueError as error:
            print(type(error).__name__, error)
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(most), what], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_forty_open_files_are_enough(tmp_path: Path) -> None:
    write(tmp_path, 120, shard=2)
    (tmp_path / "index.h5").unlink()  # so that the table is read from the shards as well
    what = "len(store.frame()), float(store.read('decoder.L1.z', 'last').sum()), [p.file for p in verify(sys.argv[1]).problems]"
    total = sum(value(i, 1, d) for i in range(120) for d in range(4))
    assert run_with_open_files(tmp_path, 40, what) == f"(120, {total}, ['index.h5'])\n"


def test_too_many_open_files_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    real = os.open

    def full(path: object, *args: object, **options: object) -> int:
        if str(path).endswith("shard-0-00001.h5"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return real(path, *args, **options)  # type: ignore[arg-type]

    store = ActivationStore(tmp_path)
    monkeypatch.setattr(os, "open", full)
    for call in (
        lambda: store.read("decoder.L0.z", "last"),
        lambda: verify(tmp_path),
        lambda: ActivationStore(tmp_path),
    ):
        with pytest.raises(StoreError, match="Too many open files") as caught:
            call()
        assert "damaged" not in str(caught.value)
        assert "delete" not in str(caught.value)


def test_no_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    store = ActivationStore(tmp_path)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("activation_store.reading.folder.ArrayReader", full)
    with pytest.raises(StoreError, match="not enough memory") as caught:
        store.read("decoder.L0.z", "last")
    assert "delete" not in str(caught.value)


def test_a_relative_path_is_read_after_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    store = ActivationStore("store")
    writer = StoreWriter("other", SCHEMA, PROVENANCE)
    monkeypatch.chdir("/")
    check_values(store, list(range(6)))
    writer.append(batch([0]), table([0]))
    writer.close()
    assert len(ActivationStore(tmp_path / "other")) == 1


@pytest.mark.parametrize("name", ["shard-0-00000.h5", "manifest.json", "tensors.h5"])
def test_a_fifo_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)

    def read() -> None:
        store = ActivationStore(tmp_path)
        store.read("decoder.L0.z", "last")
        store.tensor("unembedding.weight")

    with pytest.raises(StoreError, match=r"not a regular file but a FIFO|damaged, \d+ bytes"):
        read()


# ---- fields


def test_fields_of_a_newer_manifest_are_ignored(tmp_path: Path) -> None:
    def newer(manifest: dict) -> None:
        manifest["novelty"] = {"a": 1}
        manifest["schema"]["novelty"] = 1
        manifest["schema"]["arrays"][0]["novelty"] = 1
        for part in (*manifest["shards"], manifest["index"], manifest["tensors"]):
            part["novelty"] = [1]

    rewrite_manifest(write(tmp_path), newer)
    check_values(ActivationStore(tmp_path), list(range(6)))
    assert verify(tmp_path).ok


def places(document: object, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield (*path, key)
            yield from places(document[key], (*path, key))  # type: ignore[index]


def test_every_field_of_a_manifest_may_be_of_another_type(tmp_path: Path) -> None:
    write(tmp_path)
    whole = (tmp_path / "manifest.json").read_bytes()
    for path in list(places(json.loads(whole))):
        if path[0] in ("provenance", "sha256"):
            continue
        for wrong in (None, "x", -1, [[]], {"x": 1}, 1e300, True):

            def change(manifest: dict, path: tuple = path, wrong: object = wrong) -> None:
                for key in path[:-1]:
                    manifest = manifest[key]
                manifest[path[-1]] = wrong

            rewrite_manifest(tmp_path, change)
            try:
                store = ActivationStore(tmp_path)
                check_values(store, list(range(6)))
                _ = store.tensors, verify(tmp_path)
            except (StoreError, SiteError):
                continue
            except AssertionError:
                assert path[-1] in ("dtype", "compression") or "schema" in path, path
            finally:
                (tmp_path / "manifest.json").write_bytes(whole)


ELEMENTS = ("schema", "provenance", "examples/id", "examples/margin", "arrays/decoder.z/last", "digests/decoder.z/last")


@pytest.mark.parametrize("element", ELEMENTS)
def test_an_element_of_a_shard_may_be_of_another_type(tmp_path: Path, element: str) -> None:
    """The seal fits, as in a file that another program wrote; no manifest lists the shard."""
    from activation_store.format.seal import block_table, write_seal

    write(tmp_path, 4, finish=False)
    shard = tmp_path / "shard-0-00000.h5"
    (tmp_path / ".sealed-0.jsonl").unlink()
    whole = shard.read_bytes()
    for wrong in (np.float64(1), np.arange(4), np.array(["a", "b"], dtype=object), np.zeros((2, 2, 2, 2)), None):
        with h5py.File(shard, "a") as file:
            attributes = dict(file[element].attrs)
            del file[element]
            if wrong is None:
                file.create_group(element)
            elif wrong.dtype == object:
                file.create_dataset(element, data=wrong, dtype=h5py.string_dtype())
            else:
                file[element] = wrong
            file[element].attrs.update(attributes)
        write_seal(shard, block_table(*np.zeros((3, 0), np.int64)), 4)

        def read() -> None:
            store = ActivationStore(tmp_path)
            _ = store.columns, store.read("decoder.L0.z", "last"), store.digest

        possible = element == "examples/margin" and wrong is not None and wrong.shape == (4,)
        if not element.startswith("digests") and not possible:
            with pytest.raises(StoreError, match=r"shard-0-00000\.h5|no activation store|schema"):
                read()
        shard.write_bytes(whole)


@pytest.mark.parametrize("name", ["encoding-type", "layout-version", "rows", "position", "layers", "sha256"])
def test_an_attribute_of_a_shard_may_be_of_another_type(tmp_path: Path, name: str) -> None:
    from activation_store.format.seal import block_table, write_seal

    write(tmp_path, 4, finish=False)
    shard = tmp_path / "shard-0-00000.h5"
    (tmp_path / ".sealed-0.jsonl").unlink()
    whole = shard.read_bytes()
    for wrong in (np.zeros(3), "x", 1e300, -1, np.nan):
        with h5py.File(shard, "a") as file:
            at = {"position": "examples/margin", "layers": "arrays/decoder.z/last", "sha256": "arrays/decoder.z/last"}
            file[at.get(name, "/")].attrs[name] = wrong
        write_seal(shard, block_table(*np.zeros((3, 0), np.int64)), 4)
        try:
            store = ActivationStore(tmp_path)
            check_values(store, list(range(4)))
            _ = store.digest, verify(tmp_path)
        except StoreError:
            pass
        shard.write_bytes(whole)


# ---- many shards


def test_the_table_of_a_finished_store_needs_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 30, shard=2)
    by_shard = ActivationStore(tmp_path)
    index = (tmp_path / "index.h5").read_bytes()
    (tmp_path / "index.h5").unlink()
    expected = by_shard.frame()
    (tmp_path / "index.h5").write_bytes(index)

    def refuse(*_: object, **__: object) -> None:
        msg = "a shard was opened"
        raise AssertionError(msg)

    monkeypatch.setattr("activation_store.reading.store.OpenShard", refuse)
    assert ActivationStore(tmp_path).frame().equals(expected)
    monkeypatch.setattr("activation_store.writing.writer.open_shard", refuse)
    monkeypatch.setattr("activation_store.writing.virtual_index.open_shard", refuse)
    write(tmp_path, 30, shard=2)  # nor does a run that finds it finished
    (tmp_path / "index.h5").write_bytes(index[:-1] + b"?")
    monkeypatch.undo()
    assert ActivationStore(tmp_path).frame().equals(expected)


def test_text_columns_are_no_labels(tmp_path: Path) -> None:
    with ActivationStore(write(tmp_path)) as store, pytest.raises(StoreError, match="'question' holds text"):
        store.torch("decoder.L0.z", "last", ["question"])


def test_a_shard_that_is_a_link_to_itself_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path)
    shard = tmp_path / "shard-0-00000.h5"
    shard.unlink()
    shard.symlink_to(shard.name)
    for use in (lambda: ActivationStore(tmp_path), lambda: write(tmp_path)):
        with pytest.raises(StoreError, match="cannot be read"):
            use()
