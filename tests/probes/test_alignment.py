"""Measures of alignment against known answers and naive float64 loops."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from groundscope.core.errors import ProbeError, SiteError
from probes.analysis import alignment
from tests.toys.memory_store import MemoryStore


def rotated(x: np.ndarray, seed: int = 0) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(x.shape[1], x.shape[1])))
    return x @ q


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(120, 30))


def test_rotated_and_scaled_copies_align_fully(x: np.ndarray) -> None:
    for unbiased in (True, False):
        assert alignment.cka(x, 3 * rotated(x) + 5, unbiased=unbiased) == pytest.approx(1, abs=1e-12)
    assert alignment.mutual_knn(x, x) == 1
    assert alignment.mutual_knn(x, rotated(x), clamp=None) == 1
    assert alignment.cosine(x, 2 * x) == pytest.approx(1)
    assert alignment.cosine(x, -x) == pytest.approx(-1)
    assert alignment.modality_gap(x, x) == 0


def test_independent_gaussians_align_at_their_expectation() -> None:
    """Unbiased: 0. Biased with identity covariances: about sqrt(D E) / N over the norms' own bias."""
    rng = np.random.default_rng(1)
    n, d, e, draws = 100, 40, 60, 60
    unbiased, biased, near = [], [], []
    for _ in range(draws):
        a, b = rng.normal(size=(n, d)), rng.normal(size=(n, e))
        unbiased.append(alignment.cka(a, b))
        biased.append(alignment.cka(a, b, unbiased=False))
        near.append(alignment.mutual_knn(a, b))
    assert abs(np.mean(unbiased)) < 3 * np.std(unbiased) / math.sqrt(draws)
    # E tr(KHLH) = (n-1) d e and E tr(KHKH) = (n-1) d (n + d) for Wishart matrices of n-1 degrees of freedom.
    expected = (n - 1) * d * e / math.sqrt((n - 1) * d * (n + d) * (n - 1) * e * (n + e))
    assert np.mean(biased) == pytest.approx(expected, rel=0.02)
    assert np.mean(near) == pytest.approx(10 / (n - 1), rel=0.1)


def naive_knn(values: np.ndarray, k: int, q: float) -> list[set[int]]:
    """Row by row: the mean over rows of the quantile of absolute values clamps, unit rows, largest products."""
    limit = sum(sorted_quantile(np.abs(row), q) for row in values) / len(values)
    unit = []
    for row in values:
        clipped = np.array([min(max(v, -limit), limit) for v in row])
        unit.append(clipped / math.sqrt(sum(v * v for v in clipped)))
    neighbors = []
    for i, row in enumerate(unit):
        products = [(-float(row @ other), j) for j, other in enumerate(unit) if j != i]
        neighbors.append({j for _, j in sorted(products)[:k]})
    return neighbors


def sorted_quantile(values: np.ndarray, q: float) -> float:
    ordered = np.sort(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (at - low) * (ordered[high] - ordered[low]))


def test_mutual_neighbors_equal_a_naive_loop(x: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    y = x[:, :20] + rng.normal(size=(120, 20)) * np.exp(rng.normal(size=(120, 1)))
    for k in (1, 5, 10):
        near = zip(naive_knn(x, k, 0.95), naive_knn(y, k, 0.95), strict=True)
        assert alignment.mutual_knn(x, y, k) == pytest.approx(np.mean([len(a & b) / k for a, b in near]), abs=1e-12)


def naive_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """The U-statistic itself: a mean over all ordered quadruples of different rows."""
    n, total, count = len(k), 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
                        count += 1
    return total / count


def test_hsic_equals_the_sum_over_quadruples_and_the_matrix_form() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(9, 3)), rng.normal(size=(9, 4)) + 1
    k, l = a @ a.T, b @ b.T  # noqa: E741
    assert alignment.hsic_unbiased(k, l) == pytest.approx(naive_hsic(k, l), rel=1e-10)
    h = np.eye(9) - 1 / 9
    assert alignment.hsic_biased(k, l) == pytest.approx(np.trace(k @ h @ l @ h), rel=1e-10)


def test_batches_estimate_the_whole() -> None:
    rng = np.random.default_rng(4)
    a = rng.normal(size=(2000, 20))
    b = a[:, :10] + rng.normal(size=(2000, 10))
    whole = alignment.cka(a, b)
    assert alignment.cka(a, b, batch=100) == pytest.approx(whole, abs=0.02)
    # The biased estimate in batches keeps the bias of a batch.
    assert alignment.cka(a, b, unbiased=False, batch=100) > whole + 0.05
    assert alignment.cka(a, b, batch=5000) == whole


def test_the_gap_is_the_distance_of_the_means_of_unit_rows(x: np.ndarray) -> None:
    y = x + 4
    naive = np.mean([r / np.linalg.norm(r) for r in x], 0) - np.mean([r / np.linalg.norm(r) for r in y], 0)
    assert alignment.modality_gap(x, y) == pytest.approx(np.linalg.norm(naive))


