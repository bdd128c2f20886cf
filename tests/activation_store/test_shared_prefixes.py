"""Tracing several questions about one image: its prefix runs once, and every stored value is that of the question alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activation_store import ActivationStore, LensRank, trace
from circuits import Intervention, Zero, intervened
from concepts.schema import ConceptDataset, Example
from lvlm import Lvlm, Site, load_lvlm
from lvlm.prefix_sharing import unshared_because
from tests.toys.examples import example
from tests.toys.families import BUILDERS, model

EXCLUDED = {"paligemma", "paligemma2", "gemma3", "mllama", "blip2_opt", "blip2_llama", "instructblip_llama"}
EXCLUDED |= {"instructblip_t5", "florence2", "kosmos2", "llama4"}
SHARING = [family for family in BUILDERS if family not in EXCLUDED]
QUESTIONS = ("Is there a dog?", "Is there a cat in the image? Is there a dog?", "Is there a car?")
SITES = ("resid_post", "z", "k", "mlp_out", "vision.resid_post", "projector.out")
TOKENS = ("last", "image:mean", "object:mean", "question:all", "image:all", "suffix:mean", "all:mean", "positions:20,3")


def questions() -> ConceptDataset:
    """Three questions about each of two images in alternation, and one about another image."""
    pairs = [(example(number), text) for text in QUESTIONS for number in (0, 1)] + [(example(2), QUESTIONS[0])]
    options: dict[str, Any] = {"answer": "yes", "candidates": ("yes", "no")}
    rows = [replace(e, id=f"q{i}", question=text, **options) for i, (e, text) in enumerate(pairs)]
    rows[2] = replace(rows[2], subject=None)
    return ConceptDataset("shared", tuple(rows))


def values_of(store: ActivationStore) -> dict[str, list[np.ndarray]]:
    """Every stored array by name and layer, one array for each example."""
    values: dict[str, list[np.ndarray]] = {}
    for array in store.arrays:
        for layer in array.layers:
            site = f"{array.stack}.{array.component}" if array.stack == "projector" else ""
            site = site or f"{array.stack}.L{layer}.{array.component}"
            read = store.ragged if array.ragged else store.read
            options = {"reduction": array.reduction} if array.reduction else {}
            values[f"{site} {array.tokens} {array.reduction}"] = list(read(site, array.tokens, **options))
    return values


def alone(
    lvlm: Lvlm, data: Sequence[Example], folder: Path, sites: Sequence[str], tokens: Sequence[str], **more: Any
) -> list[ActivationStore]:
    """One store for each example: no two share a prefix."""
    return [
        trace(lvlm, ConceptDataset("one", (e,)), sites, tokens, folder / e.id, unembedding=False, **more) for e in data
    ]


def assert_equal(store: ActivationStore, stores: Sequence[ActivationStore], atol: float) -> None:
    """Compare with the rows of other stores, in their order."""
    expected = [values_of(other) for other in stores]
    for name, rows in values_of(store).items():
        others = [row for values in expected for row in values[name]]
        assert len(rows) == len(others)
        for got, want in zip(rows, others, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=atol, err_msg=name)
    table, tables = store.examples, [other.examples for other in stores]
    for name in table:
        column = [value for other in tables for value in other[name]]
        if name == "margin":
            np.testing.assert_allclose(list(table[name]), column, rtol=0, atol=1e-4)
        else:
            assert list(map(str, table[name])) == list(map(str, column)), name


@contextmanager
def tokens_of(lvlm: Lvlm, site: str) -> Iterator[list[int]]:
    counts: list[int] = []
    handle = lvlm.locate(site).watch(lambda x: counts.append(x.shape[0] * x.shape[1]))
    try:
        yield counts
    finally:
        handle.remove()


@pytest.mark.parametrize("family", SHARING)
def test_values_are_those_of_each_question_alone(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm, data = model(family), questions()
    encoding = lvlm.encode(data[0])
    tokens = [t for t in TOKENS if t != "object:mean" or encoding.tokens.views["decoder"][0].grid is not None]
    sites = [s for s in SITES if "." not in s or s.split(".")[0] in encoding.tokens.views]
    store = trace(lvlm, data, sites, tokens, tmp_path / "all", unembedding=False)
    assert store.provenance["environment"]["prefixes"] == "shared"
    # One store of whole prompts, one prompt in each forward pass: a store for each question would cost seconds.
    monkeypatch.setattr("activation_store.tracing.tracer.shares_prefixes", lambda *_: False)
    whole = trace(lvlm, data, sites, tokens, tmp_path / "whole", batch_size=1, unembedding=False)
    assert whole.provenance["environment"].get("prefixes") != "shared"
    assert_equal(store, [whole], atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_prefixes_run_once_and_rows_are_in_order(batch_size: int, tmp_path: Path) -> None:
    lvlm, data = load_lvlm("tiny"), questions()
    image = len(lvlm.encode(data[0]).tokens.image)
    options = (["resid_post", "projector.out"], ["last", "image:mean"])
    assert unshared_because(lvlm) == ""  # measured before tokens are counted
    with tokens_of(lvlm, "decoder.L0.resid_post") as counts, tokens_of(lvlm, "projector.out") as pictures:
        store = trace(lvlm, data, *options, tmp_path / "all", batch_size=batch_size, unembedding=False)
    assert_equal(store, alone(lvlm, data.examples, tmp_path, *options), atol=1e-5)
    # The first example runs once more, to make the plan; a group that a batch divides runs its prefix for each part.
    parts = {1: 6, 2: 4, 5: 2}[batch_size] + 2
    assert sum(pictures) == parts * image
    whole = sum(lvlm.encode(e).tokens.length for e in data)
    assert batch_size < 5 or sum(counts) < whole * 0.85


@pytest.mark.parametrize("generate", [0, 3])
def test_tokens_of_answers_follow_each_question(generate: int, tmp_path: Path) -> None:
    lvlm, data = load_lvlm("tiny"), questions()
    tokens = ["generated:mean", "generated:0", "last"] if generate else ["answer:mean", "answer:0", "last"]
    store = trace(lvlm, data, ["resid_post"], tokens, tmp_path / "all", generate=generate, unembedding=False)
    assert store.provenance["environment"]["prefixes"] == "shared"
    expected = alone(lvlm, data.examples, tmp_path, ["resid_post"], tokens, generate=generate)
    assert_equal(store, expected, atol=2e-5)


def test_reductions_and_heads_are_those_of_each_question(tmp_path: Path) -> None:
    lvlm, data = load_lvlm("tiny"), questions()
    more = {"heads": [1, 5], "reduce": {"image:all": LensRank(["apple"]), "suffix:all": LensRank(["dog"])}}
    options = (["resid_post", "z"], ["last"])
    store = trace(lvlm, data, *options, tmp_path / "all", answers=False, unembedding=False, **more)
    assert_equal(store, alone(lvlm, data.examples, tmp_path, *options, answers=False, **more), atol=1e-5)


def test_early_sites_stop_both_passes(tmp_path: Path) -> None:
    lvlm, data = load_lvlm("tiny"), questions()
    options = (["decoder.L1.resid_post", "vision.L1.z"], ["last", "image:mean"])
    assert unshared_because(lvlm) == ""  # measured before tokens are counted
    with tokens_of(lvlm, "decoder.L2.resid_post") as counts:
        store = trace(lvlm, data, *options, tmp_path / "all", answers=False, unembedding=False)
    assert len(counts) == 1  # the plan
    assert_equal(store, alone(lvlm, data.examples, tmp_path, *options, answers=False), atol=1e-5)


def test_whatever_acts_on_the_prefix_turns_sharing_off(tmp_path: Path) -> None:
    lvlm, data = load_lvlm("tiny"), questions()
    site = Site.parse("decoder.L1.z")

    def shares(name: str) -> bool:
        store = trace(lvlm, data, ["resid_post"], ["last"], tmp_path / name, unembedding=False)
        return "prefixes" in store.provenance["environment"]

    assert shares("plain")
    with intervened(lvlm, [Intervention(site, Zero(), "last", head=0)]):
        assert shares("last")
    with intervened(lvlm, [Intervention(site, Zero(), "image:all", head=0)]):
        assert not shares("image")
    handle = lvlm.layers("decoder")[0].register_forward_hook(lambda _module, _args, _output: None)
    assert not shares("hook")
    handle.remove()


def test_a_late_change_is_stored_as_for_each_question_alone(tmp_path: Path) -> None:
    lvlm, data = load_lvlm("tiny"), questions()
    options = (["resid_post"], ["last", "image:mean", "suffix:mean"])
    with intervened(lvlm, [Intervention(Site.parse("decoder.L1.z"), Zero(), "last+generated", head=0)]):
        store = trace(lvlm, data, *options, tmp_path / "all", unembedding=False)
        expected = alone(lvlm, data.examples, tmp_path, *options)
    assert_equal(store, expected, atol=1e-5)
