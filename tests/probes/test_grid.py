"""Grids of probes over stores with known answers, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter
from groundscope.core.document_digest import document_digest
from groundscope.core.errors import ProbeError, SiteError
from groundscope.core.statistics import wilson
from probes import ProbeGrid, fit_grid, probeable
from tests.toys.memory_store import PLANTED, MemoryStore, make_store


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return make_store()


@pytest.fixture(scope="module")
def grid(store: MemoryStore) -> ProbeGrid:
    return fit_grid(store, PLANTED, site="z", tokens="last")


# ---- what is found -----------------------------------------------------------------------------------------------------


def test_a_planted_concept_is_decodable_only_at_its_head(grid: ProbeGrid) -> None:
    for concept, layer, head in (("object:apple", 1, 2), ("attribute:green", 2, 0)):
        scores = grid.array(concept)
        assert scores.shape == (3, 4)
        assert scores[layer, head] > 0.8
        elsewhere = np.delete(scores.ravel(), layer * 4 + head)
        assert elsewhere.max() < 0.68
        best = grid.best(concept)
        assert (best.layer, best.head) == (layer, head)
        assert best.low > 0.6
        assert best.low <= best.balanced_accuracy <= best.high
        assert grid.array(concept, "selectivity")[layer, head] > 0.15
        assert grid.array(concept, "auc")[layer, head] > 0.85
    assert np.abs(grid.array("relation:left of") - 0.5).max() < 0.15
    assert grid.gap.max() <= 1e-8


def test_the_frame_is_tidy(grid: ProbeGrid, store: MemoryStore) -> None:
    frame = grid.frame()
    assert len(frame) == 3 * 3 * 4
    columns = "concept level stack component tokens layer head balanced_accuracy low high auc control C"
    assert set(columns.split()) | {"n_train", "n_test", "n_dropped", "majority", "selectivity"} <= set(frame.columns)
    row = frame[(frame["concept"] == "attribute:green") & (frame["layer"] == 2) & (frame["head"] == 0)].iloc[0]
    assert row["level"] == "attribute"
    assert row["balanced_accuracy"] == grid.array("attribute:green")[2, 0]
    assert row["n_train"] + row["n_test"] == store.table["attribute:green"].notna().sum()
    assert row["n_dropped"] == 0
    assert ((frame["low"] <= frame["balanced_accuracy"]) & (frame["balanced_accuracy"] <= frame["high"])).all()
    assert ((frame["auc_low"] <= frame["auc"]) & (frame["auc"] <= frame["auc_high"])).all()


def test_a_cell_equals_the_protocol_done_with_scikit_learn(grid: ProbeGrid, store: MemoryStore) -> None:
    """Refit at the penalty it chose: weights, margins, scores and majority follow from the held-out ids alone."""
    concept, layer, head = "attribute:green", 2, 0
    y = store.table[concept].to_numpy(dtype=float)
    x = store.read(f"decoder.L{layer}.z", "last", examples=slice(None))[:, head * 6 : (head + 1) * 6].astype(float)
    test = store.table["id"].isin(grid.held_out).to_numpy()
    groups = store.table["group"]
    assert not set(groups[test]) & set(groups[~test])
    train = ~test & ~np.isnan(y)
    penalty = grid.array(concept, "C")[layer, head]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, tol=1e-10, class_weight="balanced"))
    model.fit(x[train], y[train])
    margins = grid.held_out_frame(concept, layer, head)
    np.testing.assert_allclose(margins["margin"], model.decision_function(x[test]), atol=1e-4)
    np.testing.assert_array_equal(margins["label"], y[test])
    np.testing.assert_allclose(
        grid.decision(concept, layer, head, x[test]), model.decision_function(x[test]), atol=1e-4
    )
    defined = margins.dropna()
    recalls = [((defined["margin"] > 0) == (defined["label"] == 1))[defined["label"] == v].mean() for v in (0, 1)]
    assert grid.array(concept)[layer, head] == pytest.approx(np.mean(recalls))
    k = grid.concepts.index(concept)
    assert grid.majority[k] == pytest.approx(max(defined["label"].mean(), 1 - defined["label"].mean()))


def test_the_penalty_is_the_one_with_the_lowest_loss_on_rows_left_out() -> None:
    from probes.protocol.cell import Recipe, choose
    from probes.protocol.estimators import BUILT_IN
    from probes.solvers.logistic_float32 import RowBlock

    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 30))
    y = (x[:, 0] + rng.normal(size=120) > 0.5).astype(float)
    fold = np.arange(120) % 4
    penalties = np.array([1.0, 1e-3, 1e-1])
    losses, left_out = [], np.empty((3, 120))
    for penalty, margins in zip(penalties, left_out, strict=True):
        for f in range(4):
            model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, tol=1e-10, class_weight="balanced"))
            margins[fold == f] = model.fit(x[fold != f], y[fold != f]).decision_function(x[fold == f])
        loss = np.logaddexp(0, -(2 * y - 1) * margins)
        losses.append(loss[y == 1].mean() + loss[y == 0].mean())
    recipe = Recipe(BUILT_IN["logistic"], penalties, 0.95, 1e-10, "cpu")
    chosen, margins, _ = choose(RowBlock.of(x), x, y[None], fold, np.arange(120), recipe)
    assert chosen[0] == penalties[np.argmin(losses)]
    # The fits that choose are proven to a relative gap of 1e-6, so ||dw||^2 is at most 2e-6 of an objective below n ln 2.
    bound = np.sqrt(2e-6 * 120 * np.log(2)) * np.linalg.norm((x - x.mean(axis=0)) / x.std(axis=0), axis=1).max()
    assert np.abs(margins[0] - left_out[np.argmin(losses)]).max() < bound


def test_a_direction_decides_like_its_probe_in_units_of_the_store(grid: ProbeGrid, store: MemoryStore) -> None:
    direction = grid.direction("attribute:green", 2, 0)
    x = store.read("decoder.L2.z", "last", examples=slice(None))[:, :6]
    assert direction.site == "decoder.L2.z"
    assert (direction.head, direction.tokens, direction.concept) == (0, "last", "attribute:green")
    assert np.linalg.norm(direction.vector) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(direction.decision(x), grid.decision("attribute:green", 2, 0, x), atol=1e-4)
    train = ~store.table["id"].isin(grid.held_out).to_numpy() & store.table["attribute:green"].notna().to_numpy()
    assert direction.sigma == pytest.approx(np.std(x[train] @ direction.vector), rel=1e-3)
    assert direction.statistics["balanced_accuracy"] == grid.array("attribute:green")[2, 0]
    assert direction.provenance["store"] == store.digest


def test_whole_layers_other_stacks_and_restricted_rows(store: MemoryStore) -> None:
    whole = fit_grid(store, ["object:apple"], "z", heads=False, control=0)
    assert whole.array("object:apple").shape == (3,)
    assert whole.best("object:apple").layer == 1
    assert whole.best("object:apple").head is None
    assert whole.frame()["head"].isna().all()
    assert whole.frame()["control"].isna().all()
    assert whole.direction("object:apple", 1).vector.shape == (24,)
    residual = fit_grid(store, ["object:apple"], "resid_post", control=0)
    assert residual.array("object:apple").max() < 0.7
    projector = fit_grid(store, ["object:apple"], "projector.out", tokens="image:mean", control=0)
    assert projector.array("object:apple").shape == (1,)
    assert projector.direction("object:apple", 0).site == "projector.out"
    rows = (store.table["kind"] == "color").to_numpy()
    part = fit_grid(store, ["object:apple"], "z", rows=rows, control=0)
    assert part.n_train[0] + part.n_test[0] == rows.sum()
    assert set(part.held_out) <= set(store.table["id"][rows])
    assert part.best("object:apple").head == 2


def test_rows_whose_selection_was_empty_are_dropped_and_counted(store: MemoryStore) -> None:
    got = fit_grid(store, PLANTED, "resid_post", tokens="object:mean", control=0)
    empty = np.isnan(store.values["decoder", "resid_post", "object:mean"][:, 0, 0])
    for k, concept in enumerate(PLANTED):
        defined = store.table[concept].notna().to_numpy()
        assert got.n_dropped[k] == (empty & defined).sum()
        assert got.n_train[k] + got.n_test[k] == (~empty & defined).sum()
    assert not set(got.held_out) & set(store.table["id"][empty])
    assert np.isfinite(got.held_out_margins).all()


def test_layers_keep_the_numbers_of_the_store(store: MemoryStore) -> None:
    class Sparse(MemoryStore):
        def read(self, site: str, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
            return super().read(site.replace("L12", "L0").replace("L17", "L1"), tokens, head, examples)

    sparse = Sparse(store.table, {("decoder", "z", "last"): store.values["decoder", "z", "last"][:, :2]})
    sparse.arrays = (ArrayInfo("decoder", "z", "last", 2, 24, 4, layers=(12, 17)),)
    got = fit_grid(sparse, ["object:apple"], control=0)
    assert got.best("object:apple").layer == 17
    assert set(got.frame()["layer"]) == {12, 17}
    with pytest.raises(ProbeError, match="layer 1 not in this grid; choose from 12, 17"):
        got.direction("object:apple", 1, 0)


def test_equal_seeds_give_equal_grids(store: MemoryStore) -> None:
    first, second, other = (fit_grid(store, ["object:apple"], "resid_post", seed=s, control=2) for s in (3, 3, 4))
    pd.testing.assert_frame_equal(first.frame(), second.frame())
    assert first.held_out == second.held_out != other.held_out


# ---- whether to believe it ---------------------------------------------------------------------------------------------


def test_on_pure_noise_scores_are_at_chance_and_intervals_cover_it() -> None:
    """Groups share features and labels, so rows are far from independent; the truth is 0.5 everywhere."""
    inside, scores, controls, trials = 0, [], [], 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        group = np.repeat(np.arange(150), 4)
        z = rng.normal(size=(150, 4, 16))[group] + rng.normal(size=(600, 4, 16))
        table = pd.DataFrame({"id": [f"q{i}" for i in range(600)], "group": [f"s{g}" for g in group]})
        for k in range(3):
            table[f"object:noun{k}"] = (rng.random(150) < 0.4)[group].astype(np.float32)
        got = fit_grid(
            MemoryStore(table, {("decoder", "z", "last"): z}),
            [f"object:noun{k}" for k in range(3)],
            C=(1e-2, 1.0),
            folds=3,
            resamples=400,
        )
        inside += int(((got.low <= 0.5) & (got.high >= 0.5)).sum())
        trials += got.low.size
        scores.append(got.balanced_accuracy.mean())
        controls.append(got.control.mean())
    assert np.mean(scores) == pytest.approx(0.5, abs=0.015)
    assert np.mean(controls) == pytest.approx(0.5, abs=0.015)
    # Cells of one store share their labels, so the binomial interval is taken at a fourth of the trials.
    low, high = wilson(round(inside / 4), trials // 4, confidence=0.99)
    assert low <= 0.95 <= high, inside / trials


def test_duplicated_images_across_folds_would_inflate_scores() -> None:
    """Labels are noise, but each image comes twice: split by row a probe learns it by heart, split by group it cannot."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(150, 1, 120)), 2, axis=0)
    table = pd.DataFrame({"id": [f"q{i}" for i in range(300)], "group": [f"s{i // 2}" for i in range(300)]})
    table["object:noun"] = np.repeat(rng.random(150) < 0.5, 2).astype(np.float32)
    arrays = {("decoder", "resid_post", "last"): x}
    by_group = fit_grid(MemoryStore(table, arrays), ["object:noun"], "resid_post", C=(1.0,))
    by_row = fit_grid(MemoryStore(table.assign(group=table["id"]), arrays), ["object:noun"], "resid_post", C=(1.0,))
    assert by_row.array("object:noun")[0] > 0.65
    assert by_group.array("object:noun")[0] < 0.6


