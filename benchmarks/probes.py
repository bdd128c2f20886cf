"""How fast probes are fitted and how near the optimum they are, against scikit-learn.

    python benchmarks/probes.py [--quick] [--parts heads,residual,grid,null,cost] [--threads 1] [--device cuda]

Baseline is `LogisticRegression` (lbfgs, float64, default tolerance) on features that are already standardised; the truth
is the same problem at tol=1e-10. One batch is 20 concepts x 6 penalties on 2000 rows; the candidate's time holds
standardising, turning to the principal axes, the iterations in float32 and the float64 certificate of every fit.
Baseline (a sample of the batch) and candidate take turns, in alternating order; figures are medians over turns.

``grid`` fits 1024 heads x 20 concepts x 5 folds x 6 penalties from a store on disk, end to end: reading, choosing,
fitting again on all training rows, scores and their bootstrap intervals. ``null`` is the permutation test of that grid.
Features are synthetic, with a decaying spectrum as activations have; the seconds, not the scores, are the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
_THREADS = sys.argv[sys.argv.index("--threads") + 1] if "--threads" in sys.argv[:-1] else "1"
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = _THREADS  # read when the libraries are imported, below

import numpy as np
import sklearn
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression

from activation_store import ActivationStore, ArrayInfo, Schema, StoreWriter
from probes import fit_grid, permutation_test
from probes.solvers.logistic_float32 import RowBlock, balanced_weights, fit_rows

PENALTIES = np.logspace(-5, 0, 6)
CONCEPTS, FOLDS, ROWS, HELD_OUT = 20, 5, 2000, 500
LAYERS, HEADS, WIDTH = 32, 32, 128
TOLERANCE = 1e-8
"""Proven relative gap asked of the candidate: the default of a grid."""
SAMPLE = 12
"""Fits of scikit-learn a turn: two concepts at each penalty."""
RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parent.parent / "docs" / "probes_cost.png"


@dataclass
class Report:
    """Figures as they come."""

    console: Console
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, value: float, n: int, goal: str = "", holds: bool | None = None) -> None:
        """Note a figure and say it at once: a long run shows how far it is."""
        figure: dict[str, Any] = {"value": round(value, 12 if value < 1e-3 else 3), "n": n}
        if goal:
            figure |= {"goal": goal, "holds": bool(holds)}
        self.figures[name] = figure
        self.console.print(f"  {name}: {figure['value']}{f' (goal {goal})' if goal else ''}")


def features(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Draw float32 [rows, width] with a decaying spectrum, columns of different size and a mean."""
    spectrum = np.exp(-np.arange(width) / (width / 6)) + 1e-3
    z = (rng.normal(size=(rows, width)) * np.sqrt(spectrum)).astype(np.float32)
    if width <= 512:
        z = z @ np.linalg.qr(rng.normal(size=(width, width)))[0].astype(np.float32)
    else:  # a product of reflections turns as well, and is cheap
        for _ in range(24):
            v = rng.normal(size=width).astype(np.float32)
            v /= np.linalg.norm(v)
            z -= 2 * np.outer(z @ v, v)
    return z * rng.uniform(0.3, 3, width).astype(np.float32) + rng.normal(size=width).astype(np.float32)


def labels(rng: np.random.Generator, x: np.ndarray, count: int) -> np.ndarray:
    """Draw 0/1 [count, rows]: concepts from hardly to well decodable, of different frequency."""
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    score = z @ rng.normal(size=(x.shape[1], count))
    score = score / score.std(axis=0) * rng.uniform(0, 2, count) + rng.normal(size=score.shape)
    return (score > rng.normal(size=count) * 0.5).T.astype(np.float64)


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def candidate(x: np.ndarray, y: np.ndarray, device: str, tolerance: float = TOLERANCE) -> Any:
    """Fit a batch: all concepts at all penalties."""
    penalties = np.broadcast_to(PENALTIES, (len(y), len(PENALTIES)))
    return fit_rows(RowBlock.of(x, device), y, penalties, balanced_weights(y), tolerance=tolerance)


