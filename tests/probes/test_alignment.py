"""Measures of alignment against known answers and naive float64 loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch

from activation_store import ArrayInfo, MemorySource, Ragged
from groundscope.core.errors import ProbeError
from probes import alignment
from probes.alignment.kernels import gram, join_grams
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
    assert alignment.cosine(x, 2 * x + 5) == pytest.approx(1)
    assert alignment.cosine(x, 5 - x) == pytest.approx(-1)
    noisy = x + np.random.default_rng(9).normal(size=x.shape)
    assert alignment.cosine(rotated(x), rotated(3 * noisy + 1)) == pytest.approx(alignment.cosine(x, noisy), abs=1e-12)
    assert alignment.cosine(x, x + 100, centered=False) < 0.5
    assert alignment.cknna(x, 3 * rotated(x), clamp=None) == pytest.approx(1, abs=1e-12)
    assert (alignment.retrieval(x, 2 * x + 5).image_to_text == 1).all()
    assert alignment.frechet_distance(rotated(3 * x), rotated(3 * x)) == pytest.approx(0, abs=1e-12)
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


def naive_ranks(x: np.ndarray, y: np.ndarray, images: list[str]) -> tuple[list[int], list[int]]:
    """Loops over queries; a wrong candidate at least as near as the right one is ranked before it."""

    def unit(values: np.ndarray) -> list[np.ndarray]:
        centered = values - sum(values) / len(values)
        return [row / math.sqrt(sum(v * v for v in row)) for row in centered]

    a, b, names = unit(x), unit(y), sorted(set(images), key=images.index)
    picture = {name: a[images.index(name)] for name in names}
    to_text, to_image = [], []
    for name in names:
        own = max(float(picture[name] @ b[n]) for n in range(len(y)) if images[n] == name)
        wrong = [n for n in range(len(y)) if images[n] != name and float(picture[name] @ b[n]) >= own - 1e-12]
        to_text.append(1 + len(wrong))
    for n, name in enumerate(images):
        own = float(picture[name] @ b[n])
        to_image.append(1 + sum(float(picture[o] @ b[n]) >= own - 1e-12 for o in names if o != name))
    return to_text, to_image


def test_ranks_of_several_captions_an_image_equal_a_naive_loop_with_ties_against() -> None:
    rng = np.random.default_rng(7)
    names = [f"i{i}" for i in rng.integers(0, 12, size=40)]
    picture = {name: rng.normal(size=6) for name in dict.fromkeys(names)}
    picture[names[1]] = picture[names[0]]  # two images with one vector
    x = np.array([picture[name] for name in names])
    y = x + 2 * rng.normal(size=x.shape)
    y[3] = y[5]
    ranks = alignment.retrieval(x, y, names)
    to_text, to_image = naive_ranks(x, y, names)
    assert ranks.image_to_text.tolist() == to_text
    assert ranks.text_to_image.tolist() == to_image
    assert len(set(to_text)) > 2
    assert alignment.recall_at(ranks.text_to_image, 5) == sum(r <= 5 for r in to_image) / 40
    # Equal vectors everywhere: every other candidate is a tie, and counts against.
    assert (alignment.retrieval(x, np.ones((40, 6))).text_to_image == 40).all()


def naive_cknna(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """Dense masks and matrix products in the form of the released code, in float64."""

    def unit(values: np.ndarray) -> np.ndarray:
        limit = sum(sorted_quantile(np.abs(row), 0.95) for row in values) / len(values)
        return np.array([row / np.sqrt(row @ row) for row in np.clip(values, -limit, limit)])

    def mask(values: np.ndarray) -> np.ndarray:
        out = np.zeros((len(values), len(values)))
        for i, near in enumerate(naive_knn(values, k, 0.95)):
            out[i, sorted(near)] = 1
        return out

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        m = len(a)
        total = np.trace(a @ b) + a.sum() * b.sum() / ((m - 1) * (m - 2)) - 2 * (a @ b).sum() / (m - 2)
        return total / (m * (m - 3))

    a, b = unit(x) @ unit(x).T, unit(y) @ unit(y).T
    p, q = mask(x), mask(y)
    return hsic(p * q * a, p * q * b) / math.sqrt(hsic(p * a, p * a) * hsic(q * b, q * b))


def test_kernels_of_neighbors_equal_dense_masks(x: np.ndarray) -> None:
    y = x[:, :20] + np.random.default_rng(8).normal(size=(120, 20))
    for k in (2, 5, 10):
        assert alignment.cknna(x, y, k) == pytest.approx(naive_cknna(x, y, k), abs=1e-12)
    assert abs(alignment.cknna(x, y, 10) - alignment.cka(x, y)) > 0.01


def test_shortcuts_of_permutations_equal_the_measures_on_permuted_rows(x: np.ndarray) -> None:
    """Every measure, joined once and then permuted, against the measure of rows that are really permuted."""
    rng = np.random.default_rng(10)
    y = x + rng.normal(size=x.shape)
    images = alignment.ImageRows.of(range(120))
    settings = alignment.Settings(k=7)
    plain = {
        "cosine": alignment.cosine,
        "cka": alignment.cka,
        "cka_biased": lambda a, b: alignment.cka(a, b, unbiased=False),
        "cknna": lambda a, b: naive_cknna(a, b, 7),
        "mutual_knn": lambda a, b: alignment.mutual_knn(a, b, 7),
    }
    moved = rng.permutation(120)
    for name, function in plain.items():
        measure = alignment.measures[name]
        values = measure.join(measure.prepare(x, images, settings), measure.prepare(y, images, settings), images)
        for order in (np.arange(120), moved):
            assert values(order)[0] == pytest.approx(function(x, y[order]), abs=1e-12), name
    retrieval = alignment.measures["retrieval"]
    a, b = (retrieval.prepare(side, images, settings) for side in (x, y))
    values = retrieval.join(a, b, images)(moved)
    to_text, to_image = naive_ranks(x, y[moved], [str(i) for i in range(120)])
    assert values == pytest.approx([np.mean(np.array(r) <= k) for r in (to_text, to_image) for k in (1, 5, 10)])
    # The unbiased estimate in its form for permutations, of kernels that were not centered in the same way.
    assert join_grams(gram(x + 3), gram(y))(moved) == pytest.approx(alignment.cka(x, y[moved]), abs=1e-12)


def test_images_take_all_captions_of_another_image_with_as_many() -> None:
    names = ["a", "b", "a", *[f"s{i}" for i in range(12)], "b"]
    images = alignment.ImageRows.of(names)
    draws = images.permutations(199, seed=0)
    exchanged = 0
    for moved in draws:
        rows = images.rows(moved)
        assert sorted(rows) == list(range(len(names)))
        sources = {name: {names[r] for n, r in zip(names, rows, strict=True) if n == name} for name in names}
        assert all(len(s) == 1 for s in sources.values())  # never the captions of two images
        assert sources["a"] | sources["b"] == {"a", "b"}
        exchanged += sources["a"] == {"b"}
        rows_of_a = [r for n, r in zip(names, rows, strict=True) if n == "a"]
        assert rows_of_a in ([0, 2], [1, 15])
    assert 70 < exchanged < 130
    with pytest.raises(ProbeError, match="2 images can exchange captions"):
        alignment.ImageRows.of(["a", "b", "c", "c"]).permutations(199, seed=0)


def test_nulls_separate_paired_from_unpaired_rows_and_the_gap_has_an_interval(x: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    y = x + 0.5 * rng.normal(size=x.shape)
    paired = alignment.compare(x, y).set_index("measure")
    unpaired = alignment.compare(x, rng.normal(size=x.shape)).set_index("measure")
    for name in ("cosine", "mutual_knn", "cka", "cknna", "image_to_text@1", "text_to_image@10"):
        assert paired.loc[name, "p"] == 1 / 200
        assert paired.loc[name, "value"] > paired.loc[name, "baseline"] + 4 * paired.loc[name, "baseline_sd"]
        assert unpaired.loc[name, "p"] > 0.01
        assert np.isnan(paired.loc[name, "low"])
    gap = alignment.compare(x, x + 1, measures=["modality_gap"]).iloc[0]
    assert np.isnan(gap["p"])
    assert gap["low"] < gap["value"] < gap["high"] < gap["low"] + 0.3
    other_width = alignment.compare(x, x[:, :9], permutations=0).set_index("measure")
    assert np.isnan(other_width.loc["cosine", "value"])
    assert np.isnan(other_width.loc["text_to_image@5", "value"])
    assert other_width.loc["cka", "value"] > 0.3


def test_equal_permuted_values_count_as_at_least_as_high() -> None:
    """Eleven captions that are all the same: every permutation ties, so p is 1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(15, 4))
    same = np.repeat(rng.normal(size=(1, 4)), 15, axis=0)
    table = alignment.compare(x, same, measures=["cosine", "retrieval"]).set_index("measure")
    assert (table["p"] == 1).all()


