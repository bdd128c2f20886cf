"""V-information against scikit-learn, closed forms and synthetic codes with a known answer."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression

from activation_store import MemorySource
from groundscope.core.errors import ConfigError, GroundscopeError, ProbeError, StoreError
from probes import (
    InformationPath,
    PathSite,
    PredictiveFamily,
    image_sites,
    infonce,
    information_path,
    measure_information,
    predictive_families,
)
from probes.information.changes import Draws, describe, holm
from probes.information.folds import make_folds
from probes.information.linear import fit_linear
from probes.information.nonlinear import mlp_gradients
from probes.information.problem import Problem, share_predictor
from probes.information.reduction import reduce_folds, reduce_rows
from probes.information.width_control import pad_site


def gaussians(mu: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes, one feature N(+-mu, 1), and the pointwise information of the true model."""
    rng = np.random.default_rng(seed)
    z = np.arange(n) % 2
    sign = 2 * z - 1
    x = (mu * sign + rng.normal(size=n))[:, None]
    return z, x, math.log(2) - np.log1p(np.exp(-2 * mu * x[:, 0] * sign))


def softmax_reference(x: np.ndarray, z: np.ndarray, test_rows: np.ndarray, penalty: float) -> np.ndarray:
    """Log-probabilities of scikit-learn's optimum of ``mean loss + penalty / 2 ||W||^2``."""
    # Two classes: W = (-w / 2, w / 2), so that ||W||^2 = ||w||^2 / 2.
    C = (2 if len(set(z)) == 2 else 1) / (penalty * len(z))
    model = LogisticRegression(C=C, tol=1e-10, max_iter=10_000, solver="lbfgs").fit(x, z)
    return model.predict_log_proba(test_rows)


