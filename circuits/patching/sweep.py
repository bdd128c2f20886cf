"""The loop of all patching sweeps: pairs of equal shape share a batch, and each patch is a row."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from activation_store.tracing.continuation import append_answers
from circuits.execution.memory import kept_bytes, row_bytes
from circuits.execution.patch_runner import PatchRunner
from circuits.execution.prefix_cache import Recording, See, Values, observe
from circuits.execution.suffix_runner import Row
from circuits.interventions.intervention import Intervention, Replace, columns_of
from circuits.patching.metrics import Metric
from concepts.counterfactual_pair import CounterfactualPair
from groundscope.core.progress import progress_bar
from lvlm.answer_keys import AnswerKey
from lvlm.finite_logits import check_finite
from lvlm.model import Batch, Encoding, Inputs, Lvlm
from lvlm.sites import Site

Mode = Literal["denoise", "noise"]
Part = tuple[Site, int | None]
"""A site, and one of its heads; None for all heads."""
Unit = tuple[Part, ...]
"""Parts that are patched jointly."""


@dataclass(frozen=True, eq=False)
class PairPlan:
    """Everything about a pair that is known before the runs."""

    pair: CounterfactualPair
    key: AnswerKey | None
    """Key of the first tokens of the two answers; None for metrics that need no key."""
    clean: Encoding
    corrupt: Encoding
    positions: tuple[tuple[int, ...], ...]
    """Sets of positions; the positions of a set are patched jointly."""
    answer: tuple[int, ...]
    """Tokens of the clean answer after the prompt; empty if the metric uses the first token only."""

    @property
    def start(self) -> int:
        """First patched position."""
        return min(min(at) for at in self.positions)

    @property
    def shape(self) -> tuple[object, ...]:
        """Key that must be equal for pairs to share a batch."""
        return (self.clean.shape, self.corrupt.shape, self.positions, len(self.answer))


@dataclass(frozen=True, eq=False)
class SweepResult:
    """Result of a sweep, for all pairs in their order."""

    effects: np.ndarray
    """float32 ``[n_pairs, n_units, n_positions]``; NaN for excluded pairs, and at the start for pairs with fewer positions
    than others: positions are aligned at the last."""
    clean: np.ndarray
    """The metric in the clean run, float32 ``[n_pairs]``."""
    corrupt: np.ndarray
    used: np.ndarray
    """bool ``[n_pairs]``."""
    shared: bool
    """Whether patches ran as suffixes of a shared prefix; else as full forward passes."""


Execute = Callable[[Sequence[Row], See | None], Tensor]
"""Runs rows, passes head outputs to the second argument, and returns the metric of each row, ``[P, rows]``."""


@dataclass(frozen=True, eq=False)
class Todo:
    """Runs and recordings of some pairs of equal shape."""

    positions: tuple[tuple[int, ...], ...]
    source: Values
    run: Values
    which: list[int] | None
    """Indices of examples in both recordings; None for all."""
    execute: Execute

    def value(self, values: Values, site: Site, at: tuple[int, ...], columns: slice = slice(None)) -> Tensor:
        """Return a site's value for the selected examples, ``[P, positions, columns]``."""
        value = values.at(site, at, columns)
        return value if self.which is None else value[self.which]


@dataclass(frozen=True)
class Work:
    """The work of a sweep on each group of pairs."""

    sites: tuple[Site, ...]
    """Sites to record in both runs."""
    count: int
    """Number of effects per set of positions."""
    rows: int
    """Largest number of rows per batch."""
    do: Callable[[Todo], Tensor]
    """Returns the metric of each change, ``[P, count x positions]``."""


@dataclass(frozen=True)
class Settings:
    """Settings of a sweep."""

    mode: Mode
    metric: Metric
    min_effect: float
    memory: int
    most: int | None
    progress: bool | None
    scale: float | None = None
    """Divisor of the change of the metric, the same for all pairs; None for the difference of each pair."""


