"""Stores written by every version of the layout open today, with the values of their formula."""

from __future__ import annotations

import hashlib
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from activation_store import ActivationStore, StoreWriter, repack, verify
from activation_store.__main__ import main

KEPT = Path(__file__).parents[1] / "stores"
SITES = {"decoder.L1.z": (0, 6), "decoder.L4.z": (1, 6), "decoder.L2.resid_post": (2, 4), "projector.out": (0, 5)}


def value(i: int, layer: int, d: int) -> float:
    return ((i * 7 + layer * 3 + d) % 64 - 32) / 4


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("repacked", [False, True], ids=["as-kept", "repacked"])
def test_kept_store_reads_as_on_its_day(version: str, tmp_path: Path, *, repacked: bool) -> None:
    path = KEPT / version
    if repacked:
        repack(ActivationStore(path), tmp_path / "out")
        path = tmp_path / "out"
    assert verify(path).ok
    with ActivationStore(path) as store:
        assert (len(store), store.complete, store.dtype, store.tensors) == (
            50,
            True,
            "bfloat16",
            ("unembedding.weight",),
        )
        np.testing.assert_array_equal(store.tensor("unembedding.weight"), np.arange(8, dtype=np.float32).reshape(2, 4))
        for site, (at, width) in SITES.items():
            tokens = "last" if site.endswith("z") else "image:mean"
            expected = np.array([[value(i, at, d) for d in range(width)] for i in range(50)])
            if tokens == "image:mean":
                expected[::9] = np.nan
            np.testing.assert_array_equal(store.read(site, tokens), expected)
            np.testing.assert_array_equal(store.read(site, tokens, examples=[49, 3, 44]), expected[[49, 3, 44]])
        frame = store.frame()
        assert frame["id"].tolist() == [f"e{i}" for i in range(50)]
        assert frame["question"][7] == "Is the äpple n° 7 green? 苹果"
        labels = [np.nan if i % 3 == 0 else float(i % 2) for i in range(50)]
        np.testing.assert_array_equal(frame["attribute:green"], labels)
        assert frame["margin"].tolist() == [i / 8 for i in range(50)]
        assert frame["n_tokens"].tolist() == [i + 10 for i in range(50)]
        assert frame["prior_answer"].tolist() == ["" if i % 4 else "red" for i in range(50)]
        if version == "v1":
            return
        ragged = store.ragged("vision.L1.resid_post", "image:all")
        assert ragged.lengths.tolist() == [i % 4 for i in range(50)]
        for i, tokens in enumerate(ragged):
            expected = np.array([[value(i + t, 1, d) for d in range(3)] for t in range(i % 4)]).reshape(-1, 3)
            np.testing.assert_array_equal(tokens, expected)
        for i in range(50):
            assert frame["boxes"][i].tolist() == [[i, 0.5, i + k, 9] for k in range(i % 3)]
            assert frame["box_nouns"][i] == ("äpple", "box")[: i % 3]
            assert frame["span:image"][i].tolist() == ([[1, 1 + i % 4]] if i % 4 else [])


def test_store_of_version_1_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(KEPT / "v1", path)
    (path / "shard-0-00001.h5").unlink()
    old = ActivationStore(KEPT / "v1")
    rows = slice(40, 45)
    arrays = {
        a.key: np.stack(
            [
                old.read("projector.out" if a.stack == "projector" else f"{a.stack}.L{n}.{a.component}", a.tokens)[rows]
                for n in a.layers
            ],
            axis=1,
        )
        for a in old.arrays
    }
    table = {name: list(values[rows]) for name, values in old.columns.items()}
    with StoreWriter(path, old.schema, dict(old.provenance), worker=0, workers=2, shard_size=40) as writer:
        assert len(writer.sealed_ids) == 45
        writer.append(arrays, table)
    assert verify(path).ok
    new = ActivationStore(path)
    assert new.complete
    for site in SITES:
        tokens = "last" if site.endswith("z") else "image:mean"
        np.testing.assert_array_equal(new.read(site, tokens), old.read(site, tokens))
    for name, values in old.columns.items():
        np.testing.assert_array_equal(new.columns[name], values)


def test_digests_are_what_the_layout_says() -> None:
    path = KEPT / "v2"
    shard = path / "shard-0-00000.h5"
    raw = bytearray(shard.read_bytes())
    with h5py.File(shard) as file:
        tables = {
            "decoder.z/last": file["arrays/decoder.z/last"],
            "vision.resid_post/image:all": file["arrays/vision.resid_post/image:all/values"],
        }
        for name, values in tables.items():
            stated = file[f"digests/{name}"][...]
            for block, layer in np.ndindex(stated.shape):
                chunk = values.id.get_chunk_info_by_coord((block * 32, layer, 0))
                assert zlib.crc32(raw[chunk.byte_offset : chunk.byte_offset + chunk.size]) == stated[block, layer]
        outside = np.ones(len(raw), bool)
        for name in ("decoder.z/last", "decoder.resid_post/image:mean", "projector.out/image:mean"):
            for k in range(file[f"arrays/{name}"].id.get_num_chunks()):
                chunk = file[f"arrays/{name}"].id.get_chunk_info(k)
                outside[chunk.byte_offset : chunk.byte_offset + chunk.size] = False
        values = tables["vision.resid_post/image:all"]
        for k in range(values.id.get_num_chunks()):
            chunk = values.id.get_chunk_info(k)
            outside[chunk.byte_offset : chunk.byte_offset + chunk.size] = False
    digest = hashlib.sha256(np.frombuffer(bytes(raw), np.uint8)[outside].tobytes()).hexdigest()
    assert digest in (path / "manifest.json").read_text()


def test_index_is_the_whole_store_for_any_hdf5_reader() -> None:
    store = ActivationStore(KEPT / "v2")
    with h5py.File(KEPT / "v2" / "index.h5") as file:
        z = file["arrays/decoder.z/last"]
        assert (z.is_virtual, z.shape) == (True, (50, 2, 6))
        for at, layer in enumerate((1, 4)):
            bits = np.asarray(z[:, at], np.uint32) << 16
            np.testing.assert_array_equal(bits.view(np.float32), store.read(f"decoder.L{layer}.z", "last"))
        ragged = file["arrays/vision.resid_post/image:all"]
        expected = store.ragged("vision.L1.resid_post", "image:all")
        np.testing.assert_array_equal(ragged["offsets"][...], expected.offsets)
        bits = np.asarray(ragged["values"][:, 1], np.uint32) << 16
        np.testing.assert_array_equal(bits.view(np.float32), expected.values)
        assert file["examples/id"].asstr()[...].tolist() == store.columns["id"].tolist()
        np.testing.assert_array_equal(file["examples/attribute:green"][...], store.columns["attribute:green"])


def test_info_names_arrays_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(KEPT / "v2")]) == 0
    output = capsys.readouterr().out
    for row in (
        "decoder.resid_post  image:mean  [50, 3, 4]  0-2 ",
        "decoder.z           last        [50, 2, 6]  1, 4 ",
    ):
        assert row in output, output
