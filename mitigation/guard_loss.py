"""The losses that guards measure between the model without correction and with one: values, errors and intervals."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from behavior.comparison import change_estimate
from groundscope.core.statistics import Estimate, cluster_bootstrap, estimate, group_totals, ratio
from mitigation.guard import Guard, guards
from mitigation.model_outputs import ModelOutputs


@dataclass(frozen=True)
class GuardResult:
    """A guard before and after a correction, with 95 % intervals clustered by image.

    Examples
    --------
    >>> from groundscope.core.statistics import Estimate
    >>> from mitigation.guard_loss import GuardResult
    >>> rate = Estimate(0.9, 0.8, 1.0, 40)
    >>> GuardResult(rate, rate, Estimate(0.0, 0.0, 0.0, 40)).loss.value
    0.0
    """

    before: Estimate
    after: Estimate
    loss: Estimate
    """Paired: both conditions answer the same questions."""


def losses(before: ModelOutputs, after: ModelOutputs, names: Sequence[str] | None = None) -> dict[str, float]:
    """Return the loss of each guard that the data have, without intervals.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import groundscope as gs
    >>> from mitigation.guard_loss import losses
    >>> from mitigation.model_outputs import ModelOutputs
    >>> data = gs.ConceptDataset("questions", gs.scenes.dataset(10, splits=["neutral"])[:8])
    >>> answers = gs.answer(gs.load_lvlm("tiny"), data, progress=False)
    >>> denied = replace(answers, answers=tuple(replace(a, given="no") for a in answers.answers))
    >>> losses(ModelOutputs(data, answers), ModelOutputs(data, denied), ["recall"])
    {'recall': 1.0}
    """
    result: dict[str, float] = {}
    for name, guard in guards.usable().items():
        if names is None or name in names:
            first, second = guard.rows(before, before), guard.rows(after, before)
            if first is not None and second is not None:
                values = [
                    table[:, 0].sum() / table[:, 1].sum() if table[:, 1].sum() else np.nan
                    for table, _ in (first, second)
                ]
                result[name] = guard.loss(*values)
    return result


def loss_errors(before: ModelOutputs, after: ModelOutputs, names: Sequence[str] | None = None) -> dict[str, float]:
    """Return the standard error of the loss of each guard that the data have: paired, and clustered by image.

    By the delta method: a ratio ``r = sum a / sum b`` depends on row i by ``(a_i - r b_i) / sum b``; the contributions of the
    rows of an image are added (Cochran 1977, Sampling Techniques, ch. 6).

    Examples
    --------
    >>> from dataclasses import replace
    >>> import groundscope as gs
    >>> from mitigation.guard_loss import loss_errors
    >>> from mitigation.model_outputs import ModelOutputs
    >>> data = gs.ConceptDataset("questions", gs.scenes.dataset(10, splits=["neutral"])[:24])
    >>> answers = gs.answer(gs.load_lvlm("tiny"), data, progress=False)
    >>> loss_errors(ModelOutputs(data, answers), ModelOutputs(data, answers), ["neutral"])
    {'neutral': 0.0}
    """
    result: dict[str, float] = {}
    for name, guard in guards.usable().items():
        if names is None or name in names:
            first, second = guard.rows(before, before), guard.rows(after, before)
            if first is not None and second is not None:
                (table, groups), (other, _) = first, second
                result[name] = _loss_error(guard, table, other, groups)
    return result


def _loss_error(guard: Guard, table: np.ndarray, other: np.ndarray, groups: Sequence[Hashable]) -> float:
    """Return the standard error of a loss; NaN where a ratio is not defined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        (a, b), (c, d) = table.T, other.T
        change = (c - c.sum() / d.sum() * d) / d.sum() - (a - a.sum() / b.sum() * b) / b.sum()
        if guard.worse == "another length":
            change = change / (a.sum() / b.sum())
    totals = group_totals(change[:, None], groups)[:, 0]
    n = len(totals)
    return float(np.sqrt(n / (n - 1) * (totals**2).sum())) if n > 1 else float("inf")


