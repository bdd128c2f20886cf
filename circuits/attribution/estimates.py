"""Estimates of patch effects from gradients: the loop over pairs that all kinds of estimates share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from circuits.attribution.gradients import Metric, Slopes, check_differentiable, slopes
from circuits.patching.metrics import Metric as PatchMetric
from circuits.patching.pairs import MODES
from circuits.patching.sweep import Mode, PairPlan, Settings, SweepResult, Unit, side_by_side
from groundscope.core.errors import ConfigError
from groundscope.core.progress import progress_bar
from lvlm.model import Inputs, Lvlm
from lvlm.sites import Site

Point = Literal["run", "source", "path"]
POINTS: tuple[Point, ...] = ("run", "source", "path")
Variant = Literal["paper", "release"]
VARIANTS: tuple[Variant, ...] = ("paper", "release")


@dataclass(frozen=True)
class GradientSettings:
    """Mode of the patch, and where gradients are computed."""

    mode: Mode
    point: Point
    steps: int
    drop: bool = False
    variant: Variant = "paper"
    """Points on the path: k / steps for k = 1 ... steps (Hanna et al.'s equation), or k = 0 ... steps - 1 (their code)."""

    @property
    def about(self) -> dict[str, Any]:
        """Provenance for results, JSON-serializable."""
        about: dict[str, Any] = {"method": "attribution patching", "point": self.point, "drop": self.drop}
        return about | ({"steps": self.steps, "variant": self.variant} if self.point == "path" else {})

    @property
    def text(self) -> str:
        """The provenance as a sentence."""
        at = f"{self.steps} points on the path" if self.point == "path" else f"the {self.point}"
        return f"estimated from gradients at {at}{', each layer dropped' if self.drop else ''}"

    @property
    def shares(self) -> tuple[float, ...]:
        """Points of the gradients on the path from the run (0) to the source (1)."""
        if self.point != "path":
            return (0.0,) if self.point == "run" else (1.0,)
        first = 0 if self.variant == "release" else 1
        return tuple((k + first) / self.steps for k in range(self.steps))


@dataclass(frozen=True, eq=False)
class Sides:
    """A batch of pairs of equal shape, ready to run."""

    members: Sequence[PairPlan]
    source: Inputs
    run: Inputs
    measure: PatchMetric

    def metric(self, logits: Tensor) -> Tensor:
        """Return the metric of each pair's run, ``[P, V]`` -> ``[P]``."""
        rows = zip(logits, self.members, strict=True)
        return torch.stack([self.measure.of_last(row, plan) for row, plan in rows])


EstimateBatch = Callable[[Sides], tuple[np.ndarray, Tensor, Tensor]]
"""Return estimated changes of the metric ``[P, ...]``, and the metric in the source and in the run, ``[P]`` each."""


def groups(
    model: Lvlm,
    plans: Sequence[PairPlan],
    how: GradientSettings,
    settings: Settings,
    batch_size: int,
    estimate_batch: EstimateBatch,
    name: str,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield indices of pairs, their estimates as shares of ``M_clean - M_corrupt``, and both metrics ``[2, P]``."""
    denoise = how.mode == "denoise"
    with progress_bar(settings.progress) as bar:
        task = bar.add_task(name, total=len(plans))
        for group in side_by_side([plan.shape for plan in plans], lambda _: batch_size):
            members = [plans[i] for i in group]
            clean, corrupt = (model.collate([getattr(plan, side) for plan in members]) for side in ("clean", "corrupt"))
            changes, *ends = estimate_batch(
                Sides(members, *((clean, corrupt) if denoise else (corrupt, clean)), settings.metric)
            )
            baseline = torch.stack(ends if denoise else ends[::-1]).double().cpu().numpy()
            gap = baseline[0] - baseline[1]
            sign = 1 if denoise or how.drop else -1
            by = (np.abs(gap) if how.drop else gap).reshape(-1, *(1,) * (changes.ndim - 1))
            with np.errstate(divide="ignore", invalid="ignore"):
                share = sign * changes / by
            yield group, share, baseline
            bar.advance(task, len(group))


def usable(clean: np.ndarray, corrupt: np.ndarray, min_effect: float) -> np.ndarray:
    """Return which pairs have a metric difference large enough to divide by, bool ``[n_pairs]``."""
    return np.abs(clean - corrupt) >= max(min_effect, np.finfo(np.float32).tiny)


def estimate(
    model: Lvlm,
    plans: Sequence[PairPlan],
    units: Sequence[Unit],
    how: GradientSettings,
    settings: Settings,
    batch_size: int,
) -> SweepResult:
    """Estimate the effect of patching each unit at each set of positions, in the form that a sweep returns."""
    most = max(len(plan.positions) for plan in plans)
    effects = np.full((len(plans), len(units), most), np.nan, np.float32)
    baseline = np.zeros((2, len(plans)), np.float32)  # clean, corrupt

    def estimate_batch(sides: Sides) -> tuple[np.ndarray, Tensor, Tensor]:
        return _estimates(model, sides, units, how)

    for group, share, metrics in groups(
        model, plans, how, settings, batch_size, estimate_batch, "attribution patching"
    ):
        effects[group, :, most - share.shape[2] :] = share
        baseline[:, group] = metrics
    used = usable(baseline[0], baseline[1], settings.min_effect)
    return SweepResult(effects, baseline[0], baseline[1], used, shared=False)


def check_gradient_settings(model: Lvlm, how: GradientSettings, batch_size: int) -> None:
    """Raise `ConfigError` for an unknown option value, `ModelError` for an attention without derivatives."""
    for name, value, allowed in (
        ("mode", how.mode, MODES),
        ("point", how.point, POINTS),
        ("variant", how.variant, VARIANTS),
    ):
        if value not in allowed:
            msg = f"unknown {name} '{value}'; choose from {', '.join(allowed)}"
            raise ConfigError(msg)
    if how.steps < 1 or batch_size < 1:
        msg = f"steps={how.steps} and batch_size={batch_size} must be at least 1"
        raise ConfigError(msg)
    check_differentiable(model)


def _estimates(
    model: Lvlm, sides: Sides, units: Sequence[Unit], how: GradientSettings
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return estimated changes of the metric ``[P, units, sets of positions]`` and both runs' metrics ``[P]``."""
    sites = list(dict.fromkeys(site for unit in units for site, _ in unit))
    source, run, at = slopes_along(model, sides, sites, how)
    positions = [list(p) for p in sides.members[0].positions]
    split = {site for unit in units for site, head in unit if head is not None}
    moved: dict[Site, Tensor] = {}  # [K, P, sets of positions, heads or 1]
    for site in sites:
        gradient = torch.stack([point.gradients[site] for point in at]).mean(0)  # [K, P, T, d]
        each = (source.values[site] - run.values[site]) * gradient
        by_head = each.unflatten(-1, (model.n_heads if site in split else 1, -1)).sum(-1)  # [K, P, T, heads or 1]
        moved[site] = torch.stack([by_head[:, :, p].sum(2) for p in positions], dim=2)
    changes = torch.stack([sum_of([moved[site][..., head or 0] for site, head in unit]) for unit in units], dim=2)
    effects = changes.abs().sum(0) / (model.n_layers - 1) if how.drop else changes[0]
    return effects.double().cpu().numpy(), source.metric, run.metric


def slopes_along(
    model: Lvlm, sides: Sides, sites: Sequence[Site], how: GradientSettings
) -> tuple[Slopes, Slopes, list[Slopes]]:
    """Return the source, the run, and the gradients at every point of the path."""
    metric: Metric = sides.metric
    ends = [
        slopes(model, side, sites, metric, drop=how.drop and how.point == name, differentiate=how.point == name)
        for name, side in (("source", sides.source), ("run", sides.run))
    ]
    source, run = ends
    if how.point != "path":
        return source, run, [source if how.point == "source" else run]
    way = source.embeddings - run.embeddings
    at = [
        slopes(model, sides.run, sites, metric, embeddings=run.embeddings + share * way, drop=how.drop)
        for share in how.shares
    ]
    return source, run, at


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return torch.stack(list(parts)).sum(0)
