"""Tracing every token: values equal raw hooks, and the table records their positions."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from activation_store import ActivationStore, trace, verify
from activation_store.tracing.plan import chunk_batches, make_plan
from concepts import ConceptDataset, scenes
from groundscope.core.errors import SiteError
from lvlm import Lvlm, TokenSelection, wrap_lvlm
from lvlm.tiny.architecture import build_model, build_processor
from tests.toys.examples import example
from tests.toys.families import model as toy
from tests.toys.families import raw as toy_raw
from tests.toys.tracing import COLUMNS, assert_same_bytes, has_sealed_shard, hooked, of_one_length, patches_of, raw


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return wrap_lvlm(build_model(), build_processor(), name="random")


def positions_of(spans: np.ndarray) -> list[int]:
    return [p for start, stop in spans for p in range(start, stop)]


# ---- values ------------------------------------------------------------------------------------------------------------


def test_every_token_equals_raw_hooks(model: Lvlm, tmp_path: Path) -> None:
    data = of_one_length()
    sites = ["resid_post", "z", "vision.resid_post", "projector.out"]
    tokens = ["last", "image:all", "object:all", "image:mean"]
    store = trace(model, data, sites, tokens, tmp_path, batch_size=len(data))
    batch = next(model.batches(data.examples, len(data)))
    record = raw(model, batch.inputs)
    starts = (batch.inputs["input_ids"] == model.hf.config.image_token_id).int().argmax(1).tolist()
    names = [n for n in record if n.endswith(("decoder.L3.z", "decoder.L5.resid_post", "vision.L1.resid_post", "out"))]
    names = [n for n in names if not n.endswith(("attn_out", "mlp_out"))]
    assert len(names) == 4
    for name in names:
        values = record[name].numpy()
        stack = name.partition(".")[0]
        image, thing = store.ragged(name, "image:all"), store.ragged(name, "object:all")
        for row, item in enumerate(data):
            start = {"decoder": starts[row], "vision": 1, "projector": 0}[stack]
            np.testing.assert_array_equal(image[row], values[row, start : start + COLUMNS**2], err_msg=name)
            np.testing.assert_array_equal(thing[row], values[row, [start + p for p in patches_of(item)]], err_msg=name)
            mean = store.read(name, "image:mean")[row]
            np.testing.assert_allclose(image[row].mean(0), mean, rtol=1e-5, atol=1e-5)
    lengths = store.ragged("projector.out", "object:all").lengths.tolist()
    assert 0 in lengths  # no such object: no token
    assert len(set(lengths)) > 2
    head = store.ragged("decoder.L3.z", "image:all", head=2, examples=[4, 1])
    at = slice(starts[4], starts[4] + COLUMNS**2)
    np.testing.assert_array_equal(head[0], record["decoder.L3.z"][4, at, 2 * 24 : 3 * 24].numpy())
    assert store.n_heads("decoder") == model.n_heads
    assert verify(tmp_path).ok


@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
def test_tiled_and_packed_pictures_keep_every_token(family: str, tmp_path: Path) -> None:
    lvlm = toy(family)
    data = ConceptDataset("d", (example(0), example(3, (60, 60)), example(1), example(2, (60, 180))))
    sites = ["resid_post", "vision.resid_post"]
    tokens = ["image:all", "question:all"]
    store = trace(lvlm, data, sites, tokens, tmp_path / "alone", batch_size=1, answers=False)
    batched = trace(lvlm, data, sites, tokens, tmp_path / "together", batch_size=8, answers=False)
    placeholder = lvlm.hf.config.image_token_id
    counts = []
    for row, question in enumerate(data):
        encoding = lvlm.encode(question)
        inputs = lvlm.collate([encoding])
        record = toy_raw(family, inputs)
        image_at = (inputs["input_ids"][0] == placeholder).numpy()
        counts.append(int(image_at.sum()))
        for n in range(lvlm.n_layers):
            values = record[f"decoder.L{n}.resid_post"][0].numpy()
            got = store.ragged(f"decoder.L{n}.resid_post", "image:all")[row]
            # Views follow each other in the sequence, though tiles may be named in another order than they lie.
            np.testing.assert_array_equal(got, values[list(encoding.tokens.image)])
            assert sorted(encoding.tokens.image) == np.flatnonzero(image_at).tolist()
            words = store.ragged(f"decoder.L{n}.resid_post", "question:all")[row]
            np.testing.assert_array_equal(words, values[list(encoding.tokens.question)])
        name = "vision.L1.resid_post"
        flat = record[name].reshape(-1, record[name].shape[-1]).numpy()
        at = list(encoding.tokens.positions(TokenSelection("image", "all"), "vision"))
        np.testing.assert_array_equal(store.ragged(name, "image:all")[row], flat[at])
        np.testing.assert_allclose(batched.ragged(name, "image:all")[row], flat[at], rtol=1e-5, atol=1e-5)
        assert positions_of(store.columns["span:image"][row]) == np.flatnonzero(image_at).tolist()
    assert len(set(counts)) > 1
    assert [(a.stack, a.tokens) for a in store.arrays] == [
        ("decoder", "image:all"),
        ("decoder", "question:all"),
        ("vision", "image:all"),
    ]


def test_stored_values_do_not_depend_on_batches(model: Lvlm, tmp_path: Path) -> None:
    data = scenes.dataset(n_images=10, seed=0)[::5]
    tokens = ["object:all", "question:all", "last"]
    alone = trace(model, data, ["resid_post"], tokens, tmp_path / "alone", batch_size=1)
    turned = ConceptDataset("turned", tuple(reversed(data.examples)))
    other = trace(model, turned, ["resid_post"], tokens, tmp_path / "other", batch_size=5)
    for selection in tokens[:2]:
        first, second = (s.ragged("decoder.L4.resid_post", selection) for s in (alone, other))
        assert len(set(first.lengths.tolist())) > 2
        for a, b in zip(first, reversed(list(second)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_every_token_of_an_answer(tmp_path: Path) -> None:
    lvlm = toy("llava")
    data = ConceptDataset("d", (example(0), replace(example(1), answer="a big cat", candidates=())))
    tokens = ["answer:all", "answer:0", "answer:2"]
    store = trace(lvlm, data, ["resid_post"], tokens, tmp_path, answers=False)
    site = "decoder.L2.resid_post"
    values = store.ragged(site, "answer:all")
    assert values.lengths.tolist() == [1, 3]
    np.testing.assert_array_equal([rows[0] for rows in values], store.read(site, "answer:0"))
    np.testing.assert_array_equal(values[1][2], store.read(site, "answer:2")[1])
    start = store.columns["n_tokens"].astype(int)
    assert [s.tolist() for s in store.columns["span:answer"]] == [
        [[start[0], start[0] + 1]],
        [[start[1], start[1] + 3]],
    ]
    assert "span:generated" not in store.columns


def test_every_token_of_bfloat16_is_its_own(tmp_path: Path) -> None:
    model = wrap_lvlm(build_model().bfloat16(), build_processor(), name="half")
    data = of_one_length(3)
    store = trace(model, data, ["decoder.L2.z"], ["image:all"], tmp_path, batch_size=8, dtype="bfloat16")
    batch = next(model.batches(data.examples, 8))
    values = raw(model, batch.inputs)["decoder.L2.z"].float().numpy()
    for row, encoding in enumerate(batch.encodings):
        np.testing.assert_array_equal(
            store.ragged("decoder.L2.z", "image:all")[row], values[row, list(encoding.tokens.image)]
        )


# ---- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_records_positions_of_tokens_and_objects(model: Lvlm, tmp_path: Path) -> None:
    data = scenes.dataset(n_images=10, seed=0)[::4]
    store = trace(model, data, ["decoder.L0.z"], ["last"], tmp_path, batch_size=8)
    table = store.columns
    roles = sorted(name.removeprefix("span:") for name in table if name.startswith("span:"))
    assert roles == ["bos", "image", "last", "object", "question", "system"]
    for row, item in enumerate(data):
        encoding = model.encode(item)
        for role in roles:
            selection = TokenSelection(role, None if role in {"bos", "last"} else "all")
            spans = table[f"span:{role}"][row]
            assert positions_of(spans) == sorted(encoding.tokens.positions(selection)), role
            assert all(a[1] < b[0] for a, b in pairwise(spans))
        ids = encoding.inputs["input_ids"][0]
        image = torch.nonzero(ids == model.hf.config.image_token_id).flatten().tolist()
        assert positions_of(table["span:image"][row]) == image
        at = positions_of(table["span:question"][row])
        assert "".join(model.processor.tokenizer.decode(ids[at]).split()) == "".join(item.question.split())
        boxes = [o.require_box() for o in item.objects]
        np.testing.assert_array_equal(
            np.reshape(table["boxes"][row], (-1, 4)), [[b.x0, b.y0, b.x1, b.y1] for b in boxes]
        )
        assert list(table["box_ids"][row]) == [o.id for o in item.objects]
        assert list(table["box_nouns"][row]) == [o.noun for o in item.objects]
    assert table["boxes"][0].dtype == np.float64


def test_a_picture_is_known_by_its_bytes(model: Lvlm, tmp_path: Path) -> None:
    data = scenes.dataset(n_images=10, seed=0)[:30]
    store = trace(model, data, ["decoder.L0.z"], ["last"], tmp_path, batch_size=8)
    for row, item in enumerate(data):
        pixels = np.asarray(item.image.load())
        height, width, _ = pixels.shape
        digest = hashlib.sha256(f"{width}x{height}\0".encode() + pixels.tobytes()).hexdigest()
        assert store.columns["image"][row] == digest
    assert 1 < len(set(store.columns["image"])) < len(data)


def test_a_role_that_the_decoder_lacks_has_no_column(tmp_path: Path) -> None:
    data = ConceptDataset("d", (example(0), replace(example(1), objects=(), subject=None)))
    crossed = trace(toy("mllama"), data, ["decoder.L0.resid_post"], ["last"], tmp_path, answers=False)
    assert not {"span:image", "span:object", "span:generated"} & crossed.columns.keys()
    assert positions_of(crossed.columns["span:last"][0]) == [crossed.columns["n_tokens"][0] - 1]
    assert [len(boxes) for boxes in crossed.columns["boxes"]] == [len(data[0].objects), 0]
    with pytest.raises(SiteError, match="'image:all' does not apply to the decoder"):
        trace(toy("mllama"), data, ["decoder.L0.resid_post"], ["image:all"], tmp_path / "s", answers=False)


# ---- interruption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True])
def test_a_failed_ragged_trace_resumes_to_the_same_store(model: Lvlm, tmp_path: Path, sealed: bool) -> None:
    """A trace fails at its third forward pass, or at the first one after a shard is sealed."""
    data = scenes.dataset(n_images=10, seed=0)[:60]
    selection = {"sites": ["decoder.L1.resid_post", "vision.L2.z"], "tokens": ["object:all", "image:all", "last"]}
    options = {"batch_size": 4, "shard_size": 10, "progress": False}
    whole = trace(model, data, out=tmp_path / "whole", **selection, **options)
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        if has_sealed_shard(tmp_path / "broken", len(calls)) if sealed else len(calls) == 3:
            message = "out of memory"
            raise RuntimeError(message)

    with hooked(model, fail), pytest.raises(RuntimeError, match="out of memory"):
        trace(model, data, out=tmp_path / "broken", **selection, **options)
    before = ActivationStore(tmp_path / "broken") if sealed else None
    assert before is None or 0 < len(before) < len(data)
    trace(model, data, out=tmp_path / "broken", **selection, **options)
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")
    (tmp_path / "broken" / "shard-0-00001.h5").unlink()
    resumed = trace(model, data, out=tmp_path / "broken", **selection, **options)
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")
    assert resumed.digest == whole.digest


def test_a_chunk_is_smaller_where_every_token_is_kept(model: Lvlm) -> None:
    first = model.encode(of_one_length(1).examples[0])
    few = make_plan(model, first, ["resid_post"], ["last"], "float32")
    every = make_plan(model, first, ["resid_post"], ["last", "image:all"], "float32")
    assert chunk_batches(few, first.tokens, 1000) == 8
    each = few.schema.arrays[0].n_layers * few.schema.arrays[0].width * 4
    assert chunk_batches(few, first.tokens, (512 << 20) // (3 * each)) == 3
    assert chunk_batches(few, first.tokens, 10**9) == 1
    assert chunk_batches(every, first.tokens, 32) == 8
    values = COLUMNS**2 * every.schema.arrays[0].n_layers * every.schema.arrays[0].width
    assert chunk_batches(every, first.tokens, (256 << 20) // (3 * values * 4)) == 3
    assert chunk_batches(every, first.tokens, 10**9) == 1


def test_a_forced_run_that_failed_leaves_nothing_of_the_old_store(model: Lvlm, tmp_path: Path) -> None:
    data = of_one_length()
    trace(model, data, ["z"], ["last"], tmp_path, batch_size=4)
    assert {"index.h5", "manifest.json"} <= {p.name for p in tmp_path.iterdir()}
    (tmp_path / "notes.txt").write_text("mine")
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        if len(calls) == 2:
            message = "out of memory"
            raise RuntimeError(message)

    with hooked(model, fail), pytest.raises(RuntimeError, match="out of memory"):
        trace(model, data, ["resid_post"], ["image:all"], tmp_path, batch_size=4, force=True)
    names = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert names == {"notes.txt", "tensors.h5"}