def excess(values: Mapping[str, float], limits: Mapping[str, float | None]) -> float:
    """Return the largest loss in units of its limit; at most 1 if every guard holds, and at most 0 without any loss.

    A measure that a correction makes undefined (nothing is named any more) exceeds its limit.

    Examples
    --------
    >>> from mitigation.guard_loss import excess
    >>> excess({"recall": 0.003, "chair": 0.02}, {"recall": 0.015, "chair": 0.01})
    2.0
    """
    worst = 0.0
    for name, loss in values.items():
        limit = limits.get(name)
        if limit is not None:
            share = np.inf if np.isnan(loss) else loss / limit if limit else (np.inf if loss > 0 else 0.0)
            worst = max(worst, float(share))
    return worst


def measure_guards(before: ModelOutputs, after: ModelOutputs) -> dict[str, GuardResult]:
    """Return each guard that the data have, before and after a correction, with its loss and 95 % intervals over images.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.guard_loss import measure_guards
    >>> from mitigation.model_outputs import ModelOutputs
    >>> data = gs.ConceptDataset("questions", gs.scenes.dataset(20, splits=["neutral"]))
    >>> outputs = ModelOutputs(data, gs.answer(gs.load_lvlm("tiny"), data, progress=False))
    >>> measure_guards(outputs, outputs)["neutral"].loss.value
    0.0
    """
    results: dict[str, GuardResult] = {}
    for name, guard in guards.usable().items():
        first, second = guard.rows(before, before), guard.rows(after, before)
        if first is None or second is None:
            continue
        (table, groups), (other, _) = first, second
        results[name] = GuardResult(
            _rate(table, groups),
            _rate(other, groups),
            _paired(guard, table, other, groups),
        )
    return results


def _rate(table: np.ndarray, groups: Sequence[Hashable]) -> Estimate:
    """Return a ratio with its interval: the one for rates, which is valid near 0 and 1, where it is a rate."""
    if bool(((table[:, 0] >= 0) & (table[:, 0] <= table[:, 1])).all()):
        return estimate(table[:, 0], list(groups), table[:, 1])
    return _bootstrapped(table, groups, ratio)


def _paired(guard: Guard, table: np.ndarray, other: np.ndarray, groups: Sequence[Hashable]) -> Estimate:
    """Return the loss with a paired interval: the one for changes of answers where every row is one answer."""
    sign = {"lower": -1, "higher": 1}.get(guard.worse)
    both = np.concatenate([table, other])
    if sign is not None and bool((both[:, 1] == 1).all()) and bool(np.isin(both[:, 0], (0, 1)).all()):
        return change_estimate((sign * (other[:, 0] - table[:, 0])).astype(int), groups)

    def lost(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return guard.losses(ratio(totals[:, :2], counts), ratio(totals[:, 2:], counts))

    return _bootstrapped(np.column_stack([table, other]), groups, lost)


def _bootstrapped(table: np.ndarray, groups: Sequence[Hashable], statistic: Callable[..., np.ndarray]) -> Estimate:
    value = statistic(table.sum(axis=0)[None], np.array([float(len(table))]))[0]
    low, high = cluster_bootstrap(table, groups, statistic)
    return Estimate(float(value), low, high, int(table[:, 1].sum()))


def not_measured(outputs: ModelOutputs) -> dict[str, str]:
    """Return the guards that some outputs cannot measure, with what the data would need.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.guard_loss import not_measured
    >>> from mitigation.model_outputs import ModelOutputs
    >>> data = gs.ConceptDataset("questions", gs.scenes.dataset(10, splits=["neutral"])[:4])
    >>> not_measured(ModelOutputs(data, gs.answer(gs.load_lvlm("tiny"), data, progress=False)))["typical"]
    "not measured: it needs questions of split 'typical'"
    """
    return {
        name: f"not measured: it needs {guard.needs}"
        for name, guard in guards.usable().items()
        if guard.rows(outputs, outputs) is None
    }
