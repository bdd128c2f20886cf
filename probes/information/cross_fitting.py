"""Cross-fitted log-probabilities: every row is read by a reader that was fitted, and chosen, on the images of other folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probes.information.families import PredictiveFamily, predictive_families
from probes.information.folds import Folds
from probes.information.problem import Predictor, Problem, share_predictor
from probes.information.reduction import ReducedFold

NULL = "null"
"""Choice of the reader that ignores the features."""


@dataclass(frozen=True, eq=False)
class Readers:
    """The selected reader of each fold, and the readers with the same choice that its inner folds fitted."""

    outer: tuple[Predictor, ...]
    inner: tuple[tuple[Predictor, ...], ...]
    choices: tuple[Any, ...]
    """For each fold the selected choice of the family, or the name of the simpler reader that was as good."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows with their classes and nested folds: what all sites of a path share."""

    classes: np.ndarray
    count: int
    folds: Folds

    def parts(self, f: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return training and held-out rows, boolean [N], of each inner fold of fold f."""
        inner = self.folds.inner[f]
        return [((inner >= 0) & (inner != i), inner == i) for i in range(int(inner.max()) + 1)]


def share_readers(rows: Rows) -> Readers:
    """Return the class shares of the training rows, as readers."""
    outer = tuple(share_predictor(rows.classes[rows.folds.outer != f], rows.count) for f in range(rows.folds.count))
    inner = tuple(
        tuple(share_predictor(rows.classes[train], rows.count) for train, _ in rows.parts(f))
        for f in range(rows.folds.count)
    )
    return Readers(outer, inner, (NULL,) * rows.folds.count)


def fit_readers(
    rows: Rows, features: Sequence[np.ndarray], family: PredictiveFamily, simpler: Mapping[str, Readers], base: Readers
) -> Readers:
    """Fit a family to one site, and choose its penalty by the mean log-loss of the inner folds.

    Parameters
    ----------
    rows
        Classes and folds.
    features
        For each fold, all rows [N, k] as its training rows reduce them.
    family
        The family.
    simpler
        Readers by name that are among the choices: those that ignore the features, and those of the base family. An earlier
        one is selected before a later one or a choice of the family of the same log-loss.
    base
        Readers for `Problem.base`.
    """
    n_folds = rows.folds.count
    parts = [(f, i, train, test_rows) for f in range(n_folds) for i, (train, test_rows) in enumerate(rows.parts(f))]
    problems = [
        Problem(features[f][train], rows.classes[train], rows.count, base.inner[f][i]) for f, i, train, _ in parts
    ]
    fitted = family.fit(problems, [family.choices] * len(problems))
    losses = np.zeros((n_folds, len(simpler) + len(family.choices)))  # [F, choices]
    for (f, i, _, test_rows), predictors in zip(parts, fitted, strict=True):
        x, z = features[f][test_rows], rows.classes[test_rows]
        candidates = [readers.inner[f][i] for readers in simpler.values()] + list(predictors)
        losses[f] -= [float(predict(x)[np.arange(len(z)), z].sum()) for predict in candidates]
    best = losses.argmin(axis=1)
    names, n = list(simpler), len(simpler)
    refitted = [f for f in range(n_folds) if best[f] >= n]
    final: dict[int, Predictor] = {}
    if refitted:
        trained = [rows.folds.outer != f for f in refitted]
        whole = [
            Problem(features[f][train], rows.classes[train], rows.count, base.outer[f])
            for f, train in zip(refitted, trained, strict=True)
        ]
        predictors = family.fit(whole, [[family.choices[best[f] - n]] for f in refitted])
        final = {f: of_problem[0] for f, of_problem in zip(refitted, predictors, strict=True)}
    inner_of = {(f, i): of_problem for (f, i, _, _), of_problem in zip(parts, fitted, strict=True)}
    outer, inner, choices = [], [], []
    for f in range(n_folds):
        if f in final:
            outer.append(final[f])
            inner.append(tuple(inner_of[f, i][best[f] - n] for i in range(len(rows.parts(f)))))
            choices.append(family.choices[best[f] - n])
        else:
            readers = simpler[names[best[f]]]
            outer.append(readers.outer[f])
            inner.append(readers.inner[f])
            choices.append(names[best[f]])
    return Readers(tuple(outer), tuple(inner), tuple(choices))


def read_rows(rows: Rows, readers: Readers, features: Sequence[np.ndarray]) -> np.ndarray:
    """Return the log-probability of each row's class by the reader of the fold that held it out, float64 [N], in nats."""
    log_p = np.empty(len(rows.classes))
    for f, predict in enumerate(readers.outer):
        test_rows = rows.folds.outer == f
        z = rows.classes[test_rows]
        log_p[test_rows] = predict(features[f][test_rows])[np.arange(len(z)), z]
    return log_p


def fit_site(
    rows: Rows,
    site: Sequence[ReducedFold],
    families: Sequence[str],
    condition: tuple[Sequence[ReducedFold], Mapping[str, Readers]] | None = None,
) -> dict[str, tuple[Readers, np.ndarray]]:
    """Fit the families to one site; return by family its readers and the log-probability of each row's class [N].

    Parameters
    ----------
    rows, families
        Classes and folds; names of registered families, each after its base family.
    site
        The site, reduced in each fold.
    condition
        Features that are read together with the site, and their readers by family, which are then among the choices.
    """
    features = [reduced.values for reduced in site]
    null = share_readers(rows)
    readers: dict[str, Readers] = {}
    results: dict[str, tuple[Readers, np.ndarray]] = {}
    if condition is not None:
        features = [np.hstack([g.values, x]) for g, x in zip(condition[0], features, strict=True)]
    for name in families:
        family = predictive_families[name]
        simpler = {NULL: null}
        if condition is not None:
            simpler["condition"] = _on_first(condition[1][name], [g.values.shape[1] for g in condition[0]])
        if family.base:
            simpler[family.base] = readers[family.base]
        base = readers[family.base] if family.base else null
        readers[name] = fit_readers(rows, features, family, simpler, base)
        results[name] = readers[name], read_rows(rows, readers[name], features)
    return results


def _on_first(readers: Readers, widths: Sequence[int]) -> Readers:
    """Return readers of the first columns of wider features."""

    def narrow(predict: Predictor, width: int) -> Predictor:
        return lambda features: predict(features[:, :width])

    outer = tuple(narrow(p, w) for p, w in zip(readers.outer, widths, strict=True))
    inner = tuple(tuple(narrow(p, w) for p in ps) for ps, w in zip(readers.inner, widths, strict=True))
    return Readers(outer, inner, readers.choices)


def with_bases(families: Sequence[str]) -> tuple[str, ...]:
    """Return families in an order in which each follows its base family, which is added where it is missing."""
    ordered: dict[str, None] = {}
    for name in families:
        chain = [name]
        while (base := predictive_families[chain[-1]].base) and base not in chain:
            chain.append(base)
        ordered.update(dict.fromkeys(reversed(chain)))
    return tuple(ordered)