# ---- files -------------------------------------------------------------------------------------------------------------


def test_a_loaded_grid_equals_the_saved_one(grid: ProbeGrid, tmp_path: Path) -> None:
    back = ProbeGrid.load(grid.save(tmp_path / "probes"))
    for item in fields(grid):
        before, after = getattr(grid, item.name), getattr(back, item.name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
            assert not after.flags.writeable
        else:
            assert before == after
    pd.testing.assert_frame_equal(grid.frame(), back.frame())
    assert sorted(p.name for p in (tmp_path / "probes").iterdir()) == ["grid.json", "grid.safetensors"]


def _version(folder: Path) -> None:
    card = json.loads((folder / "grid.json").read_text())
    (folder / "grid.json").write_text(json.dumps({**card, "version": 99}))


def _without_digest(folder: Path) -> None:
    card = json.loads((folder / "grid.json").read_text())
    (folder / "grid.json").write_text(json.dumps({**card, "version": 2}))
    _number(folder)


def _number(folder: Path) -> None:
    card = json.loads((folder / "grid.json").read_text())
    (folder / "grid.json").write_text(json.dumps({**card, "layers": [7, *card["layers"][1:]]}))


def _flip(folder: Path) -> None:
    data = bytearray((folder / "grid.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "grid.safetensors").write_bytes(data)


def _field(folder: Path) -> None:
    card = json.loads((folder / "grid.json").read_text())
    del card["layers"]
    (folder / "grid.json").write_text(json.dumps({**card, "digest": document_digest(card)}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_version, "is a probe grid of version 99"),
        (_flip, "does not match its card"),
        (_field, "is damaged"),
        (_number, "does not match its digest"),
        (_without_digest, "does not match its digest"),
        (lambda f: (f / "grid.json").write_text("{"), "invalid JSON"),
        (lambda f: (f / "grid.json").write_text("[]"), "grid.json is not a probe grid file"),
        (lambda f: (f / "grid.safetensors").unlink(), "no probe grid at .*grid.safetensors: no such file"),
    ],
)
def test_a_grid_that_is_damaged_or_of_another_version_is_refused(
    grid: ProbeGrid, tmp_path: Path, harm: Callable[[Path], object], message: str
) -> None:
    grid.save(tmp_path)
    harm(tmp_path)
    with pytest.raises(ProbeError, match=message):
        ProbeGrid.load(tmp_path)


def test_a_real_store_reads_the_same(store: MemoryStore, grid: ProbeGrid, tmp_path: Path) -> None:
    schema = Schema(arrays=store.arrays, dtype="float32")
    with StoreWriter(tmp_path / "s", schema, provenance={"model": "none"}) as writer:
        columns = {str(c): store.table[c].tolist() for c in store.table.columns}
        writer.append({key: x.astype(np.float32) for key, x in store.values.items()}, columns)
    with ActivationStore(tmp_path / "s") as real:
        assert set(probeable(real)) == set(PLANTED)
        got = fit_grid(real, PLANTED)
        assert got.provenance["store"] == real.digest
        pd.testing.assert_frame_equal(got.frame(), grid.frame())


# ---- bad input ---------------------------------------------------------------------------------------------------------


def changed(store: MemoryStore, **columns: Any) -> MemoryStore:
    return MemoryStore(store.table.assign(**columns), store.values)


def _one_group(store: MemoryStore) -> MemoryStore:
    return changed(store, **{"object:apple": (store.table["group"] == "scene3").astype(np.float32)})


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (None, {"concepts": ["object:pear"]}, "'object:pear' not in store; choose from object:apple, attribute:green"),
        (None, {"concepts": []}, "concepts must be a non-empty list"),
        (None, {"concepts": "object:apple"}, "concepts must be a non-empty list"),
        (None, {"concepts": ["object:apple"] * 2}, "repeated; give each concept once"),
        (lambda s: changed(s, **{"object:apple": 1.0}), {}, "is 1 on all 600 rows where it is defined"),
        (lambda s: changed(s, **{"object:apple": np.nan}), {}, "'object:apple' is undefined on all used rows"),
        (lambda s: changed(s, **{"object:apple": 0.5}), {}, "label 'object:apple' of example 'q0' is 0.5"),
        (_one_group, {}, r"class 1 of 'object:apple' is in 1 group \(4 rows\), 8 are needed .* use fewer folds"),
        (None, {"folds": 200}, "need 286 groups of each class"),
        (None, {"rows": np.arange(600) < 12}, "need 8 groups of each class"),
        (lambda s: changed(s, group=""), {}, "example 'q0' has no group"),
        (None, {"rows": np.ones(3, dtype=bool)}, "rows must be 600 booleans"),
        (None, {"rows": np.zeros(600, dtype=bool)}, "selects none"),
        (None, {"C": ()}, "C="),
        (None, {"C": (0.0,)}, "C="),
        (None, {"folds": 1}, "folds=1"),
        (None, {"test_fraction": 1.0}, "test_fraction"),
        (None, {"control": -1}, "control=-1"),
    ],
)
def test_invalid_concepts_are_refused_before_activations_are_read(
    store: MemoryStore,
    make: Callable[[MemoryStore], MemoryStore] | None,
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: Any, **__: Any) -> np.ndarray:
        pytest.fail("activations were read")

    bad = make(store) if make else MemoryStore(store.table, store.values)
    monkeypatch.setattr(bad, "read", read)
    with pytest.raises(ProbeError, match=message):
        fit_grid(bad, **{"concepts": ["object:apple"], **options})


