"""Falls and rises of information between consecutive sites of a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from groundscope.core.statistics import draws_interval, group_totals

DRAWS = 2000
"""Draws of whole groups; the smallest p is 2 / (DRAWS + 1), small enough for Holm over 50 sites."""
_CELLS = 1 << 22
LEAST_CHANGE = 0.01
"""Smaller changes have no words, in nats, however certain they are: paired differences of equal sites are very precise."""


@dataclass(frozen=True)
class FamilyChange:
    """The change that one family reads between two consecutive sites."""

    family: str
    nats: float
    """Mean of the paired differences, the later site minus the earlier; negative for a fall."""
    low: float
    high: float
    """Interval over groups."""
    p: float
    """Two-sided, of draws of whole groups; of a fall the larger of this and the p of the width control."""
    p_holm: float
    """The same, corrected for all pairs of sites (Holm 1979)."""
    control: float
    """The later site minus the earlier one padded by noise (`probes.information.width_control`); NaN unless the change is a
    fall with ``p <= 1 - confidence``, because only such a fall needs it."""
    control_low: float
    control_high: float

    @property
    def falls(self) -> bool:
        """Whether the change is a fall; see `SiteChange.words` for whether it is significant."""
        return self.nats < 0


@dataclass(frozen=True)
class SiteChange:
    """The changes between two consecutive sites, by family."""

    earlier: str
    later: str
    families: tuple[FamilyChange, ...]
    words: str
    """``lost`` if both the linear and the nonlinear family fall, ``less linearly available`` (or ``less available to the NAME
    family``) if one does, ``made available`` if a family rises, otherwise empty: no significant change, or
    one of less than `LEAST_CHANGE`."""

    def __getitem__(self, family: str) -> FamilyChange:
        return next(change for change in self.families if change.family == family)


@dataclass(frozen=True, eq=False)
class Draws:
    """Draws of whole groups, the same for all sites and families."""

    groups: np.ndarray
    """str [N]."""
    confidence: float
    seed: int

    def measure(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return means, low and high ends, and two-sided p of columns: ``[N, M]`` -> four times ``[M]``."""
        totals = group_totals(np.column_stack([values, np.ones(len(values))]), self.groups)  # [G, M + 1]
        n_groups = len(totals)
        rng = np.random.default_rng(self.seed)
        step = max(1, _CELLS // n_groups)
        draw_totals = []
        for start in range(0, DRAWS, step):
            counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=min(step, DRAWS - start))
            draw_totals.append(counts @ totals)
        sums = np.concatenate(draw_totals)
        draws = sums[:, :-1] / sums[:, -1:]
        mean = values.mean(axis=0)
        low, high = draws_interval(draws, mean, n_groups, self.confidence)
        below, above = (draws <= 0).sum(axis=0), (draws >= 0).sum(axis=0)
        p = np.minimum(1.0, 2 * (1 + np.minimum(below, above)) / (1 + DRAWS))
        return mean, low, high, p


def holm(p: np.ndarray) -> np.ndarray:
    """Return p-values [M] corrected for M tests: Holm 1979, Scandinavian Journal of Statistics 6:65."""
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty_like(corrected)
    result[order] = np.minimum(corrected, 1.0)
    return result


def describe(falls: Sequence[str], rises: Sequence[str]) -> str:
    """Return the words for the families with a significant fall, and those with a significant rise."""
    if {"linear", "nonlinear"} <= set(falls):
        return "lost"
    if "linear" in falls:
        return "less linearly available"
    if falls:
        return f"less available to the {falls[0]} family"
    return "made available" if rises else ""


def summarize(
    sites: Sequence[str],
    families: Sequence[str],
    differences: np.ndarray,
    controls: Mapping[tuple[int, int], np.ndarray],
    draws: Draws,
) -> tuple[SiteChange, ...]:
    """Return the changes between consecutive sites.

    Parameters
    ----------
    sites, families
        S and M names.
    differences
        Paired differences of rows [M, S - 1, N].
    controls
        By family and pair, the same with the padded earlier site [N].
    draws
        Draws of groups.
    """
    alpha = 1 - draws.confidence
    nats, low, high, p = (
        a.reshape(differences.shape[:2]) for a in draws.measure(differences.reshape(-1, differences.shape[-1]).T)
    )
    control = np.full((3, *nats.shape), np.nan)
    if controls:
        measured = draws.measure(np.stack(list(controls.values()), axis=1))
        for at, mean, lowest, highest, p_control in zip(controls, *measured, strict=True):
            control[(slice(None), *at)] = mean, lowest, highest
            p[at] = max(p[at], p_control if mean < 0 else 1.0)
    p_holm = np.stack([holm(of_family) for of_family in p])
    changes = []
    for j in range(len(sites) - 1):
        of_family = tuple(
            FamilyChange(name, *(float(a[m, j]) for a in (nats, low, high, p, p_holm, *control)))
            for m, name in enumerate(families)
        )
        significant = [c for c in of_family if c.p_holm <= alpha and abs(c.nats) >= LEAST_CHANGE]
        words = describe([c.family for c in significant if c.falls], [c.family for c in significant if not c.falls])
        changes.append(SiteChange(sites[j], sites[j + 1], of_family, words))
    return tuple(changes)


def fall_candidates(differences: np.ndarray, draws: Draws) -> list[tuple[int, int]]:
    """Return family and pair of the falls that need a width control: ``p <= 1 - confidence`` before any correction."""
    nats, _, _, p = draws.measure(differences.reshape(-1, differences.shape[-1]).T)
    candidates = (nats < 0) & (p <= 1 - draws.confidence)
    return [divmod(int(i), differences.shape[1]) for i in np.flatnonzero(candidates)]
