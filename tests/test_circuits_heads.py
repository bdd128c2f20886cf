"""Head scores: numbers against numpy, choices, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from circuits import HeadScores, random_heads
from concepts.errors import PatchError, StoreError
from lvlm import Head


def scores(n: int = 40, groups: int = 10, seed: int = 0, direction: str = "denoise") -> HeadScores:
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
        direction=direction,
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
    narrow_low, narrow_high = s.interval(level=0.5)
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
        with pytest.raises(PatchError, match="there are 12 heads"):
            s.top(k)


def test_patching_effect_of_both_directions() -> None:
    s, noise = scores(), scores(direction="noise")
    np.testing.assert_array_equal(s.patching_effect, s.effects)
    np.testing.assert_allclose(noise.patching_effect, 1 - noise.effects)


def test_select() -> None:
    s = scores()
    some = s.select(np.array(s.levels) == "object")
    assert set(some.levels) == {"object"}
    np.testing.assert_array_equal(some.effects, s.effects[1::2])
    assert some.ids == s.ids[1::2]
    with pytest.raises(PatchError, match="at least one"):
        s.select(np.zeros(s.n_pairs, bool))


def test_random_heads() -> None:
    s = scores()
    drawn = s.random_heads(4, seed=1, exclude=s.top(2))
    assert len(set(drawn)) == 4
    assert not set(drawn) & set(s.top(2))
    assert drawn == random_heads(4, 1, s.top(2), shape=(3, 4)) != random_heads(4, 2, s.top(2), shape=(3, 4))
    every = [h for seed in range(300) for h in random_heads(1, seed, shape=(3, 4))]
    assert len(set(every)) == 12
    with pytest.raises(PatchError, match="10 of 12 are left"):
        s.random_heads(11, seed=0, exclude=s.top(2))


def test_frozen() -> None:
    s = scores()
    with pytest.raises(ValueError, match="read-only"):
        s.effects[0] = 0
    with pytest.raises(AttributeError):
        s.tokens = "suffix"  # pyright: ignore[reportAttributeAccessIssue]  # it is frozen
    with pytest.raises(PatchError, match="as many of the rest"):
        HeadScores(**{**vars(s), "ids": ("one",)})


def test_save_and_load(tmp_path: Path) -> None:
    s = scores()
    loaded = HeadScores.load(s.save(tmp_path / "deep" / "heads.safetensors"))
    for name in vars(s):
        left, right = getattr(s, name), getattr(loaded, name)
        if isinstance(left, np.ndarray):
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right, name


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
    with pytest.raises(StoreError, match="is no head_scores"):
        HeadScores.load(tmp_path / "other")
    with safe_open(str(path), framework="numpy") as file:
        card = json.loads((file.metadata() or {})["head_scores"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    save_file(tensors, tmp_path / "newer", metadata={"head_scores": json.dumps({**card, "version": 99})})
    with pytest.raises(StoreError, match="version 99"):
        HeadScores.load(tmp_path / "newer")
    del card["groups"]
    save_file(tensors, tmp_path / "gap", metadata={"head_scores": json.dumps(card)})
    with pytest.raises(StoreError, match="damaged head scores"):
        HeadScores.load(tmp_path / "gap")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        scores().save(tmp_path / "file" / "heads.safetensors")
