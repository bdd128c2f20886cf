"""Alignment at layers and heads of two stores, against the measures of arrays and permutations by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from activation_store import MemorySource
from groundscope.core.errors import ProbeError, SiteError
from probes import alignment

N, LAYERS, WIDTH = 40, 3, 8


def source(x: np.ndarray, tokens: str, modality: str, component: str = "resid_post", **options: Any) -> MemorySource:
    names = options.pop("ids", [f"q{i}" for i in range(len(x))])
    table = {"id": names, "group": options.pop("groups", [f"g{name[1:]}" for name in names])}
    provenance = {"input": modality} if modality != "both" else {}
    return MemorySource({(component, tokens): x}, table, provenance=provenance, **options)


@pytest.fixture(scope="module")
def values() -> tuple[np.ndarray, np.ndarray]:
    """Images and texts that agree in layer 1 only."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, N, LAYERS, WIDTH)).astype(np.float32)
    y[:, 1] = x[:, 1] + 0.7 * y[:, 1]
    return x, y


@pytest.fixture(scope="module")
def stores(values: tuple[np.ndarray, np.ndarray]) -> tuple[MemorySource, MemorySource]:
    """The texts in another order than the images."""
    x, y = values
    order = np.random.default_rng(1).permutation(N)
    texts = source(y[order], "question:mean", "text", ids=[f"q{i}" for i in order])
    return source(x, "image:mean", "image"), texts


def test_values_are_those_of_the_layers_and_the_choice_is_repeated_in_every_permutation(
    values: tuple[np.ndarray, np.ndarray], stores: tuple[MemorySource, MemorySource]
) -> None:
    x, y = (v.astype(np.float64) for v in values)
    result = alignment.measure_layers(*stores, seed=3)
    table = result.table().set_index(["measure", "image_layer"])
    functions = {"cosine": alignment.cosine, "cka": alignment.cka, "cknna": alignment.cknna}
    functions |= {"mutual_knn": alignment.mutual_knn, "modality_gap": alignment.modality_gap}
    for layer in range(LAYERS):
        for name, function in functions.items():
            assert table.loc[(name, layer), "value"] == pytest.approx(function(x[:, layer], y[:, layer]), abs=1e-10)
        ranks = alignment.retrieval(x[:, layer], y[:, layer])
        assert table.loc[("text_to_image@5", layer), "value"] == (ranks.text_to_image <= 5).mean()
    # The same permutations at every layer, by hand: p of one layer, and p of the largest value over layers.
    draws = alignment.ImageRows.of(range(N)).permutations(199, seed=3)
    for name in ("cosine", "mutual_knn"):
        null = np.array([[functions[name](x[:, k], y[moved][:, k]) for k in range(LAYERS)] for moved in draws])
        for layer in range(LAYERS):
            value = table.loc[(name, layer), "value"]
            assert table.loc[(name, layer), "p"] == (1 + (null[:, layer] >= value - 1e-12).sum()) / 200
            assert table.loc[(name, layer), "p_choice"] == (1 + (null.max(axis=1) >= value - 1e-12).sum()) / 200
            assert table.loc[(name, layer), "baseline"] == pytest.approx(null[:, layer].mean())
        best = result.best().set_index("measure").loc[name]
        assert best["image_layer"] == 1
        assert best["p"] == table.loc[(name, 1), "p_choice"] == 1 / 200
        assert best["baseline"] == pytest.approx(null.max(axis=1).mean())
    assert np.isnan(table.loc[("modality_gap", 0), "p"])
    assert table.loc[("modality_gap", 0), "low"] < table.loc[("modality_gap", 0), "value"]
    assert "modality_gap" not in set(result.best()["measure"])
    assert set(table["rows"]) == {"alone"}


def test_scores_of_examples_have_the_measure_as_their_mean(stores: tuple[MemorySource, MemorySource]) -> None:
    result = alignment.measure_layers(*stores, permutations=0)
    table = result.table().set_index(["measure", "image_layer"])["value"]
    for name in ("cosine", "mutual_knn"):
        scores = result.example_scores(name)
        assert scores["id"].tolist()[:N] == [f"q{i}" for i in range(N)]
        for layer, part in scores.groupby("image_layer"):
            assert part["score"].mean() == pytest.approx(table[name, layer], abs=1e-6)
    ranks = result.example_scores("retrieval")
    assert (ranks[ranks["image_layer"] == 1]["score"] <= 1).mean() == table["text_to_image@1", 1]
    with pytest.raises(ProbeError, match="no scores of examples for 'cka'; choose from cosine, retrieval, mutual_knn"):
        result.example_scores("cka")
    assert np.isnan(result.table()["p"]).all()


