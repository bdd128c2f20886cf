"""Head scores: numbers against numpy, choices, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import stats

from circuits import HeadScores, compare, patch_heads, random_heads
from groundscope.core.errors import PatchError, StoreError
from groundscope.testing import planted_circuits
from lvlm import Head


def scores(n: int = 40, groups: int = 10, seed: int = 0, mode: str = "denoise") -> HeadScores:
    rng = np.random.default_rng(seed)
    group = rng.integers(groups, size=n)
    effects = 0.1 * rng.standard_normal((n, 3, 4)) + 0.2 * rng.standard_normal(groups)[group][:, None, None]
    effects[:, 1, 2] += 0.8
    effects[:, 2, 0] += 0.4
    return HeadScores(
        effects=effects,
        clean=np.ones(n),
        corrupt=-np.ones(n),
        ids=tuple(f"e{i}" for i in range(n)),
        groups=tuple(f"g{g}" for g in group),
        levels=tuple("object" if i % 2 else "attribute" for i in range(n)),
        kinds=("color",) * n,
        tokens="last",
        mode=mode,
        min_effect=0.5,
        excluded=2,
        model="m",
        config_hash="c",
        weights_hash="w",
        pairs_digest="d",
        provenance={"seed": seed},
    )


def test_mean_and_clustered_error() -> None:
    s = scores()
    np.testing.assert_allclose(s.mean, s.effects.astype(np.float64).mean(0), rtol=1e-12)
    names = sorted(set(s.groups))
    residual = [
        sum(s.effects[i].astype(np.float64) - s.mean for i in range(s.n_pairs) if s.groups[i] == name) for name in names
    ]
    expected = np.sqrt(len(names) / (len(names) - 1) * sum(np.square(r) for r in residual)) / s.n_pairs
    np.testing.assert_allclose(s.standard_error, expected, rtol=1e-10)


def test_error_of_independent_pairs_is_the_textbook_one() -> None:
    s = scores()
    alone = HeadScores(**{**vars(s), "groups": s.ids})
    textbook = s.effects.astype(np.float64).std(0, ddof=1) / np.sqrt(s.n_pairs)
    np.testing.assert_allclose(alone.standard_error, textbook, rtol=1e-10)
    # Pairs of one scene that rise and fall together say less.
    assert (s.standard_error > 1.3 * alone.standard_error).all()


def test_one_group_has_no_error() -> None:
    s = HeadScores(**{**vars(scores()), "groups": ("g",) * 40})
    assert np.isnan(s.standard_error).all()


def test_interval_covers_like_the_normal_one_and_is_reproducible() -> None:
    s = scores(n=400, groups=100)
    low, high = s.interval()
    assert ((low < s.mean) & (s.mean < high)).all()
    np.testing.assert_allclose(high - low, 2 * 1.96 * s.standard_error, rtol=0.15)
    np.testing.assert_array_equal(low, s.interval()[0])
    narrow_low, narrow_high = s.interval(confidence=0.5)
    assert ((narrow_low > low) & (narrow_high < high)).all()


def test_top_and_frame_agree() -> None:
    s = scores()
    assert s.top(2) == (Head(1, 2), Head(2, 0))
    frame = s.frame()
    assert len(frame) == 12
    assert list(frame.sort_values("rank")["name"][:2]) == ["L1.H2", "L2.H0"]
    np.testing.assert_allclose(frame["effect"], s.mean.ravel())
    assert (frame["low"] <= frame["effect"]).all()
    for k in (0, 13):
        with pytest.raises(PatchError, match="must be between 1 and 12 heads"):
            s.top(k)


def test_patching_effect_of_both_directions() -> None:
    s, noise = scores(), scores(mode="noise")
    np.testing.assert_array_equal(s.patching_effect, s.effects)
    np.testing.assert_allclose(noise.patching_effect, 1 - noise.effects)


def test_select() -> None:
    s = scores()
    some = s.select(np.array(s.levels) == "object")
    assert set(some.levels) == {"object"}
    np.testing.assert_array_equal(some.effects, s.effects[1::2])
    assert some.ids == s.ids[1::2]
    with pytest.raises(PatchError, match="all fields of equal length >= 1"):
        s.select(np.zeros(s.n_pairs, bool))


def test_random_heads() -> None:
    s = scores()
    heads = s.random_heads(4, seed=1, exclude=s.top(2))
    assert len(set(heads)) == 4
    assert not set(heads) & set(s.top(2))
    assert heads == random_heads((3, 4), 4, exclude=s.top(2), seed=1)
    assert heads != random_heads((3, 4), 4, exclude=s.top(2), seed=2)
    every = [h for seed in range(300) for h in random_heads((3, 4), 1, seed=seed)]
    assert len(set(every)) == 12
    with pytest.raises(PatchError, match="10 of 12 heads are available"):
        s.random_heads(11, seed=0, exclude=s.top(2))


def test_frozen() -> None:
    s = scores()
    with pytest.raises(ValueError, match="read-only"):
        s.effects[0] = 0
    with pytest.raises(AttributeError):
        s.tokens = "suffix"  # pyright: ignore[reportAttributeAccessIssue]  # it is frozen
    with pytest.raises(PatchError, match="all fields of equal length"):
        HeadScores(**{**vars(s), "ids": ("one",)})


def test_save_and_load(tmp_path: Path) -> None:
    s = scores()
    loaded = HeadScores.load(s.save(tmp_path / "deep" / "heads.safetensors"))
    for name in vars(s):
        saved, restored = getattr(s, name), getattr(loaded, name)
        if isinstance(saved, np.ndarray):
            np.testing.assert_array_equal(saved, restored)
        else:
            assert saved == restored, name


def test_files_that_are_not_head_scores(tmp_path: Path) -> None:
    path = scores().save(tmp_path / "heads.safetensors")
    with pytest.raises(StoreError, match="no such file"):
        HeadScores.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(StoreError, match="damaged"):
        HeadScores.load(tmp_path / "text")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StoreError, match="damaged"):
        HeadScores.load(tmp_path / "cut")
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "other")
    with pytest.raises(StoreError, match="is not a head_scores file"):
        HeadScores.load(tmp_path / "other")
    with safe_open(str(path), framework="numpy") as file:
        card = json.loads((file.metadata() or {})["head_scores"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    save_file(tensors, tmp_path / "newer", metadata={"head_scores": json.dumps({**card, "version": 99})})
    with pytest.raises(StoreError, match="version 99"):
        HeadScores.load(tmp_path / "newer")
    del card["groups"]
    save_file(tensors, tmp_path / "gap", metadata={"head_scores": json.dumps(card)})
    with pytest.raises(StoreError, match="damaged file of head scores"):
        HeadScores.load(tmp_path / "gap")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        scores().save(tmp_path / "file" / "heads.safetensors")


# ---- how far they are to be believed


def test_sign_is_the_share_of_groups_above_zero() -> None:
    s = scores()
    expected = np.zeros(s.shape)
    names = sorted(set(s.groups))
    for name in names:
        expected += np.mean([s.effects[i] for i in range(s.n_pairs) if s.groups[i] == name], axis=0) > 0
    np.testing.assert_allclose(s.sign, expected / len(names))
    assert s.sign[1, 2] == 1


def test_family_wise_p_against_a_loop() -> None:
    s = scores(n=30, groups=8)
    flips, names = 400, sorted(set(s.groups))
    sums = np.stack([s.effects[np.array(s.groups) == name].astype(np.float64).sum(0) for name in names])
    signs = np.random.default_rng(5).integers(0, 2, size=(flips, len(names))) * 2 - 1

    def statistic(sign: np.ndarray) -> np.ndarray:
        flipped = [sign[g] * sums[g] for g in range(len(names))]
        return np.abs(np.sum(flipped, axis=0)) / np.sqrt(np.sum(np.square(sums), axis=0))

    observed = statistic(np.ones(len(names)))
    largest = [statistic(sign).max() for sign in signs]
    expected = np.array([[(1 + sum(m >= v - 1e-12 for m in largest)) / (1 + flips) for v in row] for row in observed])
    np.testing.assert_allclose(s.family_p(flips=flips, seed=5), expected, rtol=1e-12)
    # The strongest head, and 8 groups: 2 in 256 flips are as extreme.
    assert expected[1, 2] < 0.03


def test_a_head_without_any_effect_has_p_one() -> None:
    s = scores()
    effects = s.effects.copy()
    effects[:, 0, 0] = 0
    p = HeadScores(**{**vars(s), "effects": effects}).family_p()
    assert p[0, 0] == 1
    assert np.isfinite(p).all()


def test_noise_is_called_an_effect_no_more_often_than_stated() -> None:
    """Groups of unlike size and spread, heads that hang together: what a test that assumed less would get wrong."""
    rng = np.random.default_rng(3)
    s, runs, level = scores(n=36, groups=12), 400, 0.1
    members = np.array(s.groups)
    wrong = 0
    for run in range(runs):
        shared = rng.standard_t(3, (s.n_pairs, 1, 1))
        noise = shared * rng.normal(size=s.shape) + rng.laplace(size=s.effects.shape)
        for k, name in enumerate(sorted(set(s.groups))):
            noise[members == name] = (1 + k) * (noise[members == name] + rng.standard_t(3, s.shape))
        wrong += HeadScores(**{**vars(s), "effects": noise}).family_p(flips=99, seed=run).min() <= level
    # Exactly at the level, but for the binomial error of 400 runs (standard error .015).
    assert 0.055 <= wrong / runs <= 0.145


def test_shuffled_pairs_stay_within_the_null() -> None:
    """Which picture of a pair is called clean is drawn by lot: what remains must not look like an effect."""
    p = planted_circuits.plant(4)
    measured = patch_heads(p.model, p.pairs(24))
    logits = measured.effects * (measured.clean - measured.corrupt)[:, None, None]
    rng, runs = np.random.default_rng(0), 200
    wrong = 0
    for run in range(runs):
        turned = logits * rng.choice([-1.0, 1.0], measured.n_pairs)[:, None, None]
        wrong += HeadScores(**{**vars(measured), "effects": turned}).family_p(flips=99, seed=run).min() <= 0.05
    assert wrong / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert p.grounding is not None
    assert measured.family_p()[p.grounding.layer, p.grounding.head] < 0.001


def test_stability_against_scipy() -> None:
    s = scores(n=60, groups=20)
    stability = s.stability(k=3, splits=50, seed=1)
    names = np.array(sorted(set(s.groups)))
    order = np.argsort(np.random.default_rng(1).random((50, len(names))), axis=1)
    correlations, overlaps = [], []
    for row in order:
        inside = np.isin(s.groups, names[row < len(names) // 2])
        a, b = (s.effects[m].astype(np.float64).mean(0).ravel() for m in (inside, ~inside))
        correlations.append(stats.spearmanr(a, b).statistic)
        overlaps.append(len(set(np.argsort(-a)[:3]) & set(np.argsort(-b)[:3])) / 3)
    for estimate, draws in ((stability.rank_correlation, correlations), (stability.overlap, overlaps)):
        assert estimate.value == pytest.approx(np.median(draws))
        assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert stability.chance == 0.25
    noise = HeadScores(**{**vars(s), "effects": np.random.default_rng(0).normal(size=(60, 3, 4))})
    assert abs(noise.stability(k=3).rank_correlation.value) < 0.45 < stability.rank_correlation.value
    with pytest.raises(PatchError, match="needs at least 4 groups; got 3"):
        HeadScores(**{**vars(s), "groups": tuple(f"g{i % 3}" for i in range(60))}).stability()


def test_comparison_of_the_same_pairs_is_paired() -> None:
    a, b = scores(n=60, groups=20), scores(n=60, groups=20, seed=0)
    moved = HeadScores(**{**vars(b), "effects": b.effects + 0.25})
    same = compare(a, moved, k=(1, 3))
    assert same.rank_correlation.value == same.rank_correlation.low == pytest.approx(1)
    assert same.overlap[3].low == 1
    np.testing.assert_allclose(same.difference, -0.25, atol=1e-6)
    # What all groups share leaves the difference without spread, whatever the groups' own spread is.
    np.testing.assert_allclose(same.high - same.low, 0, atol=1e-6)
    assert same.groups == (0, 0, len(set(a.groups)))
    assert same.chance(3) == 0.25


def test_comparison_against_a_naive_bootstrap() -> None:
    a = scores(n=60, groups=20)
    rng = np.random.default_rng(2)
    b = HeadScores(**{**vars(a), "effects": a.effects + rng.normal(size=a.effects.shape)})
    other = HeadScores(**{**vars(b), "groups": tuple(f"other{g}" for g in b.groups)})
    for second, shared in ((b, True), (other, False)):
        comparison = compare(a, second, k=(3,), resamples=2000)
        names = sorted(set(a.groups))
        rows = [np.flatnonzero(np.array(a.groups) == name) for name in names]
        differences, correlations = [], []
        for _ in range(400):
            first_draw = rng.integers(len(names), size=len(names))
            second_draw = first_draw if shared else rng.integers(len(names), size=len(names))
            x, y = (
                s.effects[np.concatenate([rows[i] for i in d])].astype(np.float64).mean(0).ravel()
                for s, d in ((a, first_draw), (second, second_draw))
            )
            differences.append(x - y)
            correlations.append(stats.spearmanr(x, y).statistic)
        width = np.subtract(*np.quantile(differences, [0.975, 0.025], axis=0))
        np.testing.assert_allclose((comparison.high - comparison.low).ravel(), width, rtol=0.3)
        middle = stats.spearmanr(a.mean.ravel(), second.mean.ravel()).statistic
        assert comparison.rank_correlation.value == pytest.approx(middle)
        low, high = np.quantile(correlations, [0.025, 0.975])
        assert (comparison.rank_correlation.low, comparison.rank_correlation.high) == pytest.approx(
            (low, high), abs=0.12
        )
    assert compare(a, other).groups == (len(names), len(names), 0)
    with pytest.raises(PatchError, match="differ in layers or heads"):
        compare(a, HeadScores(**{**vars(a), "effects": a.effects[:, :2]}))
    with pytest.raises(PatchError, match="k=13"):
        compare(a, b, k=(13,))


def test_heatmap(tmp_path: Path) -> None:
    s = scores()
    ax = s.heatmap(tmp_path / "deep" / "heads.png")
    assert (tmp_path / "deep" / "heads.png").stat().st_size > 1000
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), s.mean)
    low, high = ax.images[0].get_clim()
    assert -low == high == pytest.approx(np.abs(s.mean).max())
    x, y = ax.lines[0].get_data()
    assert {(int(b), int(a)) for a, b in zip(x, y, strict=True)} == set(
        zip(*np.nonzero(s.family_p() <= 0.05), strict=True)
    )
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert s.heatmap(ax=axes) is axes


def test_a_file_written_by_the_first_version_still_opens(tmp_path: Path) -> None:
    card = {
        "version": 1, "ids": ["a", "b"], "groups": ["g", "h"], "levels": ["object"] * 2,
        "kinds": ["object"] * 2, "tokens": "suffix", "direction": "noise", "min_effect": 0.5, "excluded": 1, "model": "m",
        "config_hash": "c", "weights_hash": "w", "pairs_digest": "d",
        "provenance": {"metric": "kl", "path": "shared prefix"},
    }  # fmt: skip
    tensors = {
        "effects": np.ones((2, 3, 4), np.float32),
        "clean": np.ones(2, np.float32),
        "corrupt": np.zeros(2, np.float32),
    }
    save_file(tensors, tmp_path / "old.safetensors", metadata={"head_scores": json.dumps(card)})
    old = HeadScores.load(tmp_path / "old.safetensors")
    assert (old.mode, old.tokens, old.shape, old.ids) == ("noise", "suffix:all", (3, 4), ("a", "b"))
    assert (old.metric, dict(old.provenance)) == ("kl", {"path": "shared prefix"})
    assert old.frame()["sign"].eq(1).all()
    rewritten = HeadScores.load(old.save(tmp_path / "new.safetensors"))
    assert (rewritten.mode, rewritten.metric, rewritten.select(np.array([1])).ids) == ("noise", "kl", ("b",))
