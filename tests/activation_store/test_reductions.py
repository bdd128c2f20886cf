"""Values of tokens that are computed while tracing: against the same values of stored tokens, by formulas in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from activation_store import (
    ActivationStore,
    ArrayInfo,
    ConceptDirection,
    LensLogProbability,
    LensRank,
    Margin,
    MemorySource,
    Schema,
    reductions,
    repack,
    trace,
    verify,
)
from concepts import ConceptDataset, scenes
from experiments.config import TraceConfig
from experiments.stages.trace import traced_reductions
from groundscope.core.errors import ConfigError, DataError, SiteError, StoreError
from lvlm import Lvlm, load_lvlm
from probes import fit_grid

WORDS = ("apple", "dog", "yes")
LAYERS = (1, 3)


@pytest.fixture(scope="module")
def model() -> Lvlm:
    return load_lvlm("tiny")


@pytest.fixture(scope="module")
def data() -> ConceptDataset:
    return scenes.dataset(10)[:6]


@pytest.fixture(scope="module")
def directions() -> tuple[ConceptDirection, ...]:
    rng = np.random.default_rng(0)
    return tuple(
        ConceptDirection.from_weights(
            f"decoder.L{layer}.resid_post", "image:mean", concept, rng.normal(size=192), intercept=0.3 * layer,
            provenance={"store": "ab" * 32},
        )
        for layer in LAYERS
        for concept in ("object:dog", "object:cat")
    )  # fmt: skip


@dataclass(frozen=True)
class Largest:
    """A reduction of a user's own: the largest value of a token and where it is, of any stack."""

    name: str = "largest"
    values: tuple[str, ...] = ("value", "index")

    def applies(self, site: Any) -> bool:
        return site.component == "resid_post"

    def prepare(self, model: Lvlm, site: Any) -> Any:
        import torch

        return lambda x: torch.stack([x.max(-1).values.float(), x.argmax(-1).float()], dim=-1)

    def record(self) -> dict[str, Any]:
        return {"method": "largest value"}


SITES = ["resid_post", "vision.L1.resid_post"]