@pytest.mark.parametrize("count", [2, 4])
def test_linear_family_is_scikit_learns_optimum(count: int) -> None:
    rng = np.random.default_rng(count)
    z = np.r_[np.arange(count), rng.integers(0, count, 150) ** 2 // count]  # classes of unequal size
    x = rng.normal(size=(len(z), 6)) + 0.8 * np.eye(6)[z]
    test_rows = rng.normal(size=(40, 6))
    penalties = (0.001, 1.0, 0.05)
    problem = Problem(x, z, count, share_predictor(z, count))
    (predictors,) = fit_linear([problem], [penalties])
    for penalty, predict in zip(penalties, predictors, strict=True):
        np.testing.assert_allclose(
            predict(test_rows), softmax_reference(x, z, test_rows, penalty), rtol=1e-4, atol=1e-4
        )


def transcribe(x: np.ndarray, z: np.ndarray, groups: np.ndarray, k: int, penalties: tuple[float, ...]) -> np.ndarray:
    """Pointwise information of the linear family, as its definition reads, by SVD and scikit-learn."""
    count = z.max() + 1
    folds = make_folds(z, [str(i) for i in range(count)], groups, 3, 2, 0)
    pvi = np.empty(len(z))
    for f in range(3):
        train = folds.outer != f
        mean = x[train].mean(axis=0)
        axes = np.linalg.svd(x[train] - mean, full_matrices=False)[2][:k]
        y = (x - mean) @ axes.T
        y *= math.sqrt(k / (y[train] ** 2).sum(axis=1).mean())

        def log_p(a: np.ndarray, b: np.ndarray, choice: float | None, y: np.ndarray = y) -> np.ndarray:
            shares = np.log(np.bincount(z[a], minlength=count) / a.sum())
            table = np.tile(shares, (b.sum(), 1)) if choice is None else softmax_reference(y[a], z[a], y[b], choice)
            return table[np.arange(b.sum()), z[b]]

        inner = folds.inner[f]
        losses = {
            choice: -sum(log_p((inner >= 0) & (inner != i), inner == i, choice).sum() for i in range(2))
            for choice in (None, *penalties)
        }
        best = min(losses, key=lambda choice: losses[choice])
        pvi[~train] = log_p(train, ~train, best) - log_p(train, ~train, None)
    return pvi


@pytest.mark.parametrize(("width", "strength"), [(8, 1.0), (200, 1.5), (8, 0.0)])
def test_pointwise_information_follows_its_definition(width: int, strength: float) -> None:
    rng = np.random.default_rng(width)
    z, groups = rng.integers(0, 3, 120), np.arange(120) // 2
    x = rng.normal(size=(120, width)) + strength * np.eye(width)[z]
    path = measure_information({"site": x}, z, groups, families=("linear",), k=5, folds=3, inner_folds=2, seed=0)
    expected = transcribe(x, z, groups.astype(str), 5, predictive_families["linear"].choices)
    np.testing.assert_allclose(path.pvi[0, 0], expected, rtol=1e-3, atol=1e-3)
    assert path.nats[0, 0] == pytest.approx(expected.mean(), abs=1e-5)


@pytest.mark.parametrize(("n", "width"), [(60, 9), (40, 90)])
def test_reduction_is_the_principal_components_of_the_training_rows(n: int, width: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, width)) * rng.uniform(0.1, 5, width) + 30
    outer = np.arange(n) % 3
    for f, reduced in enumerate(reduce_folds(x, outer, 4)):
        train = outer != f
        centered = x - x[train].mean(axis=0)
        _, s, axes = np.linalg.svd(centered[train], full_matrices=False)
        expected = centered @ axes[:4].T
        expected *= math.sqrt(4 / (expected[train] ** 2).sum(axis=1).mean())
        signs = np.sign((reduced.values * expected).sum(axis=0))
        np.testing.assert_allclose(reduced.values * signs, expected, atol=1e-8)
        assert reduced.kept_variance == pytest.approx((s[:4] ** 2).sum() / (s**2).sum(), rel=1e-9)
    constant = reduce_rows(np.full((10, 3), 2.0), 4)
    assert not constant.values.any()


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_gaussians_have_their_known_information(mu: float) -> None:
    z, x, true = gaussians(mu, 1200, seed=1)
    path = measure_information({"x": x}, z, np.arange(1200) // 2, families=("linear",), control=False)
    assert path.nats[0, 0] == pytest.approx(true.mean(), abs=0.005)
    assert path.null_entropy[0] == pytest.approx(math.log(2), abs=1e-3)
    assert path.low[0, 0] < path.nats[0, 0] < path.high[0, 0]


def test_only_an_mlp_reads_a_product_of_signs() -> None:
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], size=(600, 2))
    x = np.hstack([2 * signs + rng.normal(size=(600, 2)), rng.normal(size=(600, 6))])
    path = measure_information({"x": x}, signs.prod(axis=1), np.arange(600))
    assert path.families == ("linear", "nonlinear")
    linear, nonlinear = path.nats[:, 0]
    assert abs(linear) < 0.01
    assert 0.45 < nonlinear < 0.65  # the truth is 0.579


def test_gradients_of_the_mlp_are_those_of_autograd() -> None:
    g = torch.Generator().manual_seed(0)
    sizes = {"v": (2, 5, 3 * 32), "c": (2, 3 * 32), "u": (2, 3, 32, 4), "d": (2, 3, 4)}
    weights = [torch.randn(*s, generator=g, dtype=torch.float64) for s in sizes.values()]
    x = torch.randn(2, 7, 5, generator=g, dtype=torch.float64)
    z, base = torch.randint(4, (2, 7), generator=g), torch.randn(2, 7, 4, generator=g, dtype=torch.float64)
    computed = mlp_gradients(weights, x, z, base)
    leaves = [w.clone().requires_grad_() for w in weights]
    v, c, u, d = leaves
    loss = torch.zeros((), dtype=torch.float64)
    for f in range(2):
        for p in range(3):
            part = slice(32 * p, 32 * p + 32)
            hidden = torch.nn.functional.gelu(x[f] @ v[f][:, part] + c[f][part], approximate="tanh")
            loss = loss + torch.nn.functional.cross_entropy(hidden @ u[f, p] + d[f, p] + base[f], z[f])
    loss.backward()
    for ours, leaf in zip(computed, leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad)