def test_every_layer_pair_and_every_head_can_be_compared(values: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = values
    images, texts = source(x, "image:mean", "image"), source(y[:, ::-1], "last", "text")
    options: Any = {"text": "last", "measures": ["cka"]}
    best = alignment.measure_layers(images, texts, pairs="all", **options)
    assert len(best.places) == 9
    assert best.best().loc[0, ["image_layer", "text_layer"]].tolist() == [1, 1]
    # Heads: only head 1 of layer 2 agrees; the choice is among all heads of all layers.
    z = np.random.default_rng(5).normal(size=(2, N, LAYERS, WIDTH)).astype(np.float32)
    z[1, :, 2, 4:] = z[0, :, 2, 4:]
    first = source(z[0], "image:mean", "image", "z", n_heads=2)
    second = source(z[1], "question:mean", "text", "z", n_heads=2)
    heads = alignment.measure_layers(first, second, "z", heads=True, measures=["cosine", "cka"])
    assert len(heads.places) == 6
    for row in heads.best().itertuples():
        assert (row.image_layer, row.head) == (2, 1)
        assert row.value == pytest.approx(1, abs=1e-6)
        assert row.p == 1 / 200
    other = heads.table().set_index(["measure", "image_layer", "head"])
    expected = alignment.cka(z[0, :, 1, :4], z[1, :, 1, :4])
    assert other.loc[("cka", 1, 0), "value"] == pytest.approx(expected, abs=1e-6)
    # A tower of another width: measures that need one space are undefined.
    tower = source(x[:, :, :5], "image:mean", "both", "vision.resid_post")
    table = alignment.measure_layers(tower, texts, "vision.resid_post", text_site="resid_post", text="last").table()
    by_name = table.groupby("measure")["value"]
    assert by_name.apply(lambda v: v.isna().all())[["cosine", "image_to_text@1", "modality_gap"]].all()
    assert by_name.apply(lambda v: v.notna().all())[["cka", "cknna", "mutual_knn"]].all()


def test_the_released_form_clamps_at_one_limit_of_all_layers(values: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = (v.astype(np.float64) * np.array([0.1, 1, 10])[:, None] for v in values)
    images, texts = source(x, "image:mean", "image"), source(y, "question:mean", "text")
    options: Any = {"measures": ["mutual_knn", "cka", "cknna"], "permutations": 0}
    joint = alignment.measure_layers(images, texts, variant="release", **options).table()
    plain = alignment.measure_layers(images, texts, **options).table()

    def scaled(v: np.ndarray, layer: int) -> np.ndarray:
        limit = np.mean([np.quantile(np.abs(row).ravel(), 0.95) for row in v])
        clipped = np.clip(v[:, layer], -limit, limit)
        return clipped / np.linalg.norm(clipped, axis=1, keepdims=True)

    for layer in range(LAYERS):
        a, b = scaled(x, layer), scaled(y, layer)
        rows = joint[joint["image_layer"] == layer].set_index("measure")["value"]
        assert rows["cka"] == pytest.approx(alignment.cka(a, b), abs=1e-5)
        assert rows["mutual_knn"] == pytest.approx(alignment.mutual_knn(a, b, clamp=None), abs=1e-9)
        assert rows["cknna"] == pytest.approx(alignment.cknna(a, b, clamp=None), abs=1e-5)
    assert (joint["value"] - plain["value"]).abs().max() > 0.01


def test_several_captions_of_an_image_move_together(values: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = values
    x = x.copy()
    x[N // 2 :] = x[: N // 2]  # two rows of each image
    groups = [f"g{i % (N // 2)}" for i in range(N)]
    images, texts = source(x, "image:mean", "image", groups=groups), source(y, "question:mean", "text", groups=groups)
    result = alignment.measure_layers(images, texts)
    table = result.table().set_index(["measure", "image_layer"])
    assert (table["images"] == N // 2).all()
    first = slice(0, N // 2)
    expected = alignment.cka(x[first, 1], y[first, 1])
    assert table.loc[("cka", 1), "value"] == pytest.approx(expected, abs=1e-6)
    ranks = alignment.retrieval(x[:, 1], y[:, 1], groups)
    assert table.loc[("image_to_text@1", 1), "value"] == (ranks.image_to_text == 1).mean()
    assert result.example_scores("mutual_knn")["score"].isna().sum() == LAYERS * N // 2


def test_rows_that_have_seen_both_modalities_are_refused_unless_named(
    stores: tuple[MemorySource, MemorySource], values: tuple[np.ndarray, np.ndarray]
) -> None:
    images, texts = stores
    both = source(values[0], "image:mean", "both")
    mixed = MemorySource(
        {("resid_post", "image:mean"): values[0], ("resid_post", "question:mean"): values[1]},
        {"id": [f"q{i}" for i in range(N)], "group": range(N)},
    )
    for a, b, which in ((both, texts, "images"), (images, mixed, "texts"), (mixed, None, "texts")):
        with pytest.raises(ProbeError, match=f"the rows of the {which} have seen image and text"):
            alignment.measure_layers(a, b)
    joint = alignment.measure_layers(mixed, joint=True, measures=["cka"], permutations=0)
    assert set(joint.table()["rows"]) == {"joint"}
    with pytest.raises(ProbeError, match="store traced with input='image' first"):
        alignment.measure_layers(texts, images, image="question:mean", text="image:mean")
    with pytest.raises(ProbeError, match="store traced with input='image' first"):
        alignment.measure_layers(images, None, text="image:mean")


def test_bad_input_is_one_error_before_work(stores: tuple[MemorySource, MemorySource], values: Any) -> None:
    images, texts = stores
    y = values[1]
    fewer = source(y[:39], "question:mean", "text")
    more = source(np.concatenate([y, y[:1]]), "question:mean", "text", ids=[f"q{i}" for i in range(N + 1)])
    empty = source(np.full_like(y, np.nan), "question:mean", "text")
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: alignment.measure_layers(images, fewer), ProbeError, "'q39' is only among the images"),
        (lambda: alignment.measure_layers(images, more), ProbeError, "'q40' is only among the texts"),
        (lambda: alignment.measure_layers(images, empty), ProbeError, "no example has both"),
        (lambda: alignment.measure_layers(images, texts, rows=np.arange(N) < 9), ProbeError, "needs 11 images, got 9"),
        (lambda: alignment.measure_layers(images, texts, permutations=20), ProbeError, "at least 199"),
        (lambda: alignment.measure_layers(images, texts, pairs="some"), ProbeError, "pairs='some'"),  # type: ignore[arg-type]
        (lambda: alignment.measure_layers(images, texts, measures=["ckna"]), ProbeError, "did you mean cknna"),
        (lambda: alignment.measure_layers(images, texts, text="last"), SiteError, "not in store"),
        (lambda: alignment.measure_layers(images, texts, "mlp_out"), SiteError, "not in store"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_probes_transfer_between_modalities_only_where_the_concept_is_represented_alike() -> None:
    rng = np.random.default_rng(2)
    n = 200
    cat = np.arange(n) % 2
    x, y = rng.normal(size=(2, n, 2, 6))
    x[:, :, 0] += 4 * cat[:, None]
    y[:, 0, 0] += 4 * cat  # layer 0: the same direction, layer 1: another
    y[:, 1, 3] += 4 * cat
    y += 30
    table = {"id": range(n), "group": range(n), "object:cat": cat}
    images = MemorySource({("resid_post", "image:mean"): x}, table, provenance={"input": "image"})
    texts = MemorySource({("resid_post", "question:mean"): y}, table, provenance={"input": "text"})
    options: Any = {"C": (0.1,), "folds": 2, "resamples": 50}
    moved = alignment.transfer_modalities(images, texts, ["object:cat"], **options).table()
    assert len(moved) == 4
    rows = moved.set_index(["source", "layer"])
    for source_name in ("image", "text"):
        assert rows.loc[(source_name, 0), "auc"] > 0.95
        assert rows.loc[(source_name, 1), "auc_low"] < 0.5 < rows.loc[(source_name, 1), "auc_high"]
        assert (rows.loc[source_name, "source_auc"] > 0.95).all()
        assert (rows.loc[source_name, "target_auc"] > 0.95).all()
    both = MemorySource({("resid_post", "image:mean"): x}, pd.DataFrame(table))
    with pytest.raises(ProbeError, match="have seen image and text"):
        alignment.transfer_modalities(both, texts, ["object:cat"])
