"""Tracing: stored values are those that the model computes, whatever the batch and after any interruption."""

from __future__ import annotations

import copy
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from activation_store import ActivationStore, trace, verify
from concepts import ConceptDataset, scenes
from concepts.scenes.questions import as_example, caption
from concepts.scenes.scene import TEST, generator, sample_scene
from groundscope.core.errors import ConfigError, DataError, SiteError, StoreError
from lvlm import Lvlm, answer_key, wrap_lvlm
from lvlm.tiny.architecture import build_model, build_processor
from tests.toys.processes import run_code
from tests.toys.tracing import (
    COLUMNS,
    COMPONENTS,
    DECODER,
    LAYERS,
    VISION_LAYERS,
    assert_same_bytes,
    counted,
    has_sealed_shard,
    hooked,
    of_one_length,
    patches_of,
    raw,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return wrap_lvlm(build_model(), build_processor(), name="random")


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    return scenes.dataset(n_images=10, seed=0)


def first(data: ConceptDataset, n: int) -> ConceptDataset:
    return ConceptDataset(data.name, data.examples[:n], data.provenance)


# ---- what is stored ----------------------------------------------------------------------------------------------------


def test_every_site_equals_raw_hooks(model: Lvlm, tmp_path: Path) -> None:
    data = of_one_length()
    sites = [*COMPONENTS, *(f"vision.{c}" for c in COMPONENTS), "projector.out"]
    store = trace(model, data, sites, ["last", "image:mean", "object:mean"], tmp_path / "s", batch_size=len(data))
    batch = next(model.batches(data.examples, len(data)))
    assert batch.index == tuple(range(len(data)))
    record = raw(model, batch.inputs)
    assert len(record) == 9 * (LAYERS + VISION_LAYERS) + 1
    ids = batch.inputs["input_ids"]
    image_at = (ids == model.hf.config.image_token_id).nonzero()[:, 1].reshape(len(data), -1).numpy()
    assert image_at.shape == (len(data), COLUMNS * COLUMNS)
    assert any(not patches_of(e) for e in data)
    assert len({len(patches_of(e)) for e in data}) > 2
    for name, tensor in record.items():
        stack = name.partition(".")[0]
        values = tensor.numpy().astype(np.float64)  # [B, T, D]
        for row, example in enumerate(data):
            start = {"decoder": image_at[row, 0], "vision": 1, "projector": 0}[stack]
            image = start + np.arange(COLUMNS * COLUMNS)
            thing = start + np.array(patches_of(example), dtype=int)
            at = {"image:mean": image, "object:mean": thing}
            for tokens, positions in at.items():
                got = store.read(name, tokens)[row]
                if not len(positions):
                    assert np.isnan(got).all()
                    continue
                want = values[row, positions].mean(0)
                np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * max(1.0, np.abs(values[row]).max()))
        if stack == "decoder":
            np.testing.assert_array_equal(store.read(name, "last"), tensor[:, -1].numpy())
    head = store.read("decoder.L3.z", "last", head=5)
    np.testing.assert_array_equal(head, record["decoder.L3.z"][:, -1, 5 * 24 : 6 * 24].numpy())
    assert store.n_heads("vision") == 4
    assert verify(tmp_path / "s").ok