def test_noise_gives_nothing_by_the_null_and_a_wrong_family_cannot_be_negative() -> None:
    rng = np.random.default_rng(3)
    z, x = rng.integers(0, 2, 300), rng.normal(size=(300, 20))

    def fit(problems, choices):
        return [[lambda features: np.tile(np.log([0.999, 0.001]), (len(features), 1))] * len(c) for c in choices]

    predictive_families.register("stubborn", PredictiveFamily(fit, (1, 2)))
    try:
        path = measure_information({"x": x}, z, np.arange(300), families=("linear", "stubborn"))
    finally:
        predictive_families.unregister("stubborn")
    assert abs(path.nats[0, 0]) < 0.01
    assert not path.pvi[1].any()
    assert path.choices["stubborn"] == (("null",) * 5,)


def test_information_beyond_what_is_given() -> None:
    z, first, pvi = gaussians(1.0, 1500, seed=5)
    _, second, _ = gaussians(1.0, 1500, seed=6)
    both = math.log(2) - np.log1p(np.exp(-2 * (first + second)[:, 0] * (2 * z - 1)))
    path = measure_information(
        {"copy": 3 * first, "new": second},
        z,
        np.arange(1500),
        condition=first,
        condition_name="question",
        families=("linear",),
    )
    assert path.condition == "question"
    assert path.condition_nats[0] == pytest.approx(pvi.mean(), abs=0.005)
    assert path.nats[0, 0] == pytest.approx(0, abs=0.005)
    assert path.nats[0, 1] == pytest.approx((both - pvi).mean(), abs=0.01)
    assert path.null_entropy[0] + path.condition_nats[0] == pytest.approx(math.log(2), abs=2e-3)
    assert path.changes[0].words == "made available"