def test_permutation_baselines_separate_paired_from_unpaired_rows(x: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    paired = alignment.compare(x, x + 0.5 * rng.normal(size=x.shape), permutations=99).set_index("measure")
    unpaired = alignment.compare(x, rng.normal(size=x.shape), permutations=99).set_index("measure")
    for name in ("cosine", "mutual_knn", "cka_biased", "cka_unbiased"):
        assert paired.loc[name, "p"] == 0.01
        assert paired.loc[name, "value"] > paired.loc[name, "baseline"] + 4 * paired.loc[name, "baseline_sd"]
        assert unpaired.loc[name, "p"] > 0.01
        function = alignment.MEASURES[name]
        assert paired.loc[name, "value"] == pytest.approx(
            function(x, x + 0.5 * np.random.default_rng(5).normal(size=x.shape))
        )
    assert unpaired.loc["modality_gap", "p"] > 0.01
    gap = alignment.compare(x, x + 1, permutations=99).set_index("measure").loc["modality_gap"]
    assert gap["p"] == 0.01
    other_width = alignment.compare(x, x[:, :9], permutations=9).set_index("measure")
    assert np.isnan(other_width.loc["cosine", "value"])
    assert other_width.loc["cka_unbiased", "value"] > 0.3


def test_layers_of_a_store_one_example_a_group() -> None:
    rng = np.random.default_rng(6)
    groups, size = 40, 3
    group = np.repeat(np.arange(groups), size)
    text = rng.normal(size=(len(group), 2, 8))
    image = rng.normal(size=(groups, 2, 8))[group]
    image[:, 1] = text[np.repeat(np.arange(0, len(group), size), size), 1] + 0.1 * image[:, 1]  # of the first question
    image[0] = np.nan
    table = pd.DataFrame({"id": [f"q{i}" for i in range(len(group))], "group": [f"s{g:02}" for g in group]})
    store = MemoryStore(
        table, {("decoder", "resid_post", "image:mean"): image, ("decoder", "resid_post", "question:mean"): text}
    )
    scores = alignment.layerwise(store, joint=True, permutations=49).set_index(["layer", "measure"])
    assert (scores["n"] == groups - 1).all()
    assert scores.loc[(1, "mutual_knn"), "value"] > 0.7
    assert scores.loc[(1, "cka_unbiased"), "value"] > 0.9
    assert abs(scores.loc[(0, "cka_unbiased"), "value"]) < 0.2
    assert scores.loc[(0, "mutual_knn"), "p"] > 0.02
    with pytest.raises(SiteError, match="mlp_out"):
        alignment.layerwise(store, "mlp_out", joint=True)
    with pytest.raises(ProbeError, match="3 groups have both"):
        alignment.layerwise(store, joint=True, rows=np.arange(120) < 12)


def test_an_image_is_compared_with_a_text_that_does_not_attend_to_it() -> None:
    """Question tokens that copied the image look aligned; the same questions about a blank image do not."""
    rng = np.random.default_rng(1)
    n, d = 60, 12
    image, words = rng.normal(size=(n, 1, d)), rng.normal(size=(n, 1, d))
    table = pd.DataFrame({"id": [f"q{i}" for i in range(n)], "group": [f"g{i}" for i in range(n)]})
    selections = [("decoder", "resid_post", f"{name}:mean") for name in ("image", "question")]
    store = MemoryStore(table, dict(zip(selections, (image, words + 5 * image), strict=True)))
    order = rng.permutation(n)  # rows are matched by id
    blank = MemoryStore(
        table.iloc[order].reset_index(drop=True), dict(zip(selections, (0 * image, words[order]), strict=True))
    )
    for wrong in ({}, {"joint": True, "text_store": blank}):
        with pytest.raises(ProbeError, match="question tokens of a prompt with an image have attended to that image"):
            alignment.layerwise(store, **wrong)
    joint = alignment.layerwise(store, joint=True, permutations=0).set_index("measure")
    alone = alignment.layerwise(store, text_store=blank, permutations=0).set_index("measure")
    assert set(joint["text"]) == {"joint"}
    assert set(alone["text"]) == {"alone"}
    assert joint.loc["cka_unbiased", "value"] > 0.9
    expected = alignment.cka(image[:, 0].astype(np.float32), words[:, 0].astype(np.float32))
    assert alone.loc["cka_unbiased", "value"] == pytest.approx(expected, abs=1e-6)
    assert abs(expected) < 0.3
    with pytest.raises(ProbeError, match="no example 'q5'"):
        alignment.layerwise(store, text_store=MemoryStore(table.iloc[:5], {k: v[:5] for k, v in blank.values.items()}))


def test_bad_input_is_refused(x: np.ndarray) -> None:
    broken = x.copy()
    broken[3, 3] = np.nan
    for call, message in (
        (lambda: alignment.cosine(x, x[:, :5]), "rows do not pair"),
        (lambda: alignment.cka(x, x[:50]), "rows do not pair"),
        (lambda: alignment.cka(x[:3], x[:3]), "at least 4"),
        (lambda: alignment.mutual_knn(x, x, k=120), "k=120 neighbors of 120 rows"),
        (lambda: alignment.modality_gap(x, x[:, :5]), "rows of equal width"),
        (lambda: alignment.compare(x, broken), "must be finite"),
        (lambda: alignment.compare(x, x, measures=["charm"]), "choose from cosine, mutual_knn"),
    ):
        with pytest.raises(ProbeError, match=message):
            call()