@pytest.mark.parametrize(("half", "step"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
def test_values_of_a_half_precision_model_are_stored_exactly(half: torch.dtype, step: float, tmp_path: Path) -> None:
    model = wrap_lvlm(build_model().to(half), build_processor(), name="half")
    data = of_one_length()
    sites = ["decoder.L2.resid_post", "decoder.L2.z"]
    store = trace(model, data, sites, ["last", "image:mean"], tmp_path, batch_size=8, dtype=str(half)[6:])
    record = raw(model, next(model.batches(data.examples, 8)).inputs)
    for site in sites:
        np.testing.assert_array_equal(store.read(site, "last"), record[site][:, -1].float().numpy())
    image = (
        record["decoder.L2.z"].float().numpy()[:, next(iter(model.batches(data.examples, 8))).encodings[0].tokens.image]
    )
    # The mean is taken in float32 and rounded once, when it is stored.
    np.testing.assert_allclose(store.read("decoder.L2.z", "image:mean"), image.mean(1), rtol=step, atol=1e-6)


def test_a_row_of_the_table_has_the_example_and_the_model_answer(
    model: Lvlm, data: ConceptDataset, tmp_path: Path
) -> None:
    store = trace(model, data, ["resid_post"], ["last"], tmp_path, batch_size=8)
    frame = store.examples
    assert list(frame["id"]) == [e.id for e in data]
    assert list(frame["group"]) == [e.group for e in data]
    assert list(frame["kind"]) == [e.kind for e in data]
    logits: dict[str, np.ndarray] = {}
    for batch in model.batches(data.examples, 8):
        for encoding, row in zip(batch.encodings, model.logits(batch.inputs), strict=True):
            logits[encoding.example.id] = row.numpy()
    for e, row in zip(data, frame.to_dict("records"), strict=True):
        thing = e.named_object()
        assert row["subject"] == (thing.noun if thing else "")
        assert row["prior_answer"] == (e.prior_answer or "")
        assert row["n_tokens"] == model.encode(e).tokens.length
        for concept in store.labels:
            label = e.labels.get(concept)
            assert np.isnan(row[concept]) if label is None else row[concept] == label
        if not e.candidates:
            assert row["model_answer"] == ""
            assert np.isnan(row["margin"])
            assert np.isnan(row["correct"])
            continue
        words = dict(zip(e.candidates, answer_key(model, e).tokens, strict=True))
        scores = {c: np.logaddexp.reduce(logits[e.id][list(ids)].astype(np.float64)) for c, ids in words.items()}
        others = max(s for c, s in scores.items() if c != e.answer)
        assert row["model_answer"] == max(scores, key=lambda c: scores[c])
        assert row["margin"] == pytest.approx(scores[e.answer] - others, abs=1e-4)
        assert row["correct"] == (row["margin"] > 0)
    assert "" in set(frame["model_answer"])


def test_the_store_contains_the_final_norm_and_the_unembedding(model: Lvlm, tmp_path: Path) -> None:
    data = of_one_length()
    store = trace(model, data, [f"decoder.L{LAYERS - 1}.resid_post"], ["last"], tmp_path, batch_size=8)
    assert store.tensors == ("final_norm.weight", "unembedding.weight")
    x = store.read(f"decoder.L{LAYERS - 1}.resid_post", "last").astype(np.float64)
    normed = x / np.sqrt((x**2).mean(1, keepdims=True) + model.hf.config.text_config.rms_norm_eps)
    logits = (normed * store.tensor("final_norm.weight")) @ store.tensor("unembedding.weight").T
    real = model.logits(next(model.batches(data.examples, 8)).inputs).numpy()
    np.testing.assert_allclose(logits, real, rtol=1e-4, atol=1e-4)


def test_a_single_layer_and_every_layer_make_one_array(model: Lvlm, tmp_path: Path) -> None:
    sites = ["decoder.L4.z", "decoder.L1.z", "decoder.L4.z", "vision.resid_post"]
    store = trace(model, of_one_length(2), sites, ["last", "image:mean", "last"], tmp_path)
    layers = {(a.stack, a.component, a.tokens): a.layers for a in store.arrays}
    assert layers == {
        ("decoder", "z", "last"): (1, 4),
        ("decoder", "z", "image:mean"): (1, 4),
        ("vision", "resid_post", "image:mean"): tuple(range(VISION_LAYERS)),
    }
    tokens = store.provenance["tokens"]
    assert tokens["last"]["stacks"] == ["decoder"]
    assert tokens["image:mean"]["stacks"] == ["decoder", "vision"]
    assert tokens["last"]["definition"]
    assert store.provenance["model"]["weights"] == model.weights_hash
    assert store.provenance["environment"]["packages"]["nnsight"]


# ---- what does not change it -------------------------------------------------------------------------------------------


def test_the_batch_an_example_is_in_does_not_change_it(model: Lvlm, data: ConceptDataset, tmp_path: Path) -> None:
    sites, tokens = ["resid_post", "z", "vision.z", "projector.out"], ["last", "image:mean", "object:mean"]
    some = ConceptDataset("some", data.examples[::3])
    turned = ConceptDataset("turned", tuple(reversed(some.examples)))
    alone = trace(model, some, sites, tokens, tmp_path / "alone", batch_size=1)
    other = trace(model, turned, sites, tokens, tmp_path / "other", batch_size=7)
    assert list(alone.columns["id"]) == list(other.columns["id"])[::-1]
    for array in alone.arrays:
        for n in array.layers:
            site = "projector.out" if array.stack == "projector" else f"{array.stack}.L{n}.{array.component}"
            a, b = alone.read(site, array.tokens), other.read(site, array.tokens)[::-1]
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=f"{site} {array.tokens}")
    np.testing.assert_allclose(alone.columns["margin"], other.columns["margin"][::-1], atol=1e-5)


def test_tracing_does_not_change_the_model(tmp_path: Path) -> None:
    model = wrap_lvlm(build_model(), build_processor(), name="random")
    data = of_one_length()
    inputs = next(model.batches(data.examples, 8)).inputs
    before = model.logits(inputs)
    parameters = {name: id(p) for name, p in model.hf.named_parameters()}
    structure = repr(model.hf)
    store = trace(model, data, ["z", "resid_post"], ["last"], tmp_path / "a", batch_size=8)
    trace(model, data, ["vision.L1.z"], ["image:mean"], tmp_path / "b", batch_size=8, answers=False)
    assert torch.equal(model.logits(inputs), before)
    assert {name: id(p) for name, p in model.hf.named_parameters()} == parameters
    assert repr(model.hf) == structure
    assert all(not m._forward_pre_hooks for m in model.hf.modules())
    margins = [answer_key(model, e).margin(row, e.answer).item() for e, row in zip(data, before, strict=True)]
    assert list(store.columns["margin"]) == margins
    with torch.no_grad():
        twin = copy.deepcopy(model.hf)
        twin.lm_head.weight.mul_(2.0)
        assert torch.equal(twin(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1], 2 * before)
    assert torch.equal(model.logits(inputs), before)


def test_without_answers_the_forward_ends_after_the_last_site(model: Lvlm, tmp_path: Path) -> None:
    data = of_one_length()
    ran: list[str] = []
    modules = {name: m for name, m in model.hf.named_modules() if name in {"lm_head", DECODER.format(3)}}
    with_answers = trace(model, data, ["decoder.L2.resid_post"], ["last"], tmp_path / "with", batch_size=8)
    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: ran.append(name)))
    try:
        without = trace(model, data, ["decoder.L2.resid_post"], ["last"], tmp_path / "no", batch_size=8, answers=False)
    finally:
        for handle in handles:
            handle.remove()
    # Once each: the forward that finds the sites is a whole one.
    assert sorted(ran) == sorted(modules)
    site = "decoder.L2.resid_post"
    np.testing.assert_array_equal(without.read(site, "last"), with_answers.read(site, "last"))
    assert set(without.columns["model_answer"]) == {""}
    assert np.isnan(without.columns["margin"]).all()


