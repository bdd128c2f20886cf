"""What grids are held against: words alone, random types, random features, other data; and grids that were killed."""

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
    fit_grid,
    journey,
    landmarks,
    lexical_control,
    multiclass,
    random_features,
    transfer,
)
from tests.toys.memory_store import MemoryStore, make_store

COLORS = ("attribute:red", "attribute:green", "attribute:blue")


def colored(seed: int = 0, n_groups: int = 120, strength: float = 1.5, flip: bool = False) -> MemoryStore:
    """Three colours that exclude each other, read from layer 1; ``asked`` is told by the question, not by the image."""
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


def test_a_choice_among_concepts_is_scored_as_scikit_learn_does(grid: ProbeGrid) -> None:
    found = multiclass(grid, COLORS).set_index("layer")
    truth = grid.held_out_labels[:3].argmax(axis=0)
    for at in range(3):
        said = grid.held_out_margins[:3, at, 0].argmax(axis=0)
        assert found.loc[at, "balanced_accuracy"] == pytest.approx(recall_score(truth, said, average="macro"))
        assert found.loc[at, "low"] <= found.loc[at, "balanced_accuracy"] <= found.loc[at, "high"]
    assert (found["chance"] == 1 / 3).all()
    assert found.loc[1, "low"] > 0.5
    assert found.loc[0, "low"] < 1 / 3 + 0.1
    assert found["head"].isna().all()
    with pytest.raises(ProbeError, match="choose at least two different concepts"):
        multiclass(grid, ["attribute:red"])


def test_a_choice_fitted_together_equals_the_protocol_done_with_scikit_learn(
    grid: ProbeGrid, store: MemoryStore
) -> None:
    found = multiclass(grid, COLORS, how="softmax", store=store)
    split = np.isin(store.table["id"], grid.held_out)
    y = store.table[list(COLORS)].to_numpy().argmax(axis=1)
    for at in range(3):
        x = store.read(f"decoder.L{at}.resid_post", "last", examples=slice(None)).astype(float)
        penalty = found.loc[at, "C"]
        assert penalty in (1e-2, 1.0)
        scaler = StandardScaler().fit(x[~split])
        model = LogisticRegression(C=penalty, class_weight="balanced", tol=1e-10, solver="newton-cg", max_iter=1000)
        model.fit(scaler.transform(x[~split]), y[~split])
        said = model.predict(scaler.transform(x[split]))
        score = recall_score(y[split], said, average="macro")
        assert found.loc[at, "balanced_accuracy"] == pytest.approx(score, abs=1e-9)
        assert 0 <= found.loc[at, "gap"] <= 1e-8
        assert found.loc[at, "low"] <= score <= found.loc[at, "high"]
    assert found.loc[1, "low"] > 0.5


def test_choices_that_cannot_be_fitted_are_refused(grid: ProbeGrid, store: MemoryStore) -> None:
    with pytest.raises(ProbeError, match="'softmax' fits a new probe and needs store"):
        multiclass(grid, COLORS, how="softmax")
    with pytest.raises(ProbeError, match="how='best' must be one of rest, softmax"):
        multiclass(grid, COLORS, how="best")
    other = colored(seed=1)
    other.digest = "e" * 64
    with pytest.raises(ProbeError, match="the grid was fitted on store dddddddddddd"):
        multiclass(grid, COLORS, how="softmax", store=other)
    with pytest.raises(ProbeError, match="not split as the grid's were"):
        multiclass(grid, COLORS, how="softmax", store=store, rows=np.arange(360) < 300)


def test_probes_carry_over_to_where_they_should(grid: ProbeGrid, store: MemoryStore) -> None:
    other, against = colored(seed=1), colored(seed=2, flip=True)
    targets = {"fresh": other, "opposite": against, "home": store, "few": (other, np.arange(360) < 30)}
    targets["few"][1].setflags(write=False)  # the caller's rows are left alone
    found = transfer(grid, targets, resamples=200)
    at = found.set_index(["target", "concept", "layer"])
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


def test_what_the_words_alone_tell_is_not_called_visual(grid: ProbeGrid, store: MemoryStore) -> None:
    """The blank image leaves the noun of the question where it was and takes the colour away."""
    blank = colored(strength=0.0)
    x = blank.values["decoder", "resid_post", "last"]
    x[:, 1, 4:8] = store.values["decoder", "resid_post", "last"][:, 1, 4:8]
    found = lexical_control(grid, blank).set_index(["concept", "layer"])
    asked, red = found.loc[("object:asked", 1)], found.loc[("attribute:red", 1)]
    assert asked["balanced_accuracy"] > 0.65
    assert asked["lexical"] == pytest.approx(asked["balanced_accuracy"], abs=0.1)
    assert not asked["is_visual"]
    assert red["is_visual"]
    assert red["visual_low"] <= red["visual"] == red["balanced_accuracy"] - red["lexical"] <= red["visual_high"]
    with pytest.raises(ProbeError, match="does not hold the grid's examples"):
        lexical_control(grid, colored(seed=5))


