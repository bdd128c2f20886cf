"""Attribution patching: what a patch would do, estimated from one gradient instead of run.

Every head at every position costs two forwards and one backward pass in all. It is an estimate, exact only as far as
the model is linear between the two runs; `circuits.patch_heads` is exact. Sources: Nanda 2023, "Attribution patching";
Syed et al. 2023, arXiv 2310.10348; GradDrop: Kramár et al. 2024 (AtP*), arXiv 2403.00745; gradients along the way from
one run to the other: Hanna et al. 2024 (EAP-IG), arXiv 2403.17806.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from circuits.gradients import Slopes, slopes
from circuits.heads import HeadScores
from circuits.metrics import LEAST, logit_difference
from circuits.pairing import DIRECTIONS
from circuits.patching import head_scores_of, plans_of, settings_of
from circuits.progress import progress_bar
from circuits.recording import crosses
from circuits.sweep import Direction, Plan, side_by_side
from concepts.errors import ConfigError
from concepts.schema import CounterfactualPair
from lvlm.model import Inputs, Lvlm
from lvlm.sites import Site

Point = Literal["run", "source", "path"]
POINTS: tuple[Point, ...] = ("run", "source", "path")
TOKENS = ("last", "suffix", "image", "question", "object")
_METRIC = "logit_difference"


def heads(
    model: Lvlm,
    pairs: Sequence[CounterfactualPair],
    tokens: Literal["last", "suffix", "image", "question", "object"] = "last",
    direction: Direction = "denoise",
    *,
    point: Point = "run",
    steps: int = 5,
    drop: bool = False,
    min_effect: float = LEAST[_METRIC],
    batch_pairs: int = 16,
    progress: bool | None = None,
) -> HeadScores:
    """Estimate what patching each head would do to the answer: ``(z_source - z_run) . dLD/dz``, summed over positions.

    Effects are shares of ``LD_clean - LD_corrupt`` with the signs of `patch_heads`, so that both can be compared.

    Parameters
    ----------
    model
        In evaluation mode, with an attention that can be differentiated.
    pairs
        As for `patch_heads`.
    tokens
        Where a head would be patched, at all of these at once: ``last``, ``suffix``, ``question``, ``object`` or ``image``.
    direction
        ``denoise``: the corrupt run would be patched with the clean one's values; ``noise``: the other way round.
    point
        Where the gradient is taken: ``run``, in the run that would be patched (with ``denoise`` TransformerLens' choice,
        with ``noise`` that of the papers); ``source``, in the other; ``path``, the mean over `steps` points on the straight
        way between the embeddings of both, ``run + k / steps (source - run)`` for k = 1 ... steps.
    steps
        Points on the way, for ``path``.
    drop
        GradDrop: the mean over layers of the absolute estimate with that layer's own gradient left out, divided by one
        less than their number. Effects are then sizes, never negative. One backward pass a layer.
    min_effect
        As for `patch_heads`, in logits.
    batch_pairs
        Pairs side by side.
    progress
        Show progress; by default where standard error is a terminal.

    Returns
    -------
    HeadScores
        Estimated effects ``[n_pairs, n_layers, n_heads]``; `provenance` says that they are estimates.

    Raises
    ------
    ConfigError
        For an option that does not exist.
    PatchError
        As `patch_heads`.
    ModelError
        Where no gradient can be had.
    """
    _check(tokens, direction, point, steps, batch_pairs)
    settings = settings_of(model, direction, _METRIC, 1, None, min_effect, progress)
    plans = plans_of(model, pairs, tokens, settings)
    sites = [Site("decoder", i, "z", cross=crosses(model, i)) for i in range(model.n_layers)]
    effects = np.full((len(plans), model.n_layers, model.n_heads), np.nan, np.float32)
    baseline = np.zeros((2, len(plans)), np.float32)  # clean, corrupt
    with progress_bar(progress) as bar:
        task = bar.add_task("attribution patching", total=len(plans))
        for group in side_by_side([plan.shape for plan in plans], lambda _: batch_pairs):
            members = [plans[i] for i in group]
            estimate, baseline[:, group] = _estimates(model, members, sites, direction, point, steps, drop)
            gap = baseline[0, group] - baseline[1, group]
            sign = 1 if direction == "denoise" or drop else -1
            with np.errstate(divide="ignore", invalid="ignore"):
                share = sign * estimate / (np.abs(gap) if drop else gap)[:, None, None]
            effects[group] = share
            bar.advance(task, len(group))
    kept = np.abs(baseline[0] - baseline[1]) >= max(min_effect, np.finfo(np.float32).tiny)
    about = {"method": "attribution patching", "point": point, "drop": drop}
    about |= {"steps": steps} if point == "path" else {}
    return head_scores_of(model, plans, effects, baseline, kept, tokens, settings, about)


def _estimates(
    model: Lvlm,
    members: Sequence[Plan],
    sites: Sequence[Site],
    direction: Direction,
    point: Point,
    steps: int,
    drop: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Return estimated changes of the metric ``[P, layers, heads]`` and both runs' metrics ``[2, P]``."""
    inputs = {side: model.collate([getattr(plan, side) for plan in members]) for side in ("clean", "corrupt")}
    source_side, run_side = ("clean", "corrupt") if direction == "denoise" else ("corrupt", "clean")

    def metric(logits: Tensor) -> Tensor:
        rows = zip(logits, members, strict=True)
        return torch.stack([_difference(row, plan) for row, plan in rows])

    def slope(side: str, embeddings: Tensor | None = None, *, dropping: bool = False) -> Slopes:
        given: Inputs = inputs[side]
        return slopes(model, given, sites, metric, embeddings=embeddings, drop=dropping)

    source, run = (
        slope(source_side, dropping=drop and point == "source"),
        slope(run_side, dropping=drop and point == "run"),
    )
    at: list[Slopes]
    if point == "path":
        way = source.embeddings - run.embeddings
        at = [slope(run_side, run.embeddings + k / steps * way, dropping=drop) for k in range(1, steps + 1)]
    else:
        at = [source if point == "source" else run]
    positions = list(members[0].positions[0])
    found = []
    for site in sites:
        moved = (source.values[site] - run.values[site])[:, positions]  # [P, S, H * head_dim]
        gradient = torch.stack([one.gradients[site] for one in at]).mean(0)[:, :, positions]  # [K, P, S, H * head_dim]
        each = (moved * gradient).unflatten(-1, (model.n_heads, -1)).sum((-3, -1))  # [K, P, H]
        found.append(each.abs().sum(0) / (model.n_layers - 1) if drop else each[0])
    scores = {source_side: source.metric, run_side: run.metric}
    baseline = torch.stack([scores["clean"], scores["corrupt"]])
    return torch.stack(found, dim=1).double().cpu().numpy(), baseline.double().cpu().numpy()


def _difference(logits: Tensor, plan: Plan) -> Tensor:
    key = plan.key
    if key is None:  # plans of this metric always have one
        msg = f"pair '{plan.pair.clean.id}' has no answer key"
        raise ConfigError(msg)
    return logit_difference(logits, key, plan.pair.clean.answer, plan.pair.corrupt.answer)


def _check(tokens: str, direction: str, point: str, steps: int, batch_pairs: int) -> None:
    for name, value, allowed in (
        ("tokens", tokens, TOKENS),
        ("direction", direction, DIRECTIONS),
        ("point", point, POINTS),
    ):
        if value not in allowed:
            msg = f"{name}='{value}': choose {', '.join(allowed)}"
            raise ConfigError(msg)
    if steps < 1 or batch_pairs < 1:
        msg = f"steps={steps} and batch_pairs={batch_pairs} must be at least 1"
        raise ConfigError(msg)