def test_captions_have_no_answer_to_record(model: Lvlm, tmp_path: Path) -> None:
    samples = [sample_scene(generator(TEST, 8, i), f"c{i}", count=2) for i in range(3)]
    data = ConceptDataset("captions", tuple(as_example(s, caption(s), "caption") for s in samples))
    store = trace(model, data, ["resid_post"], ["last"], tmp_path)
    assert set(store.columns["model_answer"]) == {""}
    assert np.isnan(store.columns["correct"]).all()


def test_two_threads_do_not_disturb_each_other(model: Lvlm, data: ConceptDataset, tmp_path: Path) -> None:
    small = first(data, 24)

    def run(name: str) -> None:
        trace(model, small, ["z", "vision.z"], ["last", "image:mean"], tmp_path / name, batch_size=4)

    run("alone")
    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_bytes(tmp_path / "alone", tmp_path / "one")
    assert_same_bytes(tmp_path / "alone", tmp_path / "two")


# ---- interruption ------------------------------------------------------------------------------------------------------

ASKED: dict[str, Any] = {"sites": ["resid_post", "vision.z"], "tokens": ["last", "object:mean"], "batch_size": 4}


@pytest.mark.parametrize(("shard_size", "sealed"), [(10, False), (10, True), (32, True)])
def test_a_failed_trace_resumes_to_the_same_store(
    model: Lvlm, data: ConceptDataset, tmp_path: Path, shard_size: int, sealed: bool
) -> None:
    """A trace fails at its second forward pass, or at the first one after a shard is sealed."""
    trace(model, data, out=tmp_path / "first", shard_size=shard_size, **ASKED)  # measures what is exact for the model
    with counted(model) as full:
        whole = trace(model, data, out=tmp_path / "whole", shard_size=shard_size, **ASKED)
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        if has_sealed_shard(tmp_path / "broken", len(calls)) if sealed else len(calls) == 2:
            message = "out of memory"
            raise RuntimeError(message)

    with hooked(model, fail), pytest.raises(RuntimeError, match="out of memory"):
        trace(model, data, out=tmp_path / "broken", shard_size=shard_size, **ASKED)
    with counted(model) as forwards:
        resumed = trace(model, data, out=tmp_path / "broken", shard_size=shard_size, **ASKED)
    assert resumed.complete
    assert resumed.digest == whole.digest
    assert_same_bytes(tmp_path / "whole", tmp_path / "broken")
    # Shards of 32 end where chunks of 8 batches do: the first is not computed again.
    assert len(forwards) < len(full) or shard_size == 10


