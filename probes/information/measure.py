"""Measure the information of arrays about a label, in nats, site by site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from groundscope.core.errors import ProbeError
from groundscope.core.progress import progress_bar
from groundscope.core.text import format_count
from probes.information.changes import Draws, fall_candidates, summarize
from probes.information.cross_fitting import Rows, fit_site, read_rows, share_readers, with_bases
from probes.information.folds import make_folds
from probes.information.reduction import reduce_folds
from probes.information.results import InformationPath
from probes.information.width_control import pad_site

WIDTH = 64
"""Dimensions to which every site is reduced."""


def measure_information(
    sites: Mapping[str, np.ndarray],
    labels: Sequence[Any] | np.ndarray,
    groups: Sequence[Any] | np.ndarray,
    *,
    condition: np.ndarray | None = None,
    condition_name: str = "condition",
    families: Sequence[str] = ("linear", "nonlinear"),
    k: int = WIDTH,
    folds: int = 5,
    inner_folds: int = 3,
    control: bool = True,
    concept: str = "label",
    ids: Sequence[Any] | np.ndarray | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> InformationPath:
    """Measure how much information about a label each site offers to a reader, in nats, and where it falls or rises.

    V-information is ``H_V(Z) - H_V(Z | X)``: by how much the held-out log-loss of a family of readers decreases when it reads
    the site. Readers are cross-fitted, whole groups out; their penalty is chosen inside the training groups, with the reader
    that ignores the site among the choices. The pointwise form (PVI) of a row is ``log p[x](z) - log p[null](z)``.

    Parameters
    ----------
    sites
        By name, in the order of the path: float [N, D], the same rows; D may differ.
    labels
        [N]: class of each row (text, integers or booleans).
    groups
        [N]: image or scene of each row.
    condition
        Float [N, D]: what the null reads, such as the question alone; then information is conditional on it.
    condition_name
        Its name in the result.
    families
        Names of `probes.predictive_families`. The base of a family is measured too.
    k
        Dimensions of every site: its principal axes in the training rows, scaled by one number.
    folds, inner_folds
        Number of folds of groups, and of folds inside the training groups of each.
    control
        Whether falls are compared with the width control (`probes.information.width_control`).
    concept
        Name of the label.
    ids
        [N]: names of the rows; numbers by default.
    confidence
        Of intervals and of the words of changes.
    seed
        Of folds, draws and the noise of the width control.
    progress
        Whether to show progress; by default on a terminal only.

    Returns
    -------
    InformationPath
        Nats, intervals over groups, pointwise values, changes.

    Raises
    ------
    ProbeError
        Before any fit: for no site, lengths that differ, a row without a label, values that are not finite, one class only, or
        too few groups of a class for the folds.

    Notes
    -----
    Xu et al. 2020 (arXiv 2002.10689), Ethayarajh et al. 2022 (arXiv 2110.08420, pointwise). The data processing inequality
    does not hold: a later site may offer more, because it arranges information so that a simple reader can use it. A fall in
    one family means that the information is less available to that family; information that both families miss is called lost.

    Examples
    --------
    A code that no linear reader reads, the product of two signs:

    >>> import numpy as np
    >>> from probes import measure_information
    >>> rng = np.random.default_rng(0)
    >>> signs = rng.choice([-1, 1], size=(400, 2))
    >>> path = measure_information({"signs": signs + 0.2 * rng.normal(size=(400, 2))}, signs.prod(1), np.arange(400))
    >>> dict(zip(path.families, (path.nats[:, 0].round(1) + 0).tolist()))  # + 0: no -0.0
    {'linear': 0.0, 'nonlinear': 0.7}
    """
    if control not in (True, False) or k < 1 or not 0 < confidence < 1:
        msg = f"control={control}, k={k} and confidence={confidence}: give a boolean, 1 or more, and a number between 0 and 1"
        raise ProbeError(msg)
    names, classes = _classes(labels)
    of_group = np.asarray(groups).astype(str)
    arrays = _arrays(sites, len(classes), None if condition is None else (condition_name, condition))
    if len(of_group) != len(classes):
        msg = f"{format_count(len(of_group), 'group')} and {format_count(len(classes), 'label')}: give one group for each row"
        raise ProbeError(msg)
    of_id = np.arange(len(classes)).astype(str) if ids is None else np.asarray(ids).astype(str)
    if len(of_id) != len(classes):
        msg = f"{format_count(len(of_id), 'id')} and {format_count(len(classes), 'label')}: give one id for each row"
        raise ProbeError(msg)
    used = with_bases(families)
    if not used:
        msg = "families is empty; choose from linear, nonlinear, or register a family"
        raise ProbeError(msg)
    rows = Rows(classes, len(names), make_folds(classes, names, of_group, folds, inner_folds, seed))
    outer = rows.folds.outer
    draws = Draws(of_group, confidence, seed)

    with progress_bar(progress) as bar:
        task = bar.add_task("measuring information", total=len(sites) + (condition is not None) + 1)
        null = read_rows(rows, share_readers(rows), [classes[:, None]] * folds)
        base = np.tile(null, (len(used), 1))  # [M, N]
        conditioning = None
        if condition is not None:
            reduced = reduce_folds(arrays[condition_name], outer, k)
            fitted = fit_site(rows, reduced, used)
            base = np.stack([fitted[name][1] for name in used])
            conditioning = reduced, {name: fitted[name][0] for name in used}
            bar.advance(task)
        pvi, kept_variance = np.empty((len(used), len(sites), len(classes))), np.empty(len(sites))
        choices: dict[str, list[tuple[Any, ...]]] = {name: [] for name in used}
        for s, site in enumerate(sites):
            reduced = reduce_folds(arrays[site], outer, k)
            kept_variance[s] = np.mean([fold.kept_variance for fold in reduced])
            fitted = fit_site(rows, reduced, used, conditioning)
            for m, name in enumerate(used):
                pvi[m, s] = fitted[name][1] - base[m]
                choices[name].append(fitted[name][0].choices)
            bar.advance(task)
        differences = np.diff(pvi, axis=1)  # [M, S - 1, N]
        controls: dict[tuple[int, int], np.ndarray] = {}
        candidates = fall_candidates(differences, draws) if control and len(sites) > 1 else []
        order = list(sites)
        for j in sorted({j for _, j in candidates}):
            # Only falls need the control, so that the cost of a path is that of its sites.
            padded = pad_site(arrays[order[j]], arrays[order[j + 1]], of_group, k=k, seed=seed)
            fitted = fit_site(rows, reduce_folds(padded, outer, k), used, conditioning)
            for m in (m for m, at in candidates if at == j):
                controls[m, j] = pvi[m, j + 1] - (fitted[used[m]][1] - base[m])
        changes = summarize(order, used, differences, controls, draws) if len(sites) > 1 else ()
        mean, low, high, _ = (a.reshape(pvi.shape[:2]) for a in draws.measure(pvi.reshape(-1, len(classes)).T))
        bar.advance(task)
    shares = np.bincount(classes) / len(classes)
    return InformationPath(
        concept=concept,
        classes=names,
        sites=tuple(order),
        families=used,
        nats=mean,
        low=low,
        high=high,
        pvi=pvi,
        kept_variance=kept_variance,
        entropy=-math.fsum(share * math.log(share) for share in shares),
        null_entropy=-base.mean(axis=1),
        changes=changes,
        choices={name: tuple(of_family) for name, of_family in choices.items()},
        ids=of_id,
        groups=of_group,
        condition=condition_name if condition is not None else "",
        condition_nats=(base - null).mean(axis=1) if condition is not None else np.zeros(0),
        provenance={
            "k": k, "folds": folds, "inner_folds": inner_folds, "control": control, "confidence": confidence, "seed": seed,
        },
    )  # fmt: skip


def _classes(labels: Sequence[Any] | np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the classes, sorted, and the class of each row."""
    values = list(labels)
    missing = [i for i, value in enumerate(values) if value is None or value != value or value == ""]
    if missing:
        msg = (
            f"row {missing[0]} has no label ({len(missing)} of {format_count(len(values), 'row')}): leave out rows for which "
            "the concept is undefined"
        )
        raise ProbeError(msg)
    if not values:
        msg = "no rows; give at least two groups of each class"
        raise ProbeError(msg)
    numbers = [v for v in values if isinstance(v, float | np.floating) and not float(v).is_integer()]
    if numbers:
        msg = f"label {numbers[0]:g} is not a class: give text, integers or booleans; divide numbers into bins first"
        raise ProbeError(msg)
    plain = [int(v) if isinstance(v, float | np.floating | np.integer | np.bool_ | bool) else v for v in values]
    kinds = sorted(set(plain), key=lambda v: (isinstance(v, str), v))
    number = {value: i for i, value in enumerate(kinds)}
    return tuple(map(str, kinds)), np.array([number[v] for v in plain])


def _arrays(sites: Mapping[str, np.ndarray], n: int, condition: tuple[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Return the sites, and the condition, as float arrays [n, D] after a check."""
    if not sites:
        msg = "no site; give at least one array of features [N, D] by name"
        raise ProbeError(msg)
    if condition is not None and condition[0] in sites:
        msg = f"'{condition[0]}' names a site and the condition; choose another condition_name"
        raise ProbeError(msg)
    arrays = {}
    for name, values in [*sites.items(), *([condition] if condition is not None else [])]:
        x = np.asarray(values)
        if x.ndim != 2 or len(x) != n or not x.shape[1] or x.dtype.kind not in "fiub":
            msg = f"'{name}' has shape {list(x.shape)} of {x.dtype}: give numbers [N, D] for all {format_count(n, 'label')}"
            raise ProbeError(msg)
        invalid = np.flatnonzero(~np.isfinite(x).all(axis=1))
        if invalid.size:
            msg = f"'{name}': {format_count(invalid.size, 'row')} with values that are not finite, the first is row {invalid[0]}"
            raise ProbeError(msg)
        arrays[name] = x
    return arrays
