"""Speed and accuracy of fitting linear probes, against scikit-learn.

    python benchmarks/probes.py [--quick] [--parts heads,residual,grid,null,cost] [--threads 1] [--device cuda]

The features are synthetic, with a decaying spectrum like that of activations.

``heads``, ``residual``: one batch of 20 concepts x 6 values of C on 2000 rows, with 128 and 4096 features. The baseline is
`LogisticRegression` (lbfgs, float64, default tolerance) on standardized features, one fit after the other, timed on a sample
of the batch. The candidate includes standardization, rotation to the principal axes, float32 iterations and the float64
certificate of every fit. Both run in alternating order; times are medians. The optimum is the solution of scikit-learn at
``tol=1e-10``:

..._ms_a_fit, ..._sklearn_ms_a_fit, ..._speedup
    milliseconds per fit, and their ratio;
..._worst_gap_to_truth, ..._sklearn_worst_gap_to_truth
    largest relative difference of the objective from the optimum;
..._worst_proven_gap
    largest bound on this difference that the certificates prove;
..._most_predictions_differing, ..._sklearn_most_predictions_differing
    largest number of the 500 test rows that are classified differently than by the optimum.

``grid``: seconds to fit 1024 heads x 20 concepts x 5 folds x 6 values of C from a store on disk, including reading, selection
of C, the final fit on all training rows, scores and their bootstrap intervals. ``null``: seconds of the permutation test of
that grid. ``cost``: milliseconds per fit over the numbers of rows, features and concepts, as a plot with ``--save``.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
_THREADS = sys.argv[sys.argv.index("--threads") + 1] if "--threads" in sys.argv[:-1] else "1"
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = _THREADS  # read when the libraries are imported, below

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter
from benchmarks._harness import (
    RESULTS,
    Figure,
    describe_device,
    figure,
    finish,
    option_parser,
    print_figures,
    progress,
    save_record,
    time_call,
    wide_console,
)
from probes import fit_grid, permutation_test
from probes.solvers.logistic_float32 import RowBlock, balanced_weights, fit_rows

C_VALUES = np.logspace(-5, 0, 6)
CONCEPTS, FOLDS, ROWS, HELD_OUT = 20, 5, 2000, 500
LAYERS, HEADS, WIDTH = 32, 32, 128
TOLERANCE = 1e-8
"""Relative gap that the candidate must prove: the default of a grid."""
SAMPLE = 12
"""Fits of scikit-learn per repetition: two concepts at each C."""
CONCEPT_NAMES = [f"object:noun{k}" for k in range(CONCEPTS)]
PLOT = Path(__file__).parent.parent / "docs" / "probes_cost.png"


@dataclass
class Report:
    """Collects figures, and prints each when it is added."""

    figures: dict[str, Figure] = field(default_factory=dict)

    def add(self, name: str, value: float, n: int, goal: str = "") -> None:
        """Add a figure."""
        self.figures[name] = figure(value, goal, n)
        wide_console().print(f"  {name}: {self.figures[name]['value']}{f' (goal {goal})' if goal else ''}")


def sample_features(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Return random float32 [rows, width] with a decaying spectrum, and columns of different scales and means."""
    spectrum = np.exp(-np.arange(width) / (width / 6)) + 1e-3
    z = (rng.normal(size=(rows, width)) * np.sqrt(spectrum)).astype(np.float32)
    if width <= 512:
        z = z @ np.linalg.qr(rng.normal(size=(width, width)))[0].astype(np.float32)
    else:  # a product of reflections is a cheaper rotation
        for _ in range(24):
            v = rng.normal(size=width).astype(np.float32)
            v /= np.linalg.norm(v)
            z -= 2 * np.outer(z @ v, v)
    return z * rng.uniform(0.3, 3, width).astype(np.float32) + rng.normal(size=width).astype(np.float32)


def sample_labels(rng: np.random.Generator, x: np.ndarray, count: int) -> np.ndarray:
    """Return random labels 0/1 [count, rows] of concepts with different decodability and frequency."""
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    score = z @ rng.normal(size=(x.shape[1], count))
    score = score / score.std(axis=0) * rng.uniform(0, 2, count) + rng.normal(size=score.shape)
    return (score > rng.normal(size=count) * 0.5).T.astype(np.float64)