def test_a_killed_trace_resumes_to_the_same_store(model: Lvlm, data: ConceptDataset, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    code = f"""
import os, signal, time, warnings
from pathlib import Path
from activation_store import trace
from concepts import scenes
from lvlm import wrap_lvlm
from lvlm.active_interventions import mark_observer
from lvlm.tiny.architecture import build_model, build_processor

warnings.simplefilter("error")
model = wrap_lvlm(build_model(), build_processor(), name="random")
folder = Path({str(killed)!r})
calls = []

def die(*_):
    calls.append(folder.exists())
    end = time.monotonic() + (5 if sum(calls) > 24 else 0)  # in the second chunk: the writer seals the first
    while not any(folder.glob("shard-?-?????.h5")):
        if time.monotonic() > end:
            return
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

model.hf.register_forward_pre_hook(mark_observer(die))
trace(model, scenes.dataset(n_images=10, seed=0), out=folder, shard_size=10, **{ASKED!r})
"""
    done = run_code(code, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (killed / "manifest.json").exists()
    before = ActivationStore(killed)
    assert 0 < len(before) < len(data)
    assert not before.complete
    trace(model, data, out=killed, shard_size=10, **ASKED)
    trace(model, data, out=tmp_path / "whole", shard_size=10, **ASKED)
    assert_same_bytes(tmp_path / "whole", killed)


def test_a_lost_shard_is_traced_again_and_nothing_else(model: Lvlm, data: ConceptDataset, tmp_path: Path) -> None:
    trace(model, data, out=tmp_path / "whole", shard_size=32, **ASKED)
    trace(model, data, out=tmp_path / "holed", shard_size=32, **ASKED)
    (tmp_path / "holed" / "shard-0-00001.h5").unlink()
    trace(model, data, out=tmp_path / "holed", shard_size=32, **ASKED)
    assert_same_bytes(tmp_path / "whole", tmp_path / "holed")


def test_a_finished_store_is_opened_without_work_unless_forced(
    model: Lvlm, data: ConceptDataset, tmp_path: Path
) -> None:
    small = first(data, 12)
    path = tmp_path / "s"
    trace(model, small, out=path, **ASKED)
    (path / "notes.txt").write_text("mine")
    with counted(model) as calls:
        reopened = trace(model, small, out=path, **ASKED)
    assert len(calls) == 1
    assert len(reopened) == 12
    with counted(model) as calls:
        other = trace(model, small, ["z"], ["last"], path, batch_size=4, force=True)
    assert len(calls) > 3
    assert [a.name for a in other.arrays] == ["decoder.z/last"]
    assert (path / "notes.txt").read_text() == "mine"
    assert verify(path).ok


def test_parts_make_the_store_of_one_trace(model: Lvlm, data: ConceptDataset, tmp_path: Path) -> None:
    """More parts than chunks of batches, begun in any order: some are empty, and nothing else differs."""
    options: dict[str, Any] = {"sites": ["z"], "tokens": ["last"], "batch_size": 2}
    small = first(data, 40)  # three chunks of eight batches
    whole = trace(model, small, out=tmp_path / "whole", **options)
    for worker in (3, 0, 4, 2, 1):
        parts = trace(model, small, out=tmp_path / "parts", worker=worker, workers=5, **options)
        assert parts.complete == (worker == 1)
    assert verify(tmp_path / "parts").ok
    assert list(parts.frame()["id"]) == list(whole.frame()["id"])
    for layer in range(6):
        site = f"decoder.L{layer}.z"
        np.testing.assert_array_equal(parts.read(site, "last"), whole.read(site, "last"))
    for wrong in ({"worker": 2, "workers": 2}, {"workers": 2, "force": True}):
        with pytest.raises(ConfigError, match="worker must be 0 to 1; force=True needs workers=1"):
            trace(model, small, out=tmp_path / "wrong", **options, **wrong)
    assert not (tmp_path / "wrong").exists()


# ---- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "tokens", "says"),
    [
        (["resid"], ["last"], "unknown site 'resid'.*resid_post"),
        (["decoder.L6.z"], ["last"], "decoder layers 0-5"),
        (["vision.L4.z"], ["image:mean"], "vision layers 0-3"),
        (["cross.z"], ["last"], "no cross-attention"),
        (["decoder.L3.cross.z"], ["last"], "no cross-attention"),
        ([], ["last"], "no site"),
        (["z"], [], "no token selection"),
        (["z"], ["first"], "unknown token selection 'first'"),
        (["z"], ["generated:mean"], "not available before an answer is generated"),
        (["vision.z"], ["last"], "does not apply to the vision"),
        (["z", "vision.z"], ["last"], "none of the token selections 'last' applies to the sites of the vision"),
    ],
)
def test_missing_sites_and_tokens_are_named(
    model: Lvlm, tmp_path: Path, sites: list[str], tokens: list[str], says: str
) -> None:
    with pytest.raises(SiteError, match=says):
        trace(model, of_one_length(2), sites, tokens, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_dataset_that_cannot_be_used_is_refused(model: Lvlm, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'none' has no examples"):
        trace(model, ConceptDataset("none", ()), ["z"], ["last"], tmp_path / "s")
    odd = replace(of_one_length(1).examples[0], candidates=("yes", "perhaps"), answer="yes")
    with pytest.raises(DataError, match=r"'perhaps'.*answers=False"):
        trace(model, ConceptDataset("odd", (odd,)), ["z"], ["last"], tmp_path / "s")
    assert len(trace(model, ConceptDataset("odd", (odd,)), ["z"], ["last"], tmp_path / "t", answers=False)) == 1
    assert not (tmp_path / "s").exists()


@dataclass(frozen=True)
class Broken:
    """An image file of which half is missing."""

    path: Path

    @property
    def identity(self) -> str:
        return str(self.path)

    def load(self) -> Image.Image:
        with Image.open(self.path) as image:
            return image.convert("RGB")


def test_an_image_that_cannot_be_read_is_named_before_any_forward(model: Lvlm, tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    noise = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    examples = of_one_length().examples
    bad = (*examples[:4], replace(examples[4], image=Broken(path)), examples[5])
    with counted(model) as calls, pytest.raises(DataError, match=r"Is there .*its image cannot be read.*truncated"):
        trace(model, ConceptDataset("bad", bad), ["z"], ["last"], tmp_path / "s", batch_size=1)
    assert len(calls) == 1  # the one that finds the sites
    missing = (replace(examples[0], image=Broken(tmp_path / "none.png")),)
    with pytest.raises(DataError, match=r"example .*none\.png"):
        trace(model, ConceptDataset("bad", missing), ["z"], ["last"], tmp_path / "s")


def test_a_store_of_something_else_is_refused(model: Lvlm, data: ConceptDataset, tmp_path: Path) -> None:
    small = first(data, 4)
    trace(model, small, ["z"], ["last"], tmp_path)
    files_before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(StoreError, match=r"provenance\.dataset"):
        trace(model, first(data, 5), ["z"], ["last"], tmp_path)
    with pytest.raises(StoreError, match=r"resid_post"):
        trace(model, small, ["resid_post"], ["last"], tmp_path)
    with pytest.raises(StoreError, match="dtype"):
        trace(model, small, ["z"], ["last"], tmp_path, dtype="float16")
    with pytest.raises(StoreError, match=r"provenance\.answers"):
        trace(model, small, ["z"], ["last"], tmp_path, answers=False)
    other = wrap_lvlm(build_model(seed=1), build_processor(), name="random")
    with pytest.raises(StoreError, match=r"provenance\.model\.weights"):
        trace(other, small, ["z"], ["last"], tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files_before


def test_invalid_options_are_refused(model: Lvlm, tmp_path: Path) -> None:
    data = of_one_length(2)
    with pytest.raises(ConfigError, match="batch_size=0"):
        trace(model, data, ["z"], ["last"], tmp_path / "s", batch_size=0)
    with pytest.raises(StoreError, match="shard_size=0"):
        trace(model, data, ["z"], ["last"], tmp_path / "s", shard_size=0)
    with pytest.raises(StoreError, match="float8"):
        trace(model, data, ["z"], ["last"], tmp_path / "s", dtype="float8")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(StoreError, match="file"):
        trace(model, data, ["z"], ["last"], file)
    assert file.read_text() == "mine"


def test_nothing_is_printed_where_there_is_no_terminal(
    model: Lvlm, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace(model, of_one_length(2), ["z", "vision.z"], ["last", "image:mean"], tmp_path)
    assert capfd.readouterr() == ("", "")