def test_values_that_are_not_finite_are_named(store: MemoryStore) -> None:
    for value in (np.nan, np.inf):
        z = store.values["decoder", "z", "last"].copy()
        z[7, 1, 3] = value
        bad = MemoryStore(store.table, {**store.values, ("decoder", "z", "last"): z})
        with pytest.raises(ProbeError, match=r"decoder\.L1\.z at last: example 'q7' has 1 of 24 values"):
            fit_grid(bad, ["object:apple"], control=0)
        assert fit_grid(bad, ["object:apple"], control=0, rows=np.arange(600) >= 8).n_test[0] > 0
    z[7] = [[0.0], [np.nan], [0.0]]
    bad = MemoryStore(store.table, {("decoder", "z", "last"): z})
    with pytest.raises(ProbeError, match="'q7' is empty in one layer and not in another"):
        fit_grid(bad, ["object:apple"], control=0)


def test_missing_arrays_are_named(store: MemoryStore) -> None:
    with pytest.raises(SiteError, match=re.escape("vision.z at last not in store; choose from decoder.z at last")):
        fit_grid(store, ["object:apple"], site="vision.z")
    with pytest.raises(SiteError, match=r"decoder.resid_post has no heads"):
        fit_grid(store, ["object:apple"], "resid_post", heads=True)
    with pytest.raises(SiteError, match="unknown token selection 'first'"):
        fit_grid(store, ["object:apple"], tokens="first")