def fit_batch(x: np.ndarray, y: np.ndarray, device: str, tolerance: float = TOLERANCE) -> Any:
    """Fit a batch: all concepts at all values of C."""
    penalties = np.broadcast_to(C_VALUES, (len(y), len(C_VALUES)))
    return fit_rows(RowBlock.of(x, device), y, penalties, balanced_weights(y), tolerance=tolerance)


def reference(z: np.ndarray, y: np.ndarray, penalty: float, **options: Any) -> LogisticRegression:
    """Fit with scikit-learn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence warnings of the baseline
        return LogisticRegression(C=penalty, class_weight="balanced", **options).fit(z, y)


def solution(model: Any) -> tuple[np.ndarray, float]:
    """Return a fitted model's weights and intercept."""
    return model.coef_[0], float(model.intercept_[0])


def objective(z: np.ndarray, y: np.ndarray, penalty: float, w: np.ndarray, b: float) -> float:
    """Return the objective of logistic regression, in float64."""
    margins = np.where(y == 1, 1.0, -1.0) * (z @ w + b)
    return float(0.5 * w @ w + penalty * np.sum(balanced_weights(y[None])[0] * np.logaddexp(0.0, -margins)))


def compare_with_sklearn(
    report: Report, name: str, width: int, goal: float, repetitions: int, audited: int, device: str
) -> None:
    """Time both on one problem, then compare `audited` fits with the optimum."""
    rng = np.random.default_rng(width)
    x = sample_features(rng, ROWS + HELD_OUT, width)
    y_all = sample_labels(rng, x, CONCEPTS)
    train, test, y = x[:ROWS], x[ROWS:], np.ascontiguousarray(y_all[:, :ROWS])
    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    z, z_test = (train - mean) / deviation, (test - mean) / deviation
    fit_batch(train, y, device)  # warm-up
    ours, theirs, ratios = [], [], []
    for repetition in range(repetitions):
        sample = [
            ((repetition * 2 + k) % CONCEPTS, c) for k in range(SAMPLE // len(C_VALUES)) for c in range(len(C_VALUES))
        ]

        def baseline(sample: list[tuple[int, int]] = sample) -> None:
            for k, c in sample:
                reference(z, y[k], C_VALUES[c])

        order = [
            (ours, lambda: fit_batch(train, y, device), CONCEPTS * len(C_VALUES)),
            (theirs, baseline, len(sample)),
        ]
        for times, work, count in order if repetition % 2 else order[::-1]:
            times.append(time_call(work) / count)
        ratios.append(theirs[-1] / ours[-1])
    report.add(f"{name}_ms_a_fit", 1000 * statistics.median(ours), repetitions)
    report.add(f"{name}_sklearn_ms_a_fit", 1000 * statistics.median(theirs), repetitions)
    ratio = statistics.median(ratios)
    report.add(f"{name}_speedup", ratio, repetitions, f">= {goal}")
    fit = fit_batch(train, y, device)
    gaps, differing, default_gaps, default_differing = [], [], [], []
    truth_solver = "newton-cholesky" if width <= 512 else "lbfgs"
    for index in np.linspace(0, CONCEPTS * len(C_VALUES) - 1, audited).astype(int):
        k, c = divmod(int(index), len(C_VALUES))
        true = reference(z, y[k], C_VALUES[c], tol=1e-10, solver=truth_solver, max_iter=20_000)
        best = objective(z, y[k], C_VALUES[c], *solution(true))
        positive = true.decision_function(z_test) > 0
        gaps.append((fit.objective[index] - best) / best)
        differing.append(int((((test @ fit.coefficients[index] + fit.intercepts[index]) > 0) != positive).sum()))
        plain = reference(z, y[k], C_VALUES[c])
        default_gaps.append(objective(z, y[k], C_VALUES[c], *solution(plain)) / best - 1)
        default_differing.append(int(((plain.decision_function(z_test) > 0) != positive).sum()))
    report.add(f"{name}_worst_gap_to_truth", max(gaps), audited, "<= 1e-6")
    report.add(f"{name}_worst_proven_gap", float(fit.gap.max()), fit.gap.size, "<= 1e-6")
    report.add(f"{name}_most_predictions_differing", max(differing), audited, "<= 1 of 500")
    report.add(f"{name}_sklearn_worst_gap_to_truth", max(default_gaps), audited)
    report.add(f"{name}_sklearn_most_predictions_differing", max(default_differing), audited)


def make_store(folder: Path, layers: int, rows: int) -> ActivationStore:
    """Write z of `layers` layers of 32 heads for images of five questions, half precision, each layer random."""
    rng = np.random.default_rng(0)
    group = np.arange(rows) // 5
    first = sample_features(rng, rows, WIDTH)
    truth = sample_labels(rng, first, CONCEPTS)
    schema = Schema((ArrayInfo("decoder", "z", "last", layers, HEADS * WIDTH, HEADS),), "float16")
    table: dict[str, Any] = {"id": [f"q{i}" for i in range(rows)], "group": [f"s{g}" for g in group]}
    table |= {f"object:noun{k}": truth[k].astype(np.float32).tolist() for k in range(CONCEPTS)}
    values = np.empty((rows, layers, HEADS * WIDTH), np.float16)
    for layer in range(layers):
        for head in range(HEADS):
            x = sample_features(rng, rows, WIDTH)
            for k in range(CONCEPTS):  # every concept is weakly represented in every head
                x += (
                    0.15
                    * rng.random()
                    * truth[k][:, None].astype(np.float32)
                    * rng.normal(size=WIDTH).astype(np.float32)
                )
            values[:, layer, head * WIDTH : (head + 1) * WIDTH] = x
    with StoreWriter(folder, schema, {"model": "synthetic"}) as writer:
        for start in range(0, rows, 250):
            part = slice(start, start + 250)
            writer.append({("decoder", "z", "last"): values[part]}, {k: v[part] for k, v in table.items()})
    return ActivationStore(folder)


def measure_grid(report: Report, store: ActivationStore, layers: int, options: dict[str, Any], threads: int) -> None:
    """Time fitting the grid; a grid of fewer layers has its number of layers in the figure's name."""
    with progress(f"grid of {layers} layers"):
        start = time.perf_counter()
        probe_grid = fit_grid(store, CONCEPT_NAMES, "z", **options)
        seconds = time.perf_counter() - start
    report.add("grid_training_rows", int(probe_grid.n_train[0]), 1)
    report.add("grid_fits", layers * HEADS * CONCEPTS * (FOLDS * len(C_VALUES) + 1), 1)
    whole = layers == LAYERS
    name = "grid_seconds" if whole else f"grid_seconds_of_{layers}_layers"
    report.add(name, seconds, 1, "<= 180" if whole and threads == 1 else "")
    report.add("grid_worst_proven_gap", float(probe_grid.gap.max()), probe_grid.gap.size, "<= 1e-6")


def measure_null(
    report: Report, store: ActivationStore, layers: int, options: dict[str, Any], threads: int, permutations: int
) -> None:
    """Time the permutation test of the grid."""
    with progress(f"permutation test of {layers} layers"):
        # The test uses only the split and the values of C of a grid: a grid of the fastest estimator is enough.
        probe_grid = fit_grid(store, CONCEPT_NAMES, "z", estimator="mean_difference", resamples=1, **options)
        start = time.perf_counter()
        test = permutation_test(probe_grid, store, permutations=permutations)
        seconds = time.perf_counter() - start
    whole = layers == LAYERS
    part = "" if whole else f"_of_{layers}_layers"
    goal = "<= 360" if whole and permutations == 1000 else ""
    report.add(f"null_{permutations}_seconds{part}_{threads}_threads", seconds, 1, goal)
    report.add(f"null_{permutations}_smallest_family_p", float(test.p_family.min()), test.p.size)


def measure_cost(report: Report, n_repetitions: int, path: Path | None) -> None:
    """Time a batch over rows, features and concepts; the minimum over repetitions, because other load only adds time."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    axes: dict[str, list[tuple[int, int, int]]] = {
        "rows": [(n, 128, CONCEPTS) for n in (500, 1000, 2000, 4000, 8000)],
        "features": [(ROWS, d, CONCEPTS) for d in (32, 64, 128, 256, 512, 1024, 2048, 4096)],
        "concepts": [(ROWS, 128, q) for q in (1, 2, 5, 10, 20, 40, 80)],
    }
    plot, panels = plt.subplots(1, 3, figsize=(9, 2.9), sharey=True, constrained_layout=True)
    for at, (panel, (name, sizes)) in enumerate(zip(panels, axes.items(), strict=True)):
        times = []
        for n, d, q in sizes:
            rng = np.random.default_rng(n + d + q)
            x = sample_features(rng, n, d)
            y = sample_labels(rng, x, q)
            fit_batch(x, y, "cpu")
            duration = min(time_call(lambda x=x, y=y: fit_batch(x, y, "cpu")) for _ in range(n_repetitions))
            times.append(1000 * duration / (q * len(C_VALUES)))
            report.add(f"ms_a_fit_n{n}_d{d}_q{q}", times[-1], n_repetitions)
        ticks = [size[at] for size in sizes]
        panel.loglog(ticks, times, "o-", color="#33508a", markersize=4)
        panel.set_xticks(ticks, [str(t) for t in ticks], fontsize=8, rotation=45)
        panel.set_xticks([], minor=True)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3, axis="y", which="both", lw=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms per fit, including the certificate")
    plot.suptitle("2000 rows, 128 features, 20 concepts x 6 values of C unless varied; one thread", fontsize=9)
    if path is not None:
        plot.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(plot)


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = option_parser(
        __doc__, quick="few repetitions and a sixteenth of the grid, about a minute", save=True, device=True
    )
    parser.add_argument("--parts", default="heads,residual,grid,null,cost", help="parts, separated by commas")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of the linear algebra libraries")
    parser.add_argument("--permutations", type=int, default=1000, help="permutations of the test")
    parser.add_argument("--store", type=Path, help="folder of the grid's store; read if it exists, otherwise written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quick, parts = options.quick, options.parts.split(",")
    report = Report()
    wide_console().print(
        "Compares certified batched probes with scikit-learn's LogisticRegression, one fit after the other."
    )
    if "heads" in parts:
        with progress("heads"):
            compare_with_sklearn(report, "heads", WIDTH, 20, 3 if quick else 9, 12 if quick else 120, options.device)
    if "residual" in parts:
        with progress("residual"):
            compare_with_sklearn(report, "residual", 4096, 15, 3 if quick else 7, 6 if quick else 24, options.device)
    if {"grid", "null"} & set(parts):
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.store or Path(temporary) / "store"
            with progress("store"):
                layers = 2 if quick else LAYERS
                store = ActivationStore(folder) if folder.exists() else make_store(folder, layers, ROWS + HELD_OUT)
            layers = store.layers("decoder", "z")
            shared: dict[str, Any] = {"C": C_VALUES.tolist(), "folds": FOLDS, "test_fraction": 0.2, "control": 0}
            if "grid" in parts:
                measure_grid(report, store, layers, {**shared, "device": options.device}, options.threads)
            if "null" in parts:
                permutations = 50 if quick else options.permutations
                measure_null(report, store, layers, shared, options.threads, permutations)
    if "cost" in parts and not quick:
        with progress("cost"):
            measure_cost(report, 3, PLOT if options.save else None)
    print_figures(report.figures)
    device = describe_device("torch", "numpy", "scikit-learn", device=options.device)
    if options.save:
        path = RESULTS / "probes.json"
        saved = json.loads(path.read_text())["figures"] if path.exists() else {}
        save_record({"benchmark": "probes", "device": device, "figures": saved | report.figures})
    finish("probes", device, report.figures)


if __name__ == "__main__":
    main()