def transcribed_distance(image: np.ndarray, text: np.ndarray, variant: str) -> float:
    """The formulas of MIR with torch's medians and scipy's root."""

    def treat(values: np.ndarray) -> np.ndarray:
        data = torch.tensor(values)
        norms = torch.linalg.vector_norm(data, dim=-1)
        outliers = torch.abs(norms - torch.median(norms)) > 3 * torch.std(norms)
        assert outliers.any()
        if variant == "paper":
            return data[~outliers].numpy()
        middle = torch.median(data, dim=0).values
        return torch.where(outliers[:, None], middle, data).numpy()

    scale = 1 / np.sqrt((text**2).sum(1)).mean()
    v, t = treat(scale * image), treat(scale * text)
    a, b = np.cov(v.T), np.cov(t.T)
    root = a @ b if variant == "release_fast" else scipy.linalg.sqrtm(a @ b).real
    return float(((v.mean(0) - t.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root))


@pytest.mark.parametrize("variant", ["paper", "release", "release_fast"])
def test_the_integration_rate_equals_a_transcription(variant: Any) -> None:
    rng = np.random.default_rng(11)
    for image, text in ((301, 200), (30, 24)):  # more tokens than features, and fewer
        v = rng.normal(size=(image, 24)) @ rng.normal(size=(24, 24)) + 1
        t = rng.normal(size=(text, 24)) * np.linspace(0.1, 3, 24)
        v[3] *= 40
        t[5] *= 40
        expected = transcribed_distance(v, t, variant)
        assert alignment.frechet_distance(v, t, variant) == pytest.approx(expected, rel=1e-6 if image == 30 else 1e-9)
    assert alignment.mir_of([4.0, 6.0]) == 1


def test_the_integration_rate_has_its_known_values() -> None:
    """Two samples of one distribution: near 0, but growing with width over tokens; the released iteration sees 2."""
    rng = np.random.default_rng(12)
    for width, expected, tolerance in ((10, 0.03, 0.01), (100, 0.26, 0.02), (400, 0.88, 0.02)):
        mean = np.mean([alignment.frechet_distance(*rng.normal(size=(2, 200, width))) for _ in range(3)])
        assert mean == pytest.approx(expected, abs=tolerance)
    image, text = rng.normal(size=(2, 6_000, 200))
    assert alignment.frechet_distance(image, text) == pytest.approx(0.017, abs=0.001)
    assert alignment.frechet_distance(image, text, "release_fast") == pytest.approx(1.995, abs=0.015)


class TokenStore(MemoryStore):
    """Every token of sequences: lists of [T_i, L, D] by token selection."""

    def __init__(self, table: pd.DataFrame, tokens: dict[str, list[np.ndarray]]) -> None:
        super().__init__(table, {})
        self.arrays = tuple(ArrayInfo("decoder", "resid_post", name, 2, 5, ragged=True) for name in tokens)
        self.tokens = tokens

    def ragged(self, site: str, tokens: str, head: int | None = None, examples: Any = None) -> Ragged:
        layer = int(site.split(".")[1][1:])
        return Ragged.of([self.tokens[tokens][i][:, layer] for i in examples])


def test_the_integration_rate_of_a_store_pools_tokens_and_sums_layers() -> None:
    rng = np.random.default_rng(13)
    n = 24
    table = pd.DataFrame({"id": [f"q{i}" for i in range(n)], "group": [f"g{i // 2}" for i in range(n)]})
    image = [rng.normal(size=(9, 2, 5)) + 0.5 for _ in range(n)]
    text = [rng.normal(size=(int(rng.integers(3, 8)), 2, 5)) for _ in range(n)]
    store = TokenStore(table, {"image:all": image, "suffix:all": text})
    used = np.arange(n) < 20
    rate = alignment.mir(store, rows=used, resamples=60)
    pooled = [np.concatenate(part[:20]).astype(np.float32) for part in (image, text)]
    expected = [alignment.frechet_distance(pooled[0][:, layer], pooled[1][:, layer]) for layer in (0, 1)]
    assert rate.distances == pytest.approx(expected)
    assert rate.value == pytest.approx(math.log10(sum(expected)))
    assert (rate.image_tokens, rate.text_tokens, rate.n_images) == (180, len(pooled[1]), 10)
    assert rate.low < rate.value < rate.high < rate.low + 1
    assert rate.table()["image_tokens"].tolist() == [180, 180]
    image[4] = image[4][:0]
    with pytest.raises(ProbeError, match="example 'q4' has none of image:all"):
        alignment.mir(store, resamples=0)
    table = {"id": ["a"], "group": ["g"]}
    alone = MemorySource({"resid_post": np.zeros((1, 1, 2))}, table, provenance={"input": "image"})
    with pytest.raises(ProbeError, match="these rows have seen the image alone"):
        alignment.mir(alone)  # type: ignore[arg-type]


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
        (lambda: alignment.compare(x, x, measures=["charm"]), "choose from cosine, retrieval"),
        (lambda: alignment.compare(x, x, permutations=50), "must be 0 or at least 199"),
        (lambda: alignment.compare(x[:10], x[:10]), "retrieval with k=10 needs 11 images, got 10"),
        (lambda: alignment.compare(x[:20], x[:20], k=30, measures=["mutual_knn"]), "needs 31 images, got 20"),
        (lambda: alignment.compare(x, x, k=1), "at least 2 neighbors"),
        (lambda: alignment.compare(x, x, ["a"]), "1 image of 120 rows"),
        (lambda: alignment.cknna(x, x, 1), "at least 2 neighbors"),
        (lambda: alignment.frechet_distance(x, x, "fast"), "unknown variant 'fast' of MIR"),  # type: ignore[arg-type]
        (lambda: alignment.frechet_distance(x[:1], x), "at least 2 image"),
        (lambda: alignment.frechet_distance(x, 0 * x), "not all 0"),
    ):
        with pytest.raises(ProbeError, match=message):
            call()