def test_unknown_concepts_layers_and_heads_of_a_grid_are_refused(grid: ProbeGrid, store: MemoryStore) -> None:
    for call, message in (
        (lambda: grid.array("object:pear"), "'object:pear' not in this grid; choose from object:apple"),
        (lambda: grid.array("object:apple", "charm"), "unknown score 'charm'; choose from balanced_accuracy"),
        (lambda: grid.direction("object:apple", 1), "choose from 0-3"),
        (lambda: grid.direction("object:apple", 1, 4), "head 4 not in this grid"),
        (lambda: grid.decision("object:apple", 1, 0, np.ones((2, 5))), r"the probe needs \[n, 6\]"),
    ):
        with pytest.raises(ProbeError, match=message):
            call()
    whole = fit_grid(store, ["object:apple"], "resid_post", control=0)
    with pytest.raises(ProbeError, match="not valid for a grid of whole layers"):
        whole.direction("object:apple", 1, 0)
    flat = MemoryStore(store.table, {("decoder", "resid_post", "last"): np.ones((600, 1, 5))})
    silent = fit_grid(flat, ["object:apple"], "resid_post")
    assert silent.array("object:apple")[0] == 0.5
    with pytest.raises(ProbeError, match="has no direction: its features are constant"):
        silent.direction("object:apple", 0)


def test_concepts_that_can_be_probed_are_listed(store: MemoryStore) -> None:
    assert probeable(store) == PLANTED
    assert probeable(_one_group(store)) == PLANTED[1:]
    assert probeable(store, rows=np.arange(600) < 12) == ()


def test_probing_needs_no_model() -> None:
    code = (
        "import sys; import probes, probes.fit, probes.grid, probes.solvers.logistic_reference, probes.protocol.splits, "
        "probes.protocol.controls\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'nnsight', 'transformers', 'transformer_lens'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"
