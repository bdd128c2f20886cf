"""Comparison of two finished runs: every difference against numpy, scipy and scikit-learn, from the files of the runs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import balanced_accuracy_score

from behavior import BehaviorResult, answer
from behavior.result import Answer, Cost
from circuits.results.head_scores import HeadScores
from concepts.schema import ConceptDataset
from diagnosis import compare_models, compare_profiles
from diagnosis.results import Diagnoses, Diagnosis
from experiments.results.comparison import DIAGNOSES, compare_runs, read_run
from groundscope.core.errors import ConfigError, DataError
from groundscope.testing import planted_failures
from groundscope.testing.planted_circuits import plant
from probes import fit_grid
from tests.toys.memory_store import make_store


def answers(right: np.ndarray) -> BehaviorResult:
    return BehaviorResult(
        tuple(
            Answer(
                id=f"q{i}", group=f"g{i // 2}", split="neutral", level="object", kind="existence", question="?",
                answer="no", candidates=("yes", "no"), given="no" if r else "yes", correct=bool(r),
            )
            for i, r in enumerate(right)
        ),
        Cost(1, 1, len(right)),
    )  # fmt: skip


def diagnosis(name: str, verdict: str | None) -> Diagnosis:
    about = {"id": name, "group": name, "level": "object", "split": "neutral", "kind": "existence"}
    return Diagnosis({**about, "question": "?", "truth": "no"}, "yes", "object:bell", verdict, 0.8)


def scores(effects: np.ndarray) -> HeadScores:
    n = len(effects)
    names = tuple(f"p{i}" for i in range(n))
    return HeadScores(
        effects, np.ones(n), -np.ones(n), ids=names, groups=names, levels=("object",) * n, kinds=("color",) * n,
        tokens="last", mode="denoise", min_effect=0.5, excluded=0, model="m", config_hash="c", weights_hash="w",
        pairs_digest="d",
    )  # fmt: skip


RNG = np.random.default_rng(0)
RIGHT = (RNG.random(60) < 0.5, RNG.random(60) < 0.8)
EFFECTS = (RNG.normal(size=(12, 3, 4)), RNG.normal(size=(12, 3, 4)))
VERDICTS = (
    ["not seen", None, "other", "not seen", None, "other"],
    ["not seen", None, None, "overridden by the prior", "other", "other"],
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two run folders, written as stages write them."""
    root = tmp_path_factory.mktemp("runs")
    for k, name in enumerate("ab"):
        folder = root / name
        answers(RIGHT[k]).save(folder / "behavior" / "before.json")
        store = make_store(seed=0, n_groups=60)
        grid = fit_grid(store, ["object:apple"], site="resid_post", control=0, folds=2, C=[0.01], resamples=20)
        margins = grid.held_out_margins if k == 0 else grid.held_out_margins + np.float32(0.7)
        labels = grid.held_out_labels[0]
        accuracy = np.array([[[balanced_accuracy_score(labels, m > 0)] for m in margins[0, :, 0]]])
        replace(grid, held_out_margins=margins, balanced_accuracy=accuracy).save(folder / "probes" / "decoder.x@last")
        scores(EFFECTS[k]).save(folder / "circuits" / "color.safetensors")
        diagnoses = tuple(diagnosis(f"q{i}", v) for i, v in enumerate(VERDICTS[k]))
        Diagnoses(diagnoses, (), "m", "c", "w").save(folder / DIAGNOSES)
    return root / "a", root / "b"


def test_answers_are_compared_question_by_question(runs: tuple[Path, Path]) -> None:
    comparison = compare_runs(*runs)
    row = comparison.answers.set_index("measure").loc["all: right"]
    assert row["difference"] == pytest.approx(RIGHT[1].mean() - RIGHT[0].mean())
    gained, lost = int((RIGHT[1] & ~RIGHT[0]).sum()), int((RIGHT[0] & ~RIGHT[1]).sum())
    assert (row["gained"], row["lost"]) == (gained, lost)
    # Two questions an image: p is the share of random signs of images with a sum as far from 0 as the observed one.
    net = np.abs((RIGHT[1].astype(int) - RIGHT[0]).reshape(30, 2).sum(1))
    chances = {0: 1.0}
    for step in net[net > 0].tolist():
        moved = [(total + sign * step, chance / 2) for total, chance in chances.items() for sign in (-1, 1)]
        chances = {total: sum(c for k, c in moved if k == total) for total, _ in moved}
    assert row["p"] == pytest.approx(sum(c for total, c in chances.items() if abs(total) >= abs(gained - lost)))
    # The normal interval of the mean of 30 images' mean changes, by hand.
    by_image = (RIGHT[1].astype(float) - RIGHT[0]).reshape(30, 2).mean(1)
    half = 1.96 * by_image.std(ddof=1) / np.sqrt(30)
    assert row["low"] == pytest.approx(by_image.mean() - half, abs=0.05)
    assert row["high"] == pytest.approx(by_image.mean() + half, abs=0.05)
    assert "all: right" in comparison.text()
    assert len(comparison.changed("answers")) == len(
        comparison.answers
    )  # all measures are over the same questions here