@pytest.fixture(scope="module")
def raw(model: Lvlm, data: ConceptDataset, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Every token, from which the reductions are computed afterwards."""
    return trace(model, data, SITES, ["last", "image:all", "object:mean"], tmp_path_factory.mktemp("raw"), batch_size=3)


@pytest.fixture(scope="module")
def reduced(
    model: Lvlm, data: ConceptDataset, directions: Any, tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    return trace(
        model, data, SITES, ["last", "image:mean"], tmp_path_factory.mktemp("reduced"), batch_size=3, dtype="float16",
        shard_size=4, reduce={
            "image:all": [Margin(directions), LensRank(WORDS), LensLogProbability(WORDS), Largest()],
            "object:mean": LensRank(WORDS),
        },
    )  # fmt: skip


def lens(store: ActivationStore, model: Lvlm, x: np.ndarray) -> np.ndarray:
    """``log softmax(W_U norm(h))``, float64: the formula with the stored parameters."""
    h = x.astype(np.float64)
    epsilon = model.hf.config.get_text_config().rms_norm_eps
    normed = h / np.sqrt((h**2).mean(-1, keepdims=True) + epsilon) * store.tensor("final_norm.weight").astype(float)
    logits = normed @ store.tensor("unembedding.weight").astype(float).T
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def test_margins_are_those_of_stored_tokens(raw: ActivationStore, reduced: ActivationStore, directions: Any) -> None:
    for direction in directions:
        tokens = raw.ragged(direction.site, "image:all")
        margins = reduced.ragged(direction.site, "image:all", reduction="margin")
        column = ("object:dog", "object:cat").index(direction.concept)
        assert (margins.offsets == tokens.offsets).all()
        want = tokens.values.astype(float) @ (direction.scale * direction.vector.astype(float)) + direction.intercept
        np.testing.assert_allclose(margins.values[:, column], want, rtol=1e-4, atol=1e-3)
    margin = next(a for a in reduced.reductions if a.reduction == "margin")
    assert (margin.layers, margin.values, margin.ragged) == (LAYERS, ("object:dog", "object:cat"), True)


def test_lens_values_are_those_of_stored_tokens(raw: ActivationStore, reduced: ActivationStore, model: Lvlm) -> None:
    ids = [model.processor.tokenizer.get_vocab()[word] for word in WORDS]
    for layer in range(model.n_layers):
        site = f"decoder.L{layer}.resid_post"
        log_p = lens(raw, model, raw.ragged(site, "image:all").values)
        values = reduced.ragged(site, "image:all", reduction="log_p").values
        np.testing.assert_allclose(values, log_p[:, ids], atol=1e-4)
        ranks = reduced.ragged(site, "image:all", reduction="rank").values
        # A rank may differ where two logits are closer than the arithmetic.
        low, high = (1 + (log_p > log_p[:, [i]] + gap).sum(-1) for i, gap in ((ids[0], 1e-4), (ids[0], -1e-4)))
        assert ((low <= ranks[:, 0]) & (ranks[:, 0] <= high)).all()
        assert (1 + (log_p > log_p[:, ids[1], None]).sum(-1) == ranks[:, 1]).mean() > 0.99
        assert ranks.min() >= 1
        assert ranks.max() > 1


def test_one_vector_per_example_is_reduced_and_empty_selections_stay_undefined(
    raw: ActivationStore, reduced: ActivationStore, model: Lvlm
) -> None:
    site = "decoder.L5.resid_post"
    x = raw.read(site, "object:mean")
    ranks = reduced.read(site, "object:mean", reduction="rank")
    empty = np.isnan(x).any(axis=1)
    assert empty.any()
    assert not empty.all()
    assert (np.isnan(ranks).all(axis=1) == empty).all()
    log_p = lens(raw, model, x[~empty])
    i = model.processor.tokenizer.get_vocab()["yes"]
    assert (ranks[~empty, 2] == 1 + (log_p > log_p[:, [i]]).sum(-1)).all()


def test_a_reduction_of_ones_own_applies_to_any_stack(raw: ActivationStore, reduced: ActivationStore) -> None:
    for site in ("decoder.L2.resid_post", "vision.L1.resid_post"):
        x = raw.ragged(site, "image:all")
        values = reduced.ragged(site, "image:all", examples=[4, 1], reduction="largest")
        assert (values[0] == np.stack([x[4].max(-1), x[4].argmax(-1)], axis=-1)).all()
        assert (values[1][:, 1] == x[1].argmax(-1)).all()


def test_a_store_without_the_tokens_says_how_to_read_it(reduced: ActivationStore, tmp_path: Path) -> None:
    assert {a.tokens for a in reduced.arrays} == {"last", "image:mean"}
    with pytest.raises(
        SiteError,
        match=r"'image:all' of site 'decoder.L3.resid_post' not in store: .*reduction='largest' or 'log_p' or 'margin'",
    ):
        reduced.ragged("decoder.L3.resid_post", "image:all")
    words = (
        r"reduction 'margin' of 'image:all' at 'decoder.L2.resid_post' not in store; it has .*margin of image:all at"
    )
    with pytest.raises(SiteError, match=words):
        reduced.ragged("decoder.L2.resid_post", "image:all", reduction="margin")
    with pytest.raises(SiteError, match="has many tokens per example"):
        reduced.read("decoder.L3.resid_post", "image:all", reduction="margin")
    grid_sites = {(a.stack, a.component, a.tokens) for a in reduced.arrays}
    assert ("decoder", "resid_post", "image:all") not in grid_sites


def test_files_have_the_values_in_float32_and_survive_copies(reduced: ActivationStore, tmp_path: Path) -> None:
    assert verify(reduced.path).ok
    assert reduced.dtype == "float16"
    with h5py.File(reduced.path / "index.h5") as file:
        group = file["arrays/decoder.resid_post|rank/image:all"]
        assert (group["values"].dtype, group["values"].shape[1:]) == (np.float32, (6, 3))
        assert int(file.attrs["layout-version"]) == 4
    assert Schema.from_record(reduced.schema.record()) == reduced.schema
    copy = repack(reduced, tmp_path / "copy")
    for reduction in ("rank", "margin"):
        a, b = (s.ragged("decoder.L3.resid_post", "image:all", reduction=reduction) for s in (reduced, copy))
        assert (a.values == b.values).all()


def test_provenance_names_the_probes_and_a_change_of_them_is_another_store(
    model: Lvlm, data: ConceptDataset, reduced: ActivationStore, directions: Any, tmp_path: Path
) -> None:
    record = reduced.provenance["reductions"]["image:all"]
    assert record["margin"]["stores"] == ["ab" * 32]
    assert record["rank"]["values"] == list(WORDS)
    changed = (ConceptDirection.from_weights(directions[0].site, "last", "object:dog", np.ones(192)),)
    few = data[:2]
    trace(model, few, SITES[:1], [], tmp_path, reduce={"image:all": Margin(directions)})
    with pytest.raises(StoreError, match=r"reductions\.image:all\.margin\.directions"):
        trace(model, few, SITES[:1], [], tmp_path, reduce={"image:all": Margin((*changed, *directions[1:]))})


def test_what_cannot_be_reduced_is_refused_before_work(
    model: Lvlm, data: ConceptDataset, directions: Any, tmp_path: Path
) -> None:
    def attempt(sites: list[str], tokens: list[str], reduction: Any) -> Any:
        return trace(model, data, sites, tokens, tmp_path / "store", reduce={"image:all": reduction})

    with pytest.raises(SiteError, match=r"nothing of 'decoder\.z' would be stored, because the reductions \(rank\)"):
        attempt(["z", "resid_post"], [], LensRank(["dog"]))
    with pytest.raises(SiteError, match="reduction 'rank' of 'image:all' applies to no traced site"):
        attempt(["z"], ["last"], LensRank(["dog"]))
    with pytest.raises(DataError, match="'elephant' is unknown for the tokenizer of tiny"):
        attempt(["resid_post"], ["last"], LensRank(["elephant"]))
    with pytest.raises(SiteError, match="repeats 'rank'; give each reduction another name="):
        attempt(["resid_post"], ["last"], [LensRank(["dog"]), LensRank(["cat"])])
    narrow = ConceptDirection.from_weights("decoder.L1.resid_post", "last", "object:dog", np.ones(7))
    with pytest.raises(SiteError, match=r"at decoder\.L1\.resid_post has 7 values, the site 192"):
        attempt(["resid_post"], ["last"], Margin((narrow,)))
    with pytest.raises(SiteError, match=r"'object:cat' has 0 directions at decoder\.L3"):
        Margin(directions[:3])
    with pytest.raises(SiteError, match="there is no direction"):
        Margin(())
    with pytest.raises(ConfigError, match="give at least one word, and each once"):
        LensRank(["dog", "dog"])
    assert not (tmp_path / "store").exists()
    with pytest.raises(SiteError, match="a reduction needs 2 different names"):
        ArrayInfo("decoder", "resid_post", "last", 1, 2, reduction="rank", values=("a",))


def test_a_run_names_reductions_and_the_probes_of_another_run(
    raw: ActivationStore, model: Lvlm, data: ConceptDataset, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    table = {"id": range(40), "group": range(40), "odd": np.arange(40) % 2 == 1}
    source = MemorySource({"resid_post": rng.normal(size=(40, 2, 192))}, table)
    grid = fit_grid(source, ["odd"], "resid_post", tokens="last", C=(0.1,), folds=2, control=0, resamples=5)
    grid.save(tmp_path / "grid")
    settings = {"tokens": "image:all", "probes": str(tmp_path / "grid"), "concepts": ["odd"]}
    reduce = traced_reductions(TraceConfig(reduce={"margin": settings}))
    store = trace(model, data[:2], ["resid_post"], [], tmp_path / "store", reduce=reduce)
    for layer in (0, 1):
        site = f"decoder.L{layer}.resid_post"
        x = raw.ragged(site, "image:all", examples=slice(0, 2)).values
        margins = store.ragged(site, "image:all", reduction="margin").values[:, 0]
        np.testing.assert_allclose(margins, grid.decision("odd", layer, None, x), rtol=1e-4, atol=1e-4)


def test_options_of_a_run_are_checked() -> None:
    chosen = traced_reductions(TraceConfig(reduce={"rank": {"tokens": ["image:all", "last"], "words": ["dog"]}}))
    assert {name: [r.name for r in per_token] for name, per_token in chosen.items()} == {
        "image:all": ["rank"],
        "last": ["rank"],
    }
    with pytest.raises(ConfigError, match=r"trace\.reduce\.rank needs a token selection"):
        traced_reductions(TraceConfig(reduce={"rank": {"words": ["dog"]}}))
    with pytest.raises(ConfigError, match="unknown reduction 'rnk'; choose from margin, log_p, rank"):
        traced_reductions(TraceConfig(reduce={"rnk": {}}))
    with pytest.raises(ConfigError, match=r"trace\.reduce\.rank: .*word"):
        traced_reductions(TraceConfig(reduce={"rank": {"tokens": "last", "word": "dog"}}))
    reductions.register("largest", Largest)
    try:
        assert traced_reductions(TraceConfig(reduce={"largest": {"tokens": "last"}}))["last"][0].name == "largest"
    finally:
        reductions.unregister("largest")
