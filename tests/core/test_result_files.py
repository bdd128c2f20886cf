"""Files of results: a changed byte is an error, a FIFO is refused, and an error of the system is not called damage."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from activation_store import ConceptDirection
from behavior import BehaviorResult
from circuits import HeadScores
from circuits.results.graph import Graph
from circuits.results.patch_scores import PatchScores
from diagnosis.results import Diagnoses
from groundscope.core.document_digest import document_digest, take_digest
from groundscope.core.errors import DataError, GroundscopeError, StoreError
from groundscope.core.tensor_files import encode_tensors, read_tensors
from lvlm.sites import Head
from mitigation import SteeringVector
from mitigation.steering.changes import AddChange
from probes import ProbeGrid
from probes.analysis.logit_lens import read_vocabulary
from probes.protocol.checkpoint import Checkpoint

READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensors": (read_tensors, "x"),
    "head scores": (HeadScores.load, "x"),
    "patch scores": (PatchScores.load, "x"),
    "steering vector": (SteeringVector.load, "x"),
    "direction": (ConceptDirection.load, "x"),
    "graph": (Graph.load, "x"),
    "diagnoses": (Diagnoses.load, "x"),
    "answers": (BehaviorResult.load, "x"),
    "grid": (lambda path: ProbeGrid.load(path.parent), "grid.json"),
    "checkpoint": (lambda path: Checkpoint.at(path.parent, {}), "checkpoint.json"),
    "vocabulary": (lambda path: read_vocabulary(path.parent / "s"), "s.vocabulary.json"),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("what", ["fifo", "folder", "too many open files"])
def test_files_that_are_not_regular_are_refused(
    kind: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, name = READERS[kind]
    path = tmp_path / name
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"{}")
        real = os.open

        def full(at: object, *args: object, **options: object) -> int:
            if str(at) == str(path):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
            return real(at, *args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", full)
    with pytest.raises((GroundscopeError, OSError)) as caught:
        read(path)
    if kind != "tensors":
        assert isinstance(caught.value, GroundscopeError)
    text = str(caught.value)
    reasons = {
        "fifo": "not a regular file but a FIFO",
        "folder": "not a regular file",
        "too many open files": "Too many open files",
    }
    assert reasons[what] in text
    assert "damaged" not in text
    assert "anew" not in text


def test_a_checkpoint_that_cannot_be_opened_is_no_unfinished_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.at(tmp_path, {"a": 1})
    checkpoint.save(3, {"x": np.arange(4.0)})
    np.testing.assert_array_equal((checkpoint.load(3) or {})["x"], np.arange(4.0))
    real = os.open

    def full(at: object, *args: object, **options: object) -> int:
        if str(at).endswith("layer-3.safetensors"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(at))
        return real(at, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(GroundscopeError, match="Too many open files"):
        checkpoint.load(3)
    monkeypatch.undo()
    raw = bytearray((tmp_path / "layer-3.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "layer-3.safetensors").write_bytes(raw)
    assert checkpoint.load(3) is None


def test_every_changed_byte_of_tensors_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": np.arange(5, dtype=np.float32), "b": np.ones((2, 3), np.float16), "c": np.zeros((0, 2))}
    whole = encode_tensors(tensors, {"kind": '{"x": 1.5}'})
    path.write_bytes(whole)
    loaded, metadata = read_tensors(path)
    assert metadata == {"kind": '{"x": 1.5}'}
    assert all(
        np.array_equal(loaded[name], values) and loaded[name].dtype == values.dtype for name, values in tensors.items()
    )
    assert set(load_file(path)) == set(tensors)  # any other reader reads it as well
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x04]) + whole[at + 1 :])
        try:
            loaded, metadata = read_tensors(path)
        except DataError:
            continue
        # What is left are blanks of the header, and the name of the digest's own entry.
        assert all(np.array_equal(loaded[name], values) for name, values in tensors.items())
        assert metadata["kind"] == '{"x": 1.5}'


def test_tensors_of_an_earlier_release_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(3.0)}, path, metadata={"kind": "{}"})
    loaded, metadata = read_tensors(path)
    assert (loaded["a"].tolist(), metadata) == ([0.0, 1.0, 2.0], {"kind": "{}"})


def test_a_document_has_one_digest_however_it_is_written() -> None:
    document = {"b": (1, 2.5), "a": {"x": None}}
    digest = document_digest(document)
    assert document_digest(json.loads(json.dumps({"a": {"x": None}, "b": [1, 2.5], "digest": digest}))) == digest
    changed = {"b": [1, 2.5000000000000004], "a": {"x": None}, "digest": digest}
    with pytest.raises(StoreError, match="digest"):
        take_digest(changed, "file", StoreError, required=False)
    with pytest.raises(StoreError, match="digest"):
        take_digest({"b": 1}, "file", StoreError, required=True)
    take_digest({"b": 1}, "file", StoreError, required=False)


def unit(size: int) -> np.ndarray:
    return np.eye(size, dtype=np.float32)[0]


def test_a_changed_number_of_a_vector_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    entries = {Head(1, 2): AddChange(unit(8), 0.5), 1: AddChange(unit(16), 1.5)}
    SteeringVector(entries, "last+generated", 2.0, "toy", "c" * 64).save(path)
    whole = path.read_bytes()
    for text, other in ((b'\\"sigma\\": 0.5', b'\\"sigma\\": 0.7'), (b"strength", b"strengtg")):
        assert text in whole
        path.write_bytes(whole.replace(text, other))
        with pytest.raises(StoreError, match="damaged"):
            SteeringVector.load(path)
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 0x20]) + whole[-1:])
    with pytest.raises(StoreError, match="digest"):
        SteeringVector.load(path)


def test_a_seeded_sample_of_mutations_is_found() -> None:
    """The harness itself runs them all: benchmarks/mutations.py."""
    from benchmarks.mutations import mutate_all

    results = mutate_all({"store": 30, "grid": 8, "scores": 8, "vector": 8, "receipt": 8}, seed=1)
    for kind, mutations in results.items():
        assert {mutation["result"] for mutation in mutations} <= {"found", "harmless", "unverified_read"}, (
            kind,
            mutations,
        )
    assert len(results["store"]) == 30


def test_mutations_differ_and_repeat() -> None:
    from benchmarks.mutations import WAYS, mutate

    data = bytes(range(256)) * 4
    ways = set()
    for seed in range(100):
        way, changed = mutate(data, random.Random(seed))
        assert changed != data
        assert (way, changed) == mutate(data, random.Random(seed))
        ways.add(way)
    assert ways == set(WAYS)


def test_equal_content_gives_equal_bytes() -> None:
    tensors = {"b": np.arange(3.0), "a": np.ones((2, 5), np.float32)}
    files = {encode_tensors(tensors, {"card": "é", "kind": "x", "more": "1", "another": "2"}) for _ in range(50)}
    assert len(files) == 1