def test_probes_and_heads_are_compared_on_what_both_have(runs: tuple[Path, Path]) -> None:
    comparison = compare_runs(*runs)
    a, b = (read_run(path).grids["decoder.x@last"] for path in runs)
    truth = a.held_out_labels[0]
    for at, row in enumerate(comparison.probes.to_dict("records")):
        expected = [balanced_accuracy_score(truth, g.held_out_margins[0, at, 0] > 0) for g in (a, b)]
        assert row["first"] == pytest.approx(expected[0])
        assert row["difference"] == pytest.approx(expected[1] - expected[0])
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["paired"]
    table = comparison.heads
    change = EFFECTS[1].astype(np.float32).mean(0) - EFFECTS[0].astype(np.float32).mean(0)
    np.testing.assert_allclose(table["difference"].to_numpy(), change.ravel(), atol=1e-6)
    assert table["name"][5] == "L1.H1"
    rank = spearmanr(EFFECTS[0].mean(0).ravel(), EFFECTS[1].mean(0).ravel()).statistic
    assert comparison.ranking["rank_correlation"][0] == pytest.approx(rank, abs=1e-6)


def test_verdicts_are_counted_in_pairs(runs: tuple[Path, Path]) -> None:
    comparison = compare_runs(*runs)
    expected = Counter(zip(*([v or "right" for v in some] for some in VERDICTS), strict=True))
    assert {(r["first"], r["second"]): r["n"] for r in comparison.verdicts.to_dict("records")} == expected


def test_a_run_compared_with_itself_has_no_differences(runs: tuple[Path, Path], tmp_path: Path) -> None:
    comparison = compare_runs(runs[0], runs[0])
    for part in ("answers", "probes", "heads"):
        assert (comparison.frame(part)["difference"] == 0).all()
        assert not len(comparison.changed(part))
    assert comparison.ranking["rank_correlation"][0] == pytest.approx(1)
    assert comparison.notes == ()
    saved = json.loads(comparison.save(tmp_path / "c.json").read_text())
    assert saved["answers"][0]["difference"] == 0
    assert saved["provenance"]["first"]["files"]


def test_incomparable_parts_are_named(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no answers 'before' in the run folder .*finish the run first"):
        compare_runs(runs[0], tmp_path)
    with pytest.raises(ConfigError, match=r"no answers 'after' in .*: there are answers before"):
        compare_runs(*runs, conditions=("before", "after"))
    a, b = (read_run(path) for path in runs)
    fewer = replace(b, answers=answers(RIGHT[1][:50]))
    with pytest.raises(DataError, match="answered different questions"):
        compare_profiles(a, fewer)
    small = replace(b, heads={"color": scores(EFFECTS[1][:, :2])}, grids={}, diagnoses=None)
    notes = " ".join(compare_profiles(a, small).notes)
    assert "only one of the two" in notes
    assert "layers and heads cannot be compared" in notes
    with pytest.raises(ConfigError, match=r"unknown table 'answer'; choose from answers, .*did you mean answers"):
        compare_profiles(a, b).frame("answer")


def test_two_models_in_memory_are_compared_on_answers_probes_and_verdicts() -> None:
    """A head that speaks for the usual color is made louder: the answers that turn are those it turns."""
    planted = plant(0)
    assert planted.prior is not None
    louder = planted_failures.amplify_head(planted.model, planted.prior, 8.0)
    examples = [
        replace(e, labels={f"attribute:{c}": e.answer == c for c in e.candidates}) for e in planted.examples(300, 5)
    ]
    data = ConceptDataset("squares", tuple(examples))
    comparison = compare_models(planted.model, louder, data)
    before, after = (answer(m, data, progress=False).answers for m in (planted.model, louder))
    row = comparison.answers.set_index("measure").loc["all: right"]
    assert row["first"] == pytest.approx(np.mean([bool(a.correct) for a in before]))
    assert row["second"] == pytest.approx(np.mean([bool(a.correct) for a in after]))
    turned = comparison.verdicts.set_index(["first", "second"])["n"]
    assert turned["right", "overridden by the prior"] == turned.drop(("right", "right")).sum() > 20
    assert comparison.probes["paired"].all()
    assert "overridden by the prior" in comparison.text()
