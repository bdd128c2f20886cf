"""Regressions of behavior on representation: odds ratios, a quantile of the answer's margin, and the difference in AUC.

If representation bounds behavior, an upper quantile of the model's margin rises with the representation (quantile regression:
Koenker & Bassett 1978), and right answers become more frequent (logistic regression). Both have the same controls, which may
explain it instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, QuantileRegressor

from diagnosis.ceiling import folds_of
from groundscope.core.errors import ConfigError, DataError
from groundscope.core.progress import progress_bar
from groundscope.core.short_repr import short_repr
from groundscope.core.statistics import FEW_GROUPS, Estimate
from groundscope.core.text import format_count

PENALTY = 100.0
"""Inverse penalty of the logistic regression: next to none, but finite where a score separates right from wrong answers."""
MIN_ROWS_PER_COLUMN = 5
"""Smallest number of rows of the rarer class for each column."""


@dataclass(frozen=True, eq=False)
class CorrectnessRegression:
    """Regressions of right answers on scores of the representation, with controls; returned by `regress_correctness`.

    Examples
    --------
    >>> import numpy as np
    >>> from diagnosis import regress_correctness
    >>> rng = np.random.default_rng(0)
    >>> margin = rng.normal(size=300)
    >>> correct = rng.random(300) < 1 / (1 + np.exp(-margin))
    >>> images = [f"image {i // 2}" for i in range(300)]
    >>> result = regress_correctness(correct, {"probe": margin}, images, resamples=50, progress=False)
    >>> result.n, result.groups, list(result.odds_ratios), result.auc > 0.5
    (300, 150, ['probe'], True)
    """

    odds_ratios: Mapping[str, Estimate]
    """By score: factor of the odds of a right answer for one standard deviation more."""
    slopes: Mapping[str, Estimate]
    """By score: change of the `quantile` of the model's margin for one standard deviation more; empty without margins."""
    auc: float
    """AUC of scores and controls for right answers, on held-out images."""
    auc_controls: float
    """AUC of the controls alone."""
    difference: Estimate
    """``auc - auc_controls``."""
    quantile: float
    layers: Mapping[str, tuple[int, ...]]
    """By score with layers: the layer of each fold, chosen on the other folds."""
    n: int
    groups: int

    __repr__ = short_repr

    def __str__(self) -> str:
        ratios = ", ".join(f"{name} {effect}" for name, effect in self.odds_ratios.items())
        auc = f"AUC {self.auc:.3f}, {self.auc_controls:.3f} with controls only: difference {self.difference}"
        return f"odds ratios: {ratios}; {auc}"