def sweep(model: Lvlm, plans: Sequence[PairPlan], work: Work, settings: Settings) -> SweepResult:
    """Run `work` on every pair and return effects as shares of the difference between clean and corrupt metric."""
    most = max(len(plan.positions) for plan in plans)
    effects = np.full((len(plans), work.count, most), np.nan, np.float32)
    baseline = np.zeros((2, len(plans)), np.float32)  # clean, corrupt
    used = np.zeros(len(plans), bool)
    runner = PatchRunner(model, memory=settings.memory)
    with progress_bar(settings.progress) as bar:
        task = bar.add_task("patching", total=len(plans))
        for group in _groups(model, plans, work.rows, settings):
            members = [plans[i] for i in group]
            at = slice(most - len(members[0].positions), most)
            group_result = _group(model, members, work, settings, runner)
            effects[group, :, at], baseline[:, group], used[group] = group_result
            bar.advance(task, len(group))
    return SweepResult(effects, baseline[0], baseline[1], used, runner.shared)


def _group(
    model: Lvlm, members: Sequence[PairPlan], work: Work, settings: Settings, runner: PatchRunner
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return effects ``[P, count, positions]``, the two baselines ``[2, P]`` and which pairs are used."""
    keep, start = settings.metric.keep(len(members[0].answer)), members[0].start
    denoise = settings.mode == "denoise"
    inputs = {side: _inputs(model, members, side) for side in ("clean", "corrupt")}
    source_side, run_side = ("clean", "corrupt") if denoise else ("corrupt", "clean")
    source = observe(model, inputs[source_side], start, work.sites, keep)
    run = runner.record(inputs[run_side], start, work.sites, keep)
    if run is None:  # without a recording the attended positions are unknown: observe all positions
        run = observe(model, inputs[run_side], 0, work.sites, keep)
    clean, corrupt = (source, run) if denoise else (run, source)
    scores = [settings.metric.scores(x.logits[:, None], members, clean.logits)[:, 0] for x in (clean, corrupt)]
    names = [f"pair '{plan.pair.clean.id}', '{plan.pair.corrupt.id}'" for plan in members]
    check_finite(np.stack(scores, axis=1), names, model.name)
    gap = scores[0] - scores[1]
    same = (gap == 0) & _are_equal(source, run, work.sites)
    unit = gap if settings.scale is None else np.full_like(gap, settings.scale)
    used = (abs(gap) >= settings.min_effect) & ((unit != 0) | same)
    effects = np.full((len(members), work.count, len(members[0].positions)), np.nan, np.float32)
    effects[used & same] = 0  # equal values have no effect
    todo = np.flatnonzero(used & ~same)
    if len(todo):
        patched = _patched_metrics(model, members, work, source, run, todo.tolist(), settings, runner, clean.logits)
        check_finite(patched, [f"patched {names[k]}" for k in todo], model.name)
        unpatched = scores[1 if denoise else 0][todo][:, None, None]
        sign = 1 if denoise else -1
        effects[todo] = sign * (patched - unpatched) / unit[todo][:, None, None]
    return effects, np.stack(scores), used


def _patched_metrics(
    model: Lvlm,
    members: Sequence[PairPlan],
    work: Work,
    source: Values,
    run: Values,
    todo: list[int],
    settings: Settings,
    runner: PatchRunner,
    clean: Tensor,
) -> np.ndarray:
    """Return the metric of each change for the pairs `todo`, ``[len(todo), count, positions]``."""
    members_run = [members[k] for k in todo]
    which = None if len(todo) == len(members) else todo
    most = None if settings.most is None else max(1, settings.most // len(todo))

    def read(logits: Tensor) -> Tensor:
        return torch.from_numpy(settings.metric.scores(logits, members_run, clean[todo]))

    def inputs() -> Inputs:
        return _inputs(model, members_run, "corrupt" if settings.mode == "denoise" else "clean")

    def execute(rows: Sequence[Row], see: See | None) -> Tensor:
        recording = run if isinstance(run, Recording) else None
        keep = run.logits.shape[1]
        return runner.run(recording, inputs, rows, read, keep=keep, most=most, examples=which, see=see)

    metric = work.do(Todo(members[0].positions, source, run, which, execute))
    return metric.numpy().reshape(len(todo), work.count, -1)


def patches(model: Lvlm, units: Sequence[Unit], positions: int = 1) -> Work:
    """Return the work of patching each unit's source value into the run, at each set of positions."""
    sites = tuple(dict.fromkeys(site for unit in units for site, _ in unit))

    def do(todo: Todo) -> Tensor:
        return todo.execute(rows_of(model, units, todo.positions, todo.source, todo.which), None)

    return Work(sites, len(units), len(units) * positions, do)


def rows_of(
    model: Lvlm,
    units: Sequence[Unit],
    positions: Sequence[tuple[int, ...]],
    source: Values,
    which: Sequence[int] | None = None,
) -> list[Row]:
    """Return a row for every unit at every set of positions, with values of the source (for examples `which`)."""
    rows = []
    for unit in units:
        parts = [(site, head, columns_for(model, site, head)) for site, head in unit]
        for at in positions:
            items = []
            for site, head, columns in parts:
                value = source.at(site, at, columns)
                items.append(Intervention(site, Replace(value if which is None else value[list(which)]), at, head))
            rows.append(tuple(items))
    return rows


def columns_for(model: Lvlm, site: Site, head: int | None) -> slice:
    """Return the columns of a head in a site; all columns for None."""
    return columns_of(model, Intervention(site, Replace(torch.zeros(1)), "all", head))


def _are_equal(source: Values, run: Values, sites: Sequence[Site]) -> np.ndarray:
    """Return for which examples source and run have equal values at all sites, bool ``[P]``."""
    count = len(source.logits)
    alike = np.ones(count, bool)
    for site in sites:
        a, b = source.sites[site], run.sites[site]
        size = min(a.shape[1], b.shape[1])
        a, b = a[:, a.shape[1] - size :], b[:, b.shape[1] - size :]
        alike &= (a == b).flatten(1).all(1).cpu().numpy()
    return alike


def _inputs(model: Lvlm, members: Sequence[PairPlan], side: Literal["clean", "corrupt"] | str) -> Inputs:
    """Return the inputs of one side of some pairs, with the clean answer appended if the metric needs it."""
    encodings = [plan.clean if side == "clean" else plan.corrupt for plan in members]
    inputs = model.collate(encodings)
    if not members[0].answer:
        return inputs
    with_clean_answers = tuple(
        replace(e, example=replace(e.example, question=p.pair.clean.question, answer=p.pair.clean.answer))
        for e, p in zip(encodings, members, strict=True)
    )
    return append_answers(model, Batch(tuple(range(len(with_clean_answers))), with_clean_answers, inputs)).inputs


def _groups(model: Lvlm, plans: Sequence[PairPlan], rows: int, settings: Settings) -> Iterator[list[int]]:
    """Yield batches of pair indices, as large as memory allows for all patches of the pairs."""

    def size(first: int) -> int:
        plan = plans[first]
        length = plan.clean.tokens.length + len(plan.answer)
        each = max(rows * row_bytes(model, length - plan.start, length), kept_bytes(model, length - plan.start, length))
        most = settings.memory // each if settings.most is None else min(settings.memory // each, settings.most // rows)
        return max(1, most)

    yield from side_by_side([plan.shape for plan in plans], size)


def side_by_side(shapes: Sequence[Hashable], size: Callable[[int], int]) -> Iterator[list[int]]:
    """Yield batches of indices of equal shape; `size` returns the batch size, given the first index of a shape."""
    by_shape: dict[Hashable, list[int]] = {}
    for number, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(number)
    for members in by_shape.values():
        step = size(members[0])
        for k in range(0, len(members), step):
            yield members[k : k + step]