def test_a_task_of_random_types_is_learnt_only_by_heart(grid: ProbeGrid, store: MemoryStore) -> None:
    """Layer 1 tells the noun, so any labelling of questions can be learnt there: the asked noun is not selective."""
    found = control_task(grid, store, draws=4).set_index(["concept", "layer"])
    assert found.loc[("object:asked", 1), "control_task"] > 0.6
    assert found.loc[("object:asked", 1), "selectivity"] < 0.15
    assert found.loc[("object:asked", 0), "control_task"] == pytest.approx(0.5, abs=0.12)
    with pytest.raises(ProbeError, match="types='charm' must be a column"):
        control_task(grid, store, "charm")


def test_random_features_are_at_chance(grid: ProbeGrid, store: MemoryStore) -> None:
    found = random_features(grid, store).set_index("concept")
    assert len(found) == 4
    assert np.abs(found["balanced_accuracy"] - 0.5).max() < 0.12
    assert found.loc["attribute:red", "majority"] == grid.majority[0]


def test_a_concept_appears_and_vanishes_along_the_way(grid: ProbeGrid, store: MemoryStore) -> None:
    arrays = {
        ("vision", "resid_post", "image:mean"): store.values["decoder", "resid_post", "last"][:, :1],
        ("projector", "out", "image:mean"): store.values["decoder", "resid_post", "last"][:, :1],
    }
    before = MemoryStore(store.table, arrays)
    options: dict[str, Any] = {"C": (1e-2,), "folds": 3, "control": 0, "resamples": 200}
    vision = fit_grid(before, ["attribute:red"], "vision.resid_post", tokens="image:mean", **options)
    projector = fit_grid(before, ["attribute:red"], "projector.out", tokens="image:mean", **options)
    table = journey([grid, projector, vision])
    way = table.drop_duplicates("step").sort_values("step")["place"].tolist()
    assert way == [
        "vision.L0.resid_post",
        "projector.out",
        "decoder.L0.resid_post",
        "decoder.L1.resid_post",
        "decoder.L2.resid_post",
    ]
    found = landmarks(table, above=0.55).set_index(["concept", "component", "tokens"])
    red = found.loc[("attribute:red", "resid_post", "last")]
    assert (red["appears"], red["best"], red["vanishes"]) == (
        "decoder.L1.resid_post",
        "decoder.L1.resid_post",
        "decoder.L2.resid_post",
    )
    nowhere = found.loc[("attribute:red", "out", "image:mean")]
    assert nowhere[["appears", "vanishes"]].isna().all()
    with pytest.raises(ProbeError, match="at least one grid"):
        journey([])


# ---- long runs ---------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_where_it_stopped(store: MemoryStore, grid: ProbeGrid, tmp_path: Path) -> None:
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
    again = fit_grid(other, grid.concepts, "resid_post", **options)
    # The first layer is read again to see which rows are empty; the second was finished.
    assert read[3:] == ["decoder.L0.resid_post", "decoder.L2.resid_post"]
    pd.testing.assert_frame_equal(again.frame(), grid.frame())
    (tmp_path / "c" / "layer-1.safetensors").write_bytes(b"torn")
    pd.testing.assert_frame_equal(fit_grid(other, grid.concepts, "resid_post", **options).frame(), grid.frame())
    with pytest.raises(ProbeError, match="checkpoint of another run: 'folds' was 3 and is now 4"):
        fit_grid(other, grid.concepts, "resid_post", **{**options, "folds": 4})
    (tmp_path / "c" / "checkpoint.json").write_text("{")
    with pytest.raises(ProbeError, match=r"checkpoint\.json: invalid JSON"):
        fit_grid(other, grid.concepts, "resid_post", **options)


def test_memory_is_a_layer_not_a_store() -> None:
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


def test_options_that_are_not_there_are_refused(store: MemoryStore) -> None:
    for options, message in (
        ({"estimator": "forest"}, "unknown estimator 'forest'; choose from logistic, ridge, lda"),
        ({"device": "cuda:7"}, "device 'cuda:7' cannot be used: .*; use device='cpu'"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"tolerance": 0.0}, "tolerance=0.0 must be positive"),
    ):
        with pytest.raises(ProbeError, match=message):
            fit_grid(store, ["attribute:red"], "resid_post", **options)