def regress_correctness(
    correct: np.ndarray,
    scores: Mapping[str, np.ndarray],
    groups: Sequence[str] | np.ndarray,
    *,
    controls: Mapping[str, np.ndarray | Sequence[str]] | None = None,
    margins: np.ndarray | None = None,
    quantile: float = 0.9,
    folds: int = 5,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> CorrectnessRegression:
    """Regress right answers on scores of the representation, such as alignment and probe margins.

    Columns are standardized. A control of texts becomes one column for each value but the first. The layer of a score with layers
    is chosen for each fold by its AUC for right answers on the other folds, and again in every draw of the bootstrap over images.

    Parameters
    ----------
    correct
        Whether the model's answer is right, bool ``[n]``.
    scores
        By name: a score of each row, ``[n]``, or of each layer and row, ``[layers, n]``.
    groups
        Image of each row.
    controls
        By name: numbers or texts, ``[n]``: kind, split, object size, prior log-odds (`circuits.SourceShares.words`).
    margins
        The model's log-odds of the true answer, ``[n]``, for the quantile regression; None for none.
    quantile
        The quantile.
    folds, resamples, confidence, seed
        Parts of the images; number of draws, confidence and seed.
    progress
        Whether to show progress; by default on a terminal only.

    Raises
    ------
    DataError
        If sizes differ, a value is not finite, all answers are right or all wrong, there are fewer images than folds, or
        fewer rows of the rarer class than 5 for each column.
    ConfigError
        If `quantile`, `confidence` or `resamples` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from diagnosis import regress_correctness
    >>> rng = np.random.default_rng(0)
    >>> margin, size = rng.normal(size=(2, 300))
    >>> correct = rng.random(300) < 1 / (1 + np.exp(-margin))
    >>> images = [f"image {i // 2}" for i in range(300)]
    >>> result = regress_correctness(correct, {"probe": margin}, images, controls={"size": size}, resamples=50, progress=False)
    >>> result.odds_ratios["probe"].low > 1, result.difference.low > 0
    (True, True)
    """
    is_right = np.asarray(correct, bool)
    names = np.asarray(groups).astype(str)
    tables = {name: np.atleast_2d(np.asarray(values, np.float64)) for name, values in scores.items()}
    control = _columns(controls or {}, len(is_right))
    margin = None if margins is None else np.asarray(margins, np.float64)
    _check(is_right, tables, names, control, margin, quantile, folds, resamples, confidence)
    unique, group = np.unique(names, return_inverse=True)
    fold_of = folds_of(names, folds, seed)

    def measure(
        rows: np.ndarray, start: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, float, float, dict[str, tuple[int, ...]]] | None:
        """Return ratios, coefficients, both AUC and layers for some rows, with repeats; None if a class is missing.

        With the coefficients of all rows to `start` from, the quantile regression is that of `quantile_coefficients`.
        """
        y, fold = is_right[rows], fold_of[rows]
        if any(len(set(y[fold != f])) < 2 for f in range(folds)) or len(set(y)) < 2:
            return None
        layers = {name: _best_layers(table[:, rows], y, fold, folds) for name, table in tables.items()}
        chosen = np.column_stack([tables[name][np.array(at)[fold], rows] for name, at in layers.items()])
        both, alone = _standardized(np.column_stack([chosen, control[rows]])), _standardized(control[rows])
        ratios = np.exp(_logistic(both, y).coef_[0][: len(tables)])
        coefficients = np.zeros(0)
        if margin is not None and start is not None:
            coefficients = quantile_coefficients(both, margin[rows], quantile, start)
        elif margin is not None:
            fit = QuantileRegressor(quantile=quantile, alpha=0.0, solver="highs").fit(both, margin[rows])
            coefficients = np.append(np.asarray(fit.coef_), float(fit.intercept_))
        scores_held_out = {n: _held_out(x, y, fold, folds) for n, x in (("both", both), ("alone", alone))}
        return (
            ratios,
            coefficients,
            auc_by_ranks(y, scores_held_out["both"]),
            auc_by_ranks(y, scores_held_out["alone"]),
            layers,
        )

    whole = measure(np.arange(len(is_right)))
    if whole is None:
        msg = "all answers outside of one fold are right, or all wrong; use fewer folds, or more rows"
        raise DataError(msg)
    members = [np.flatnonzero(group == g) for g in range(len(unique))]
    rng = np.random.default_rng(seed)
    draws = []
    with progress_bar(progress) as bar:
        task = bar.add_task("bootstrap of regressions", total=resamples)
        for _ in range(resamples):
            draw_rows = np.concatenate([members[g] for g in rng.integers(len(unique), size=len(unique))])
            result = measure(draw_rows, whole[1] if margin is not None else None)
            if result is not None:
                draws.append(np.concatenate([result[0], result[1][: len(tables)], [result[2] - result[3]]]))
            bar.advance(task)
    slopes = whole[1][: len(tables)]
    table = np.stack(draws) if draws else np.full((1, len(whole[0]) + len(slopes) + 1), np.nan)
    tail, few = 100 * (1 - confidence) / 2, len(unique) < FEW_GROUPS
    ends = np.percentile(table, [tail, 100 - tail], axis=0)

    def effect(value: float, column: int) -> Estimate:
        return Estimate(float(value), float(ends[0, column]), float(ends[1, column]), len(is_right), few)

    k = len(tables)
    return CorrectnessRegression(
        {name: effect(whole[0][i], i) for i, name in enumerate(tables)},
        {name: effect(slopes[i], k + i) for i, name in enumerate(tables)} if margin is not None else {},
        whole[2],
        whole[3],
        effect(whole[2] - whole[3], table.shape[1] - 1),
        quantile,
        {name: at for name, at in whole[4].items() if len(tables[name]) > 1},
        len(is_right),
        len(unique),
    )


def quantile_coefficients(
    x: np.ndarray, y: np.ndarray, quantile: float, start: np.ndarray, *, steps: int = 100
) -> np.ndarray:
    """Return slopes and intercept of a quantile regression, by the majorization of Hunter & Lange (2000) from `start`.

    A draw of the bootstrap is near the solution of all rows, from which this needs a thirtieth of the time of a linear
    program; residuals below a thousandth of the deviation of `y` count as that.

    Parameters
    ----------
    x, y
        Float ``[n, k]`` and ``[n]``.
    quantile
        The quantile.
    start
        Slopes and intercept, ``[k + 1]``.
    steps
        Largest number of steps.
    """
    design = np.column_stack([x, np.ones(len(x))])
    least = 1e-3 * float(y.std()) + 1e-12
    ridge = 1e-9 * np.eye(design.shape[1])  # a draw may lack a value of a control
    pull = (2 * quantile - 1) * design.sum(axis=0)
    beta = np.asarray(start, float)
    for _ in range(steps):
        weights = 1 / np.maximum(np.abs(y - design @ beta), least)
        weighted = design * weights[:, None]
        new = np.linalg.solve(weighted.T @ design + ridge, weighted.T @ y + pull)
        moved = float(np.abs(new - beta).max())
        beta = new
        if moved < 1e-2 * least:
            break
    return beta


def _best_layers(table: np.ndarray, y: np.ndarray, fold: np.ndarray, folds: int) -> tuple[int, ...]:
    """Return for each fold the layer whose score has the largest AUC for right answers on the other folds."""
    if len(table) == 1:
        return (0,) * folds
    return tuple(int(np.argmax([auc_by_ranks(y[fold != f], row[fold != f]) for row in table])) for f in range(folds))


def auc_by_ranks(y: np.ndarray, score: np.ndarray) -> float:
    """Return the AUC by ranks, with ties at half, as scikit-learn's but without its checks: draws compute many."""
    ranks = rankdata(score)
    positive = int(y.sum())
    return float((ranks[y].sum() - positive * (positive + 1) / 2) / (positive * (len(y) - positive)))


def _standardized(x: np.ndarray) -> np.ndarray:
    """Return columns of mean 0 and standard deviation 1; constant columns are 0."""
    spread = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1.0)


