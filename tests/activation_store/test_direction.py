"""Directions: what they decide, and that a file gives back what was saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from activation_store import ConceptDirection
from groundscope.core.errors import SiteError, StoreError

UNIT = np.array([0.6, 0.8], np.float32)


def test_decision_is_the_classifiers() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 5)).astype(np.float32)
    y = x @ rng.normal(size=5) + 0.5 > 0
    fitted = LogisticRegression(C=1.0, tol=1e-10).fit(x, y)
    direction = ConceptDirection.from_weights(
        "decoder.L3.resid_post", "last", "attribute:green", fitted.coef_[0], intercept=float(fitted.intercept_[0])
    )
    np.testing.assert_allclose(direction.decision(x), fitted.decision_function(x), rtol=1e-5, atol=1e-5)
    assert abs(np.linalg.norm(direction.vector) - 1) < 1e-6


def test_saved_and_loaded(tmp_path: Path) -> None:
    direction = ConceptDirection(
        site="decoder.L3.z",
        tokens="image:mean",
        concept="object:äpfel",
        vector=UNIT,
        head=5,
        sigma=0.1,
        scale=3.0,
        intercept=-2.5,
        statistics={"balanced_accuracy": 0.93, "undefined": float("nan")},
        provenance={"store": "ab" * 32, "method": {"name": "logistic", "penalty": 0.1}},
        train_groups=("scene 1", "scene 2"),
        kind="attribute what_color",
    )
    path = direction.save(tmp_path / "deep" / "green.safetensors")
    loaded = ConceptDirection.load(path)
    np.testing.assert_array_equal(loaded.vector, UNIT)
    for name in (
        "site",
        "tokens",
        "concept",
        "head",
        "sigma",
        "scale",
        "intercept",
        "provenance",
        "train_groups",
        "kind",
    ):
        assert getattr(loaded, name) == getattr(direction, name), name
    assert loaded.statistics["balanced_accuracy"] == 0.93
    assert np.isnan(loaded.statistics["undefined"])
    assert [p.name for p in path.parent.iterdir()] == ["green.safetensors"]
    with pytest.raises(ValueError, match="read-only"):
        loaded.vector[0] = 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"site": "decoder.z"}, SiteError, "is not a site"),
        ({"tokens": "first"}, SiteError, "unknown token selection"),
        ({"site": "decoder.L0.resid_post", "head": 1}, SiteError, "heads exist at 'z'"),
        ({"vector": UNIT * 2}, StoreError, "length 2"),
        ({"vector": UNIT * np.nan}, StoreError, "length nan"),
        ({"vector": UNIT[None]}, StoreError, r"shape \[1, 2\]"),
        ({"sigma": -1.0}, StoreError, "sigma=-1"),
        ({"scale": 0.0}, StoreError, "scale=0"),
        ({"intercept": float("inf")}, StoreError, "all finite"),
    ],
)
def test_directions_that_cannot_be(change: dict, error: type[Exception], message: str) -> None:
    usual = {"site": "decoder.L0.z", "tokens": "last", "concept": "object:apple", "vector": UNIT}
    with pytest.raises(error, match=message):
        ConceptDirection(**{**usual, **change})


def test_weights_that_point_nowhere() -> None:
    with pytest.raises(StoreError, match="not all 0"):
        ConceptDirection.from_weights("decoder.L0.z", "last", "object:apple", np.zeros(4))


def test_files_that_are_no_direction(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(StoreError, match="no such file"):
        ConceptDirection.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    save_file({"vector": UNIT}, tmp_path / "other.safetensors")
    for name, words in (
        ("text", "damaged, or not a safetensors file"),
        ("other", "is not a direction file"),
    ):
        with pytest.raises(StoreError, match=words):
            ConceptDirection.load(tmp_path / f"{name}.safetensors")
