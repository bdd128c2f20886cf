"""Baselines of a grid: blank images, random types, random features, other data; and fits that were interrupted."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from groundscope.core.errors import ProbeError, SiteError
from probes import (
    ProbeGrid,
    control_task,
    find_onsets,
    fit_grid,
    layer_trajectory,
    lexical_control,
    multiclass,
    random_features,
    transfer,
)
from tests.toys.memory_store import MemoryStore, make_store

COLORS = ("attribute:red", "attribute:green", "attribute:blue")


def colored(seed: int = 0, n_groups: int = 120, strength: float = 1.5, flip: bool = False) -> MemoryStore:
    """Three exclusive colors, decodable from layer 1; ``asked`` depends on the question, not on the image."""
    rng = np.random.default_rng(seed)
    size = 3
    group = np.repeat(np.arange(n_groups), size)
    n = len(group)
    color = rng.integers(0, 3, n_groups)[group]
    noun = rng.integers(0, 4, n)
    table = pd.DataFrame(
        {
            "id": [f"{seed}-q{i}" for i in range(n)],
            "group": [f"{seed}-s{g}" for g in group],
            "question": [f"is there a {'cat dog bus car'.split()[k]}?" for k in noun],
        }
    )
    for k, name in enumerate(COLORS):
        table[name] = (color == k).astype(np.float32)
    table["object:asked"] = (noun < 2).astype(np.float32)
    x = rng.normal(size=(n_groups, 3, 10))[group] * 0.5 + rng.normal(size=(n, 3, 10))
    for layer in (1, 2):
        x[np.arange(n), layer, color] += strength * (-1 if flip else 1)
        x[np.arange(n), layer, 4 + noun] += strength
    x[:, 2] = rng.normal(size=(n, 10))  # gone again
    return MemoryStore(table, {("decoder", "resid_post", "last"): x})


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return colored()


@pytest.fixture(scope="module")
def grid(store: MemoryStore) -> ProbeGrid:
    return fit_grid(store, [*COLORS, "object:asked"], "resid_post", C=(1e-2, 1.0), folds=3)


def test_multiclass_scores_equal_scikit_learn(grid: ProbeGrid) -> None:
    scores = multiclass(grid, COLORS).set_index("layer")
    truth = grid.held_out_labels[:3].argmax(axis=0)
    for at in range(3):
        predicted = grid.held_out_margins[:3, at, 0].argmax(axis=0)
        assert scores.loc[at, "balanced_accuracy"] == pytest.approx(recall_score(truth, predicted, average="macro"))
        assert scores.loc[at, "low"] <= scores.loc[at, "balanced_accuracy"] <= scores.loc[at, "high"]
    assert (scores["chance"] == 1 / 3).all()
    assert scores.loc[1, "low"] > 0.5
    assert scores.loc[0, "low"] < 1 / 3 + 0.1
    assert scores["head"].isna().all()
    with pytest.raises(ProbeError, match="choose at least two different concepts"):
        multiclass(grid, ["attribute:red"])


def test_softmax_probe_equals_the_protocol_with_scikit_learn(grid: ProbeGrid, store: MemoryStore) -> None:
    scores = multiclass(grid, COLORS, how="softmax", store=store)
    split = np.isin(store.table["id"], grid.held_out)
    y = store.table[list(COLORS)].to_numpy().argmax(axis=1)
    for at in range(3):
        x = store.read(f"decoder.L{at}.resid_post", "last", examples=slice(None)).astype(float)
        penalty = scores.loc[at, "C"]
        assert penalty in (1e-2, 1.0)
        scaler = StandardScaler().fit(x[~split])
        model = LogisticRegression(C=penalty, class_weight="balanced", tol=1e-10, solver="newton-cg", max_iter=1000)
        model.fit(scaler.transform(x[~split]), y[~split])
        predicted = model.predict(scaler.transform(x[split]))
        score = recall_score(y[split], predicted, average="macro")
        assert scores.loc[at, "balanced_accuracy"] == pytest.approx(score, abs=1e-9)
        assert 0 <= scores.loc[at, "gap"] <= 1e-8
        assert scores.loc[at, "low"] <= score <= scores.loc[at, "high"]
    assert scores.loc[1, "low"] > 0.5


def test_choices_that_cannot_be_fitted_are_refused(grid: ProbeGrid, store: MemoryStore) -> None:
    with pytest.raises(ProbeError, match="how='softmax' needs store"):
        multiclass(grid, COLORS, how="softmax")
    with pytest.raises(ProbeError, match="unknown how='best'; choose from rest, softmax"):
        multiclass(grid, COLORS, how="best")
    other = colored(seed=1)
    other.digest = "e" * 64
    with pytest.raises(ProbeError, match="the grid was fitted on store dddddddddddd"):
        multiclass(grid, COLORS, how="softmax", store=other)
    with pytest.raises(ProbeError, match="not split as the grid's were"):
        multiclass(grid, COLORS, how="softmax", store=store, rows=np.arange(360) < 300)


def test_transfer_scores_probes_on_other_stores(grid: ProbeGrid, store: MemoryStore) -> None:
    other, against = colored(seed=1), colored(seed=2, flip=True)
    targets = {"fresh": other, "opposite": against, "home": store, "few": (other, np.arange(360) < 30)}
    targets["few"][1].setflags(write=False)  # the caller's rows are left alone
    scores = transfer(grid, targets, resamples=200)
    at = scores.set_index(["target", "concept", "layer"])
    fresh = at.loc[("fresh", "attribute:red", 1)]
    assert fresh["low"] > 0.6
    assert at.loc[("opposite", "attribute:red", 1)]["high"] < 0.5
    margins = grid.decision("attribute:red", 1, None, other.read("decoder.L1.resid_post", "last", examples=slice(None)))
    truth = other.table["attribute:red"]
    assert fresh["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, margins > 0))
    assert fresh["auc"] == pytest.approx(roc_auc_score(truth, margins))
    assert fresh["home"] == grid.array("attribute:red")[1]
    # At home only the held-out groups are left, and so the score is the grid's own.
    home = at.loc[("home", "attribute:red", 1)]
    assert home["balanced_accuracy"] == pytest.approx(home["home"])
    assert home["n"] == len(grid.held_out)
    assert home["n_known"] == 360 - len(grid.held_out)
    assert at.loc[("few", "attribute:red", 1)]["n"] == 30
    narrow = MemoryStore(other.table, {("decoder", "resid_post", "last"): np.ones((360, 3, 7))})
    with pytest.raises(ProbeError, match=r"'narrow': decoder.L0.resid_post has width 7, the grid's probes need 10"):
        transfer(grid, {"narrow": narrow})
    with pytest.raises(SiteError, match="image:mean not in store"):
        transfer(grid, {"fresh": other}, tokens="image:mean")


def test_a_concept_decodable_from_the_question_alone_is_not_visual(grid: ProbeGrid, store: MemoryStore) -> None:
    """The blank image keeps the noun of the question decodable and removes the color."""
    blank = colored(strength=0.0)
    x = blank.values["decoder", "resid_post", "last"]
    x[:, 1, 4:8] = store.values["decoder", "resid_post", "last"][:, 1, 4:8]
    scores = lexical_control(grid, blank).set_index(["concept", "layer"])
    noun, red = scores.loc[("object:asked", 1)], scores.loc[("attribute:red", 1)]
    assert noun["balanced_accuracy"] > 0.65
    assert noun["lexical"] == pytest.approx(noun["balanced_accuracy"], abs=0.1)
    assert not noun["is_visual"]
    assert red["is_visual"]
    assert red["visual_low"] <= red["visual"] == red["balanced_accuracy"] - red["lexical"] <= red["visual_high"]
    with pytest.raises(ProbeError, match="does not hold the grid's examples"):
        lexical_control(grid, colored(seed=5))


def test_a_control_task_is_learned_only_where_the_type_is_decodable(grid: ProbeGrid, store: MemoryStore) -> None:
    """The noun is decodable from layer 1, so any labeling of questions can be learned there: the noun is not selective."""
    scores = control_task(grid, store, draws=4).set_index(["concept", "layer"])
    assert scores.loc[("object:asked", 1), "control_task"] > 0.6
    assert scores.loc[("object:asked", 1), "selectivity"] < 0.15
    assert scores.loc[("object:asked", 0), "control_task"] == pytest.approx(0.5, abs=0.12)
    with pytest.raises(ProbeError, match="types='charm' must be a column"):
        control_task(grid, store, "charm")


def test_random_features_are_at_chance(grid: ProbeGrid, store: MemoryStore) -> None:
    scores = random_features(grid, store).set_index("concept")
    assert len(scores) == 4
    assert np.abs(scores["balanced_accuracy"] - 0.5).max() < 0.12
    assert scores.loc["attribute:red", "majority"] == grid.majority[0]


def test_landmarks_name_the_layers_where_a_concept_appears_and_vanishes(grid: ProbeGrid, store: MemoryStore) -> None:
    arrays = {
        ("vision", "resid_post", "image:mean"): store.values["decoder", "resid_post", "last"][:, :1],
        ("projector", "out", "image:mean"): store.values["decoder", "resid_post", "last"][:, :1],
    }
    before = MemoryStore(store.table, arrays)
    options: dict[str, Any] = {"C": (1e-2,), "folds": 3, "control": 0, "resamples": 200}
    vision = fit_grid(before, ["attribute:red"], "vision.resid_post", tokens="image:mean", **options)
    projector = fit_grid(before, ["attribute:red"], "projector.out", tokens="image:mean", **options)
    table = layer_trajectory([grid, projector, vision])
    way = table.drop_duplicates("step").sort_values("step")["place"].tolist()
    assert way == [
        "vision.L0.resid_post",
        "projector.out",
        "decoder.L0.resid_post",
        "decoder.L1.resid_post",
        "decoder.L2.resid_post",
    ]
    layers = find_onsets(table, above=0.55).set_index(["concept", "component", "tokens"])
    red = layers.loc[("attribute:red", "resid_post", "last")]
    assert (red["appears"], red["best"], red["vanishes"]) == (
        "decoder.L1.resid_post",
        "decoder.L1.resid_post",
        "decoder.L2.resid_post",
    )
    nowhere = layers.loc[("attribute:red", "out", "image:mean")]
    assert nowhere[["appears", "vanishes"]].isna().all()
    with pytest.raises(ProbeError, match="at least one grid"):
        layer_trajectory([])


# ---- long runs ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_fit_resumes_from_its_checkpoint(store: MemoryStore, grid: ProbeGrid, tmp_path: Path) -> None:
    options: dict[str, Any] = {"C": (1e-2, 1.0), "folds": 3, "checkpoint": tmp_path / "c"}
    real, read = store.read, []

    def killed(site: str, *args: Any, **kwargs: Any) -> np.ndarray:
        read.append(site)
        if site == "decoder.L2.resid_post" and len(read) < 4:
            raise KeyboardInterrupt
        return real(site, *args, **kwargs)

    other = MemoryStore(store.table, store.values)
    other.read = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit_grid(other, grid.concepts, "resid_post", **options)
    resumed = fit_grid(other, grid.concepts, "resid_post", **options)
    # The first layer is read again to see which rows are empty; the second was finished.
    assert read[3:] == ["decoder.L0.resid_post", "decoder.L2.resid_post"]
    pd.testing.assert_frame_equal(resumed.frame(), grid.frame())
    (tmp_path / "c" / "layer-1.safetensors").write_bytes(b"torn")
    pd.testing.assert_frame_equal(fit_grid(other, grid.concepts, "resid_post", **options).frame(), grid.frame())
    with pytest.raises(ProbeError, match="checkpoint of another run: 'folds' was 3 and is now 4"):
        fit_grid(other, grid.concepts, "resid_post", **{**options, "folds": 4})
    (tmp_path / "c" / "checkpoint.json").write_text("{")
    with pytest.raises(ProbeError, match=r"checkpoint\.json: invalid JSON"):
        fit_grid(other, grid.concepts, "resid_post", **options)


def test_memory_is_bounded_by_a_layer() -> None:
    """Ten layers take no more than the stated bound for one: 12 N D bytes, twice a layer again while it is fitted."""
    n, width, layers = 600, 400, 10
    base = make_store(n_groups=150)

    class Lazy(MemoryStore):
        def read(self, site: str, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
            layer = int(site.split(".")[1][1:])
            return np.random.default_rng(layer).normal(size=(n, width)).astype(np.float32)[examples]

    lazy = Lazy(base.table, {("decoder", "resid_post", "last"): np.zeros((n, layers, width), np.float32)})
    peaks = []
    for count in (2, layers):
        lazy.arrays = (type(lazy.arrays[0])("decoder", "resid_post", "last", count, width),)
        tracemalloc.start()
        fit_grid(lazy, ["object:apple"], "resid_post", C=(1e-2,), folds=2, control=0, resamples=10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    layer = n * width * 8
    assert peaks[1] < peaks[0] + 0.5 * layer
    assert peaks[1] < 6 * layer


def test_unknown_options_are_refused(store: MemoryStore) -> None:
    for options, message in (
        ({"estimator": "forest"}, "unknown estimator 'forest'; choose from logistic, ridge, lda"),
        ({"device": "cuda:7"}, "device 'cuda:7' cannot be used: .*; use device='cpu'"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"tolerance": 0.0}, "tolerance=0.0 must be positive"),
    ):
        with pytest.raises(ProbeError, match=message):
            fit_grid(store, ["attribute:red"], "resid_post", **options)