def reference(z: np.ndarray, y: np.ndarray, penalty: float, **options: Any) -> LogisticRegression:
    """Fit with scikit-learn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says where it stalls
        return LogisticRegression(C=penalty, class_weight="balanced", **options).fit(z, y)


def solution(model: Any) -> tuple[np.ndarray, float]:
    """Return a fitted model's weights and intercept."""
    return model.coef_[0], float(model.intercept_[0])


def objective(z: np.ndarray, y: np.ndarray, penalty: float, w: np.ndarray, b: float) -> float:
    """Evaluate what is minimised, in float64."""
    margins = np.where(y == 1, 1.0, -1.0) * (z @ w + b)
    return float(0.5 * w @ w + penalty * np.sum(balanced_weights(y[None])[0] * np.logaddexp(0.0, -margins)))


def against_scikit_learn(
    report: Report, name: str, width: int, goal: float, turns: int, audited: int, device: str
) -> None:
    """Time both on one problem, then audit some fits against the truth."""
    rng = np.random.default_rng(width)
    x = features(rng, ROWS + HELD_OUT, width)
    every = labels(rng, x, CONCEPTS)
    train, test, y = x[:ROWS], x[ROWS:], np.ascontiguousarray(every[:, :ROWS])
    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    z, z_test = (train - mean) / deviation, (test - mean) / deviation
    candidate(train, y, device)  # warm
    ours, theirs, ratios = [], [], []
    for turn in range(turns):
        sample = [
            ((turn * 2 + k) % CONCEPTS, c) for k in range(SAMPLE // len(PENALTIES)) for c in range(len(PENALTIES))
        ]

        def baseline(sample: list[tuple[int, int]] = sample) -> None:
            for k, c in sample:
                reference(z, y[k], PENALTIES[c])

        order = [
            (ours, lambda: candidate(train, y, device), CONCEPTS * len(PENALTIES)),
            (theirs, baseline, len(sample)),
        ]
        for times, work, count in order if turn % 2 else order[::-1]:
            times.append(seconds(work) / count)
        ratios.append(theirs[-1] / ours[-1])
    report.add(f"{name}_ms_a_fit", 1000 * statistics.median(ours), turns)
    report.add(f"{name}_sklearn_ms_a_fit", 1000 * statistics.median(theirs), turns)
    ratio = statistics.median(ratios)
    report.add(f"{name}_speedup", ratio, turns, f">= {goal}", ratio >= goal)
    fit = candidate(train, y, device)
    gaps, differing, default_gaps, default_differing = [], [], [], []
    truth_solver = "newton-cholesky" if width <= 512 else "lbfgs"
    for at in np.linspace(0, CONCEPTS * len(PENALTIES) - 1, audited).astype(int):
        k, c = divmod(int(at), len(PENALTIES))
        true = reference(z, y[k], PENALTIES[c], tol=1e-10, solver=truth_solver, max_iter=20_000)
        best = objective(z, y[k], PENALTIES[c], *solution(true))
        positive = true.decision_function(z_test) > 0
        gaps.append((fit.objective[at] - best) / best)
        differing.append(int((((test @ fit.coefficients[at] + fit.intercepts[at]) > 0) != positive).sum()))
        plain = reference(z, y[k], PENALTIES[c])
        default_gaps.append(objective(z, y[k], PENALTIES[c], *solution(plain)) / best - 1)
        default_differing.append(int(((plain.decision_function(z_test) > 0) != positive).sum()))
    report.add(f"{name}_worst_gap_to_truth", max(gaps), audited, "<= 1e-6", max(gaps) <= 1e-6)
    report.add(f"{name}_worst_proven_gap", float(fit.gap.max()), fit.gap.size, "<= 1e-6", float(fit.gap.max()) <= 1e-6)
    report.add(f"{name}_most_predictions_differing", max(differing), audited, "<= 1 of 500", max(differing) <= 1)
    report.add(f"{name}_sklearn_worst_gap_to_truth", max(default_gaps), audited)
    report.add(f"{name}_sklearn_most_predictions_differing", max(default_differing), audited)


def make_store(folder: Path, layers: int, rows: int) -> ActivationStore:
    """Write z of `layers` layers of 32 heads for images of five questions, half precision, each layer random."""
    rng = np.random.default_rng(0)
    group = np.arange(rows) // 5
    first = features(rng, rows, WIDTH)
    truth = labels(rng, first, CONCEPTS)
    schema = Schema((ArrayInfo("decoder", "z", "last", layers, HEADS * WIDTH, HEADS),), "float16")
    table: dict[str, Any] = {"id": [f"q{i}" for i in range(rows)], "group": [f"s{g}" for g in group]}
    table |= {f"object:noun{k}": truth[k].astype(np.float32).tolist() for k in range(CONCEPTS)}
    values = np.empty((rows, layers, HEADS * WIDTH), np.float16)
    for layer in range(layers):
        for head in range(HEADS):
            x = features(rng, rows, WIDTH)
            for k in range(CONCEPTS):  # every concept is a little in every head
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


class Told:
    """A store that says which layer is read, and after how many seconds: a long run shows how far it is."""

    def __init__(self, store: ActivationStore, console: Console) -> None:
        self._store, self._console, self._start = store, console, time.perf_counter()
        self.arrays, self.digest, self.provenance, self.frame = (
            store.arrays,
            store.digest,
            store.provenance,
            store.frame,
        )

    def read(self, site: str, tokens: str, head: int | None = None, examples: Any = None) -> np.ndarray:
        """See `ActivationStore.read`."""
        self._console.print(f"  {site} after {time.perf_counter() - self._start:.0f} s", highlight=False)
        return self._store.read(site, tokens, head=head, examples=examples)


def grid(
    report: Report, store: ActivationStore, layers: int, device: str, *, whole: bool, null: int, threads: int
) -> None:
    """Fit the grid, or test it by permutation; some figures are per fit or scaled, as their names state."""
    names = [f"object:noun{k}" for k in range(CONCEPTS)]
    options: dict[str, Any] = {"C": PENALTIES.tolist(), "folds": FOLDS, "test_fraction": 0.2, "control": 0}
    if not null:
        start = time.perf_counter()
        probe_grid = fit_grid(Told(store, report.console), names, "z", device=device, **options)
        took = time.perf_counter() - start
        fits = layers * HEADS * CONCEPTS * (FOLDS * len(PENALTIES) + 1)
        report.add("grid_training_rows", float(probe_grid.n_train[0]), 1)
        report.add("grid_fits", float(fits), 1)
        goal = ("<= 180", took <= 180) if whole and threads == 1 else ("", None)
        report.add("grid_seconds" if whole else f"grid_seconds_of_{layers}_layers", took, 1, *goal)
        report.add(
            "grid_worst_proven_gap",
            float(probe_grid.gap.max()),
            probe_grid.gap.size,
            "<= 1e-6",
            float(probe_grid.gap.max()) <= 1e-6,
        )
        return
    # The null takes its split and penalties from a grid; which estimator the grid was fitted with is no matter to it.
    cheap = fit_grid(store, names, "z", estimator="mean_difference", resamples=1, **options)
    start = time.perf_counter()
    tested = permutation_test(cheap, Told(store, report.console), permutations=null)
    took = time.perf_counter() - start
    goal = ("<= 360", took <= 360) if whole and null == 1000 else ("", None)
    label = (
        f"null_{null}_seconds_{threads}_threads"
        if whole
        else f"null_{null}_seconds_of_{layers}_layers_{threads}_threads"
    )
    report.add(label, took, 1, *goal)
    report.add(f"null_{null}_smallest_family_p", float(tested.p_family.min()), tested.p.size)


def cost(report: Report, turns: int, path: Path | None) -> None:
    """Time a batch over rows, features and concepts; the fastest of some turns, since what else runs only adds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    axes: dict[str, list[tuple[int, int, int]]] = {
        "rows": [(n, 128, CONCEPTS) for n in (500, 1000, 2000, 4000, 8000)],
        "features": [(ROWS, d, CONCEPTS) for d in (32, 64, 128, 256, 512, 1024, 2048, 4096)],
        "concepts": [(ROWS, 128, q) for q in (1, 2, 5, 10, 20, 40, 80)],
    }
    figure, panels = plt.subplots(1, 3, figsize=(9, 2.9), sharey=True, constrained_layout=True)
    for at, (panel, (name, sizes)) in enumerate(zip(panels, axes.items(), strict=True)):
        times = []
        for n, d, q in sizes:
            rng = np.random.default_rng(n + d + q)
            x = features(rng, n, d)
            y = labels(rng, x, q)
            candidate(x, y, "cpu")
            duration = min(seconds(lambda x=x, y=y: candidate(x, y, "cpu")) for _ in range(turns))
            times.append(1000 * duration / (q * len(PENALTIES)))
            report.add(f"ms_a_fit_n{n}_d{d}_q{q}", times[-1], turns)
        ticks = [size[at] for size in sizes]
        panel.loglog(ticks, times, "o-", color="#33508a", markersize=4)
        panel.set_xticks(ticks, [str(t) for t in ticks], fontsize=8, rotation=45)
        panel.set_xticks([], minor=True)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3, axis="y", which="both", lw=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms a fit, certificate included")
    figure.suptitle("2000 rows, 128 features, 20 concepts x 6 penalties where not varied; one thread", fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Run, print a table, and as the last line one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="few repetitions and a sixteenth of the grid, about a minute"
    )
    parser.add_argument("--parts", default="heads,residual,grid,null,cost")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument(
        "--store", type=Path, help="where the grid's store is, or is to be written; by default a temporary folder"
    )
    parser.add_argument("--save", action="store_true", help="put the figures into benchmarks/results/probes.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quick, parts = options.quick, options.parts.split(",")
    report = Report(Console())
    report.console.print(
        "Compares certified batched probes with scikit-learn's LogisticRegression, one fit after the other."
    )
    if "heads" in parts:
        against_scikit_learn(report, "heads", WIDTH, 20, 3 if quick else 9, 12 if quick else 120, options.device)
    if "residual" in parts:
        against_scikit_learn(report, "residual", 4096, 15, 3 if quick else 7, 6 if quick else 24, options.device)
    if {"grid", "null"} & set(parts):
        layers = 2 if quick else LAYERS
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.store or Path(temporary) / "store"
            store = ActivationStore(folder) if folder.exists() else make_store(folder, layers, ROWS + HELD_OUT)
            layers, whole = store.layers("decoder", "z"), store.layers("decoder", "z") == LAYERS
            for part in ("grid", "null"):
                if part in parts:
                    null = (50 if quick else options.permutations) if part == "null" else 0
                    grid(report, store, layers, options.device, whole=whole, null=null, threads=options.threads)
    if "cost" in parts and not quick:
        cost(report, 3, PICTURE if options.save else None)
    table = Table("figure", "value", "goal", "holds", "n")
    for name, f in report.figures.items():
        table.add_row(name, str(f["value"]), f.get("goal", ""), str(f.get("holds", "")), str(f["n"]))
    report.console.print(table)
    cuda = options.device.startswith("cuda")
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {options.threads} threads"
    versions = f"torch {torch.__version__}, numpy {np.__version__}, scikit-learn {sklearn.__version__}"
    outcome = {"benchmark": "probes", "device": f"{where}, {versions}", "figures": report.figures}
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / "probes.json"
        before = json.loads(path.read_text())["figures"] if path.exists() else {}
        document = {**outcome, "device": f"{platform.machine()}, {versions}", "figures": before | report.figures}
        path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