def _logistic(x: np.ndarray, y: np.ndarray) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a draw that nearly separates the classes
        return LogisticRegression(C=PENALTY, max_iter=500).fit(x, y)


def _held_out(x: np.ndarray, y: np.ndarray, fold: np.ndarray, folds: int) -> np.ndarray:
    """Return log-odds of each row by a fit to the other folds; without columns 0."""
    scores = np.zeros(len(y))
    for f in range(folds if x.shape[1] else 0):
        test = fold == f
        if test.any():
            scores[test] = _logistic(x[~test], y[~test]).decision_function(x[test])
    return scores


def _columns(controls: Mapping[str, np.ndarray | Sequence[str]], n: int) -> np.ndarray:
    """Return the controls as columns, float64 ``[n, k]``."""
    columns: list[np.ndarray] = []
    for name, values in controls.items():
        array = np.asarray(values)
        if array.shape != (n,):
            msg = f"control '{name}' has the shape {array.shape}; pass one value for each of {format_count(n, 'row')}"
            raise DataError(msg)
        if array.dtype.kind in "US" or array.dtype == object:
            texts = array.astype(str)
            columns += [(texts == value).astype(float) for value in sorted(set(texts.tolist()))[1:]]
        else:
            columns.append(array.astype(np.float64))
    return np.column_stack(columns) if columns else np.zeros((n, 0))


def _check(
    is_right: np.ndarray,
    tables: Mapping[str, np.ndarray],
    groups: np.ndarray,
    control: np.ndarray,
    margin: np.ndarray | None,
    quantile: float,
    folds: int,
    resamples: int,
    confidence: float,
) -> None:
    if not 0 < quantile < 1 or not 0 < confidence < 1 or resamples < 20:
        msg = f"quantile={quantile}, confidence={confidence}, resamples={resamples}: use numbers between 0 and 1, and 20 draws"
        raise ConfigError(msg)
    if not tables:
        msg = "scores is empty; pass at least one score of the representation"
        raise DataError(msg)
    n = len(is_right)
    sizes = {**{f"score '{k}'": v.shape[-1] for k, v in tables.items()}, "groups": len(groups)}
    sizes |= {} if margin is None else {"margins": len(margin)}
    if wrong := next((f"{name} has {size}" for name, size in sizes.items() if size != n), None):
        msg = f"correct has {format_count(n, 'row')}, but {wrong}; pass one value for each row"
        raise DataError(msg)
    for name, values in {**tables, "controls": control, **({} if margin is None else {"margins": margin})}.items():
        if not np.isfinite(values).all():
            msg = f"'{name}' has values that are not finite; leave such rows out"
            raise DataError(msg)
    rare = int(min(is_right.sum(), n - is_right.sum()))
    needed = MIN_ROWS_PER_COLUMN * (len(tables) + control.shape[1])
    if rare < needed:
        what = "all answers are right, or all wrong" if not rare else f"{format_count(rare, 'row')} of the rarer class"
        msg = f"{what}: {len(tables) + control.shape[1]} columns need {needed}; use fewer controls, or more rows"
        raise DataError(msg)
    if folds < 2 or len(set(groups.tolist())) < folds:
        msg = f"folds={folds} with {format_count(len(set(groups.tolist())), 'image')}; use at least 2 folds, and as many images"
        raise DataError(msg)