def moved(seed: int, n: int = 900) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return classes, a site, and one with the same information among 400 noisy directions."""
    z, x, _ = gaussians(1.0, n, seed)
    rng = np.random.default_rng(seed + 100)
    early = np.hstack([x, rng.normal(size=(n, 3))])
    return z, early, np.hstack([early, rng.normal(size=(n, 400))])


def test_width_control_explains_a_fall_in_a_wide_noisy_site_but_not_a_loss() -> None:
    z, early, wide = moved(0)
    groups = np.arange(len(z)) // 3
    sites = {"early": early, "wide": wide, "later": wide[:, 1:]}
    with_control = measure_information(sites, z, groups, families=("linear",))
    without = measure_information(sites, z, groups, families=("linear",), control=False)
    assert [c.words for c in without.changes] == ["less linearly available"] * 2
    assert [c.words for c in with_control.changes] == ["", "less linearly available"]
    fall, loss = (change["linear"] for change in with_control.changes)
    assert fall.nats < -0.03
    assert fall.control_low < 0.02 < 0.05
    assert fall.control_high > -0.02
    assert loss.control < -0.1


def test_lost_needs_both_families() -> None:
    assert describe(["linear", "nonlinear"], []) == "lost"
    assert describe(["linear"], ["nonlinear"]) == "less linearly available"
    assert describe(["nonlinear"], []) == "less available to the nonlinear family"
    assert describe([], ["linear"]) == "made available"
    assert describe([], []) == ""


def test_padding_has_the_spectrum_of_the_later_site_and_no_units() -> None:
    rng = np.random.default_rng(0)
    early, groups = rng.normal(size=(90, 4)), np.arange(90) // 3
    late = np.hstack([2 * early @ np.linalg.qr(rng.normal(size=(4, 4)))[0], rng.normal(size=(90, 5))])
    padded = pad_site(early, late, groups)

    def products(table: np.ndarray) -> np.ndarray:
        return table @ table.T  # the sign of a principal axis is arbitrary

    np.testing.assert_allclose(products(pad_site(early, 7 * late, groups)), 49 * products(padded), atol=1e-8)
    np.testing.assert_allclose(products(pad_site(3 * early, late, groups)), products(padded), atol=1e-9)
    x, y = early - early.mean(axis=0), late - late.mean(axis=0)
    residual = ((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum() * 89 / 85
    scale = ((y**2).sum() - residual) / (x**2).sum()
    np.testing.assert_allclose(padded[:, :4], math.sqrt(scale) * x, atol=1e-10)
    excess = np.linalg.svd(y, compute_uv=False) ** 2
    excess[:4] -= scale * np.linalg.svd(x, compute_uv=False) ** 2
    mask = excess > 0
    components = np.linalg.svd(y, full_matrices=False)[0][:, mask] ** 2
    noise = padded[:, 4:] ** 2 / excess[mask]
    distance = np.abs(noise[:, None] - components[None]).max(axis=2)
    source = distance.argmin(axis=1)
    assert distance.min(axis=1).max() < 1e-9
    assert sorted(source) == list(range(90))
    assert not (groups[source] == groups).any()


def test_holm_and_draws_of_groups() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005])
    order = np.sort(p)
    expected = [max(order[j] * (4 - j) for j in range(4) if order[j] <= value) for value in p]
    np.testing.assert_allclose(holm(p), expected)
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 3).astype(str)
    values = np.repeat(rng.normal(size=100), 3)[:, None] + 0.35
    mean, low, high, p_value = Draws(groups, 0.95, 0).measure(np.hstack([values, np.abs(values)]))
    error = values[::3, 0].std(ddof=1) / 10
    assert mean[0] == pytest.approx(values.mean())
    assert (mean[0] - low[0]) / error == pytest.approx(1.98, rel=0.1)
    assert (high[0] - mean[0]) / error == pytest.approx(1.98, rel=0.1)
    z_score = mean[0] / error
    assert p_value[0] == pytest.approx(math.erfc(z_score / math.sqrt(2)), abs=0.01)
    assert p_value[1] == pytest.approx(2 / 2001)


def test_infonce_is_bounded_by_its_batch() -> None:
    for n, published in ((16, 2.617), (128, 3.878)):
        rng = np.random.default_rng(n)
        draws = [rng.integers(0, 64, n) for _ in range(300)]
        values = [infonce(50.0 * (z[:, None] == z[None])) for z in draws]
        k = np.arange(n)
        closed = math.log(n) - (binom.pmf(k, n - 1, 1 / 64) * np.log(1 + k)).sum()
        assert closed == pytest.approx(published, abs=1e-3)
        assert np.mean(values) == pytest.approx(closed, abs=0.01)
    with pytest.raises(ProbeError, match="square"):
        infonce(np.zeros((2, 3)))


BAD = {
    "one class": ({}, {"labels": np.zeros(60)}, "one class|all 60 rows"),
    "few groups": ({}, {"groups": np.arange(60) // 20}, "'0' is in 3 groups"),
    "unequal groups": ({}, {"groups": np.arange(50)}, "50 groups and 60 labels"),
    "empty": ({}, {"labels": [], "groups": []}, "no rows"),
    "no label": ({}, {"labels": np.r_[np.nan, np.arange(59) % 2]}, "row 0 has no label"),
    "number": ({}, {"labels": np.linspace(0, 1, 60)}, "not a class"),
    "unequal site": ({"b": np.zeros((59, 2))}, {}, "'b' has shape"),
    "not finite": ({"b": np.full((60, 2), np.inf)}, {}, "60 rows with values that are not finite"),
    "family": ({}, {"families": ("liner",)}, "did you mean linear"),
    "no family": ({}, {"families": ()}, "families is empty"),
    "folds": ({}, {"folds": 1}, "folds=1"),
    "k": ({}, {"k": 0}, "k=0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_before_work(name: str) -> None:
    extra, options, message = BAD[name]
    sites = {"a": np.random.default_rng(0).normal(size=(60, 2)), **extra}
    arguments = {"labels": np.arange(60) % 2, "groups": np.arange(60), **options}
    with pytest.raises(GroundscopeError, match=message):
        measure_information(sites, **arguments)


def test_no_site_is_an_error() -> None:
    with pytest.raises(ProbeError, match="no site"):
        measure_information({}, [0, 1], ["a", "b"])


def stores() -> tuple[MemorySource, MemorySource]:
    """A store with images, and one of the questions alone, of 120 examples about 60 images."""
    rng = np.random.default_rng(0)
    color = np.arange(120) // 2 % 3
    x = rng.normal(size=(120, 2, 6)) + 3 * np.eye(6)[color][:, None] * [[1.0], [0.0]]
    x[7] = np.nan  # the object of this question is not in the image
    labels = {f"attribute:{name}": (color == k).astype(float) for k, name in enumerate(["red", "green", "blue"])}
    for column in labels.values():
        column[3] = np.nan
    table = {"id": [f"q{i}" for i in range(120)], "group": np.arange(120) // 2, **labels}
    joint = MemorySource({("vision.resid_post", "object:mean"): x, ("projector.out", "object:mean"): x[:, :1]}, table)
    return joint, MemorySource({"resid_post": rng.normal(size=(120, 1, 6))}, table)


COLORS = ("attribute:red", "attribute:green", "attribute:blue")


def test_path_of_stores(tmp_path: Path) -> None:
    joint, alone = stores()
    path = image_sites(joint, tokens="object:mean")
    assert [p.name for p in path] == [
        "vision.L0.resid_post at object:mean",
        "vision.L1.resid_post at object:mean",
        "projector.out at object:mean",
    ]
    question = PathSite(alone, "decoder.L0.resid_post")
    result = information_path(path, COLORS, condition=question, families=("linear",))
    assert isinstance(result, InformationPath)
    assert result.classes == ("blue", "green", "red")
    assert len(result.ids) == 118
    assert not {"q3", "q7"} & set(result.ids.tolist())
    assert [c.words for c in result.changes] == ["less linearly available", "made available"]
    assert result.condition == "decoder.L0.resid_post at last, alone"
    assert 0.7 < result.at(path[0].name)[0] < result.entropy
    frame = result.frame()
    assert frame["change"].isna().tolist() == [True, False, False]
    assert str(result).count("\n") == 3
    with pytest.raises(ProbeError, match="unknown site 'projector' of this path"):
        result.at("projector")

    ax = result.plot(tmp_path / "path.png")
    assert (tmp_path / "path.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_array_equal(lines["linear"].get_ydata(), result.nats[0])
    assert "less linearly available" in {text.get_text() for text in ax.texts}
    with pytest.raises(ConfigError, match="unknown picture format 'xyz'"):
        result.plot(tmp_path / "path.xyz")


def test_paths_that_cannot_be_read() -> None:
    joint, alone = stores()
    path = image_sites(joint, tokens="object:mean")
    everything = np.ones(120, bool)
    with pytest.raises(ProbeError, match="example 'q3' has no label"):
        information_path(path, COLORS, rows=everything)
    with pytest.raises(ProbeError, match="example 'q7' has no such tokens"):
        information_path(path, COLORS, rows=np.arange(120) != 3)
    with pytest.raises(ProbeError, match="more than once"):
        information_path([path[0], path[0]], COLORS)
    with pytest.raises(ProbeError, match="no site"):
        information_path([], COLORS)
    with pytest.raises(ProbeError, match="no site of the image at image:mean"):
        image_sites(joint)
    with pytest.raises(ProbeError, match="not in store"):
        information_path(path, "attribute:rde")
    frame = alone.frame().assign(id=[f"r{i}" for i in range(120)])
    other = MemorySource({"resid_post": np.zeros((120, 1, 6))}, frame)
    with pytest.raises(StoreError, match="other examples"):
        information_path(path, COLORS, condition=PathSite(other, "decoder.L0.resid_post"))
    swapped = MemorySource({"resid_post": np.zeros((120, 1, 6))}, alone.frame().iloc[::-1])
    with pytest.raises(StoreError, match="their order differs"):
        information_path(path, COLORS, condition=PathSite(swapped, "decoder.L0.resid_post"))
