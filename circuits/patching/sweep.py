"""The loop that every patching sweep shares: pairs of equal shape run together, each patch a row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from activation_store.tracing.continuation import with_answers
from circuits.execution.full_runner import run_whole, say_plain
from circuits.execution.memory import kept_bytes, row_bytes
from circuits.execution.prefix_attention import NotShared
from circuits.execution.prefix_cache import Recording, See, Values, observe, record
from circuits.execution.suffix_runner import Row, resume
from circuits.interventions.intervention import Intervention, Replace, columns_of
from circuits.patching.metrics import Metric
from concepts.schema import CounterfactualPair
from groundscope.core.progress import progress_bar
from lvlm.answers import AnswerKey
from lvlm.finite import check_finite
from lvlm.model import Batch, Encoding, Inputs, Lvlm
from lvlm.sites import Site

Direction = Literal["denoise", "noise"]
Part = tuple[Site, int | None]
"""A site, and one head of it or all."""
Unit = tuple[Part, ...]
"""What is patched at once."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What is known of a pair before anything runs."""

    pair: CounterfactualPair
    key: AnswerKey | None
    """Tells the two answers apart at their first tokens; None for metrics that need no such key."""
    clean: Encoding
    corrupt: Encoding
    positions: tuple[tuple[int, ...], ...]
    """Each is patched at once."""
    answer: tuple[int, ...]
    """Tokens of the clean answer that follow the prompt; empty where only the first is read."""

    @property
    def start(self) -> int:
        """First position that is ever patched."""
        return min(min(at) for at in self.positions)

    @property
    def shape(self) -> tuple[object, ...]:
        """What pairs must have in common to run side by side."""
        return (self.clean.shape, self.corrupt.shape, self.positions, len(self.answer))


@dataclass(frozen=True, eq=False)
class Swept:
    """What came out, for all pairs in their order."""

    effects: np.ndarray
    """float32 ``[n_pairs, n_units, n_positions]``; NaN for pairs left out, and before the first position of a pair that has
    fewer than others: positions are aligned at the last."""
    clean: np.ndarray
    """The metric in the clean run, float32 ``[n_pairs]``."""
    corrupt: np.ndarray
    kept: np.ndarray
    """bool ``[n_pairs]``."""
    shared: bool
    """Whether patches ran as suffixes of a shared prefix; else as whole forwards."""


Execute = Callable[[Sequence[Row], See | None], Tensor]
"""Runs rows, shows what layers hold to the second argument, and returns the metric after each, ``[P, rows]``."""


@dataclass(frozen=True, eq=False)
class Todo:
    """What has to be run for some pairs of equal shape."""

    positions: tuple[tuple[int, ...], ...]
    source: Values
    run: Values
    which: list[int] | None
    """Which examples of the two are meant; None for all."""
    execute: Execute

    def value(self, held: Values, site: Site, at: tuple[int, ...], columns: slice = slice(None)) -> Tensor:
        """Return what a site held for the examples that are meant, ``[P, positions, columns]``."""
        value = held.at(site, at, columns)
        return value if self.which is None else value[self.which]


@dataclass(frozen=True)
class Work:
    """What a sweep does with each group of pairs."""

    sites: tuple[Site, ...]
    """What it has to know of both runs."""
    count: int
    """How many effects it finds at each set of positions."""
    rows: int
    """How many rows run side by side at the most."""
    do: Callable[[Todo], Tensor]
    """Returns the metric after each change, ``[P, count x positions]``."""


@dataclass(frozen=True)
class Settings:
    """How a sweep runs."""

    direction: Direction
    metric: Metric
    min_effect: float
    memory: int
    most: int | None
    progress: bool | None


class _Way:
    """Which way patches run; once one cannot share its prefix, all after it run whole."""

    def __init__(self, model: Lvlm) -> None:
        self._model = model
        self.shared = True
        self.checked = False

    def give_up(self, why: object) -> None:
        if self.shared:
            say_plain(self._model, str(why))
        self.shared = False


def sweep(model: Lvlm, plans: Sequence[Plan], work: Work, settings: Settings) -> Swept:
    """Do a piece of work for every pair, and return what it does to the metric as shares of clean against corrupt."""
    most = max(len(plan.positions) for plan in plans)
    effects = np.full((len(plans), work.count, most), np.nan, np.float32)
    baseline = np.zeros((2, len(plans)), np.float32)  # clean, corrupt
    kept = np.zeros(len(plans), bool)
    way = _Way(model)
    with progress_bar(settings.progress) as bar:
        task = bar.add_task("patching", total=len(plans))
        for group in _groups(model, plans, work.rows, settings):
            members = [plans[i] for i in group]
            at = slice(most - len(members[0].positions), most)
            found = _group(model, members, work, settings, way)
            effects[group, :, at], baseline[:, group], kept[group] = found
            bar.advance(task, len(group))
    return Swept(effects, baseline[0], baseline[1], kept, way.shared)


def _group(
    model: Lvlm, members: Sequence[Plan], work: Work, settings: Settings, way: _Way
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return effects ``[P, count, positions]``, the two baselines ``[2, P]`` and which pairs are kept."""
    keep, start = settings.metric.keep(len(members[0].answer)), members[0].start
    denoise = settings.direction == "denoise"
    given = {side: _inputs(model, members, side) for side in ("clean", "corrupt")}
    source_side, run_side = ("clean", "corrupt") if denoise else ("corrupt", "clean")
    source = observe(model, given[source_side], start, work.sites, keep)
    run = _recorded(model, given[run_side], start, work.sites, keep, way)
    clean, corrupt = (source, run) if denoise else (run, source)
    scores = [settings.metric.scores(x.logits[:, None], members, clean.logits)[:, 0] for x in (clean, corrupt)]
    names = [f"pair '{plan.pair.clean.id}', '{plan.pair.corrupt.id}'" for plan in members]
    check_finite(np.stack(scores, axis=1), names, model.name)
    gap = scores[0] - scores[1]
    same = (gap == 0) & _same(source, run, work.sites)
    kept = (abs(gap) >= settings.min_effect) & ((gap != 0) | same)
    effects = np.full((len(members), work.count, len(members[0].positions)), np.nan, np.float32)
    effects[kept & same] = 0  # what is the same changes nothing
    todo = np.flatnonzero(kept & ~same)
    if len(todo):
        patched = _done(model, members, work, source, run, todo.tolist(), settings, way, clean.logits)
        check_finite(patched, [f"patched {names[k]}" for k in todo], model.name)
        unpatched = scores[1 if denoise else 0][todo][:, None, None]
        sign = 1 if denoise else -1
        effects[todo] = sign * (patched - unpatched) / gap[todo][:, None, None]
    return effects, np.stack(scores), kept


def _done(
    model: Lvlm,
    members: Sequence[Plan],
    work: Work,
    source: Values,
    run: Values,
    todo: list[int],
    settings: Settings,
    way: _Way,
    clean: Tensor,
) -> np.ndarray:
    """Return the metric after each change, ``[P kept, count, positions]``."""
    chosen = [members[k] for k in todo]
    which = None if len(todo) == len(members) else todo
    most = None if settings.most is None else max(1, settings.most // len(todo))

    def read(logits: Tensor) -> Tensor:
        return torch.from_numpy(settings.metric.scores(logits, chosen, clean[todo]))

    def shared(rows: Sequence[Row], see: See | None) -> Tensor:
        if not isinstance(run, Recording):
            msg = "it was run whole"
            raise NotShared(msg)
        check = not way.checked
        found = resume(model, run, rows, read, memory=settings.memory, most=most, examples=which, check=check, see=see)
        way.checked = True
        return found

    def whole(rows: Sequence[Row], see: See | None) -> Tensor:
        side = "corrupt" if settings.direction == "denoise" else "clean"
        inputs, keep = _inputs(model, chosen, side), run.logits.shape[1]
        return run_whole(model, inputs, rows, read, keep=keep, memory=settings.memory, most=most, see=see)

    found: Tensor | None = None
    if way.shared:
        try:
            found = work.do(Todo(members[0].positions, source, run, which, shared))
        except NotShared as why:
            way.give_up(why)
    if found is None:
        found = work.do(Todo(members[0].positions, source, run, which, whole))
    return found.numpy().reshape(len(todo), work.count, -1)


def patches(model: Lvlm, units: Sequence[Unit], positions: int = 1) -> Work:
    """Return the work of putting each unit's value of the source into the run, at each of so many sets of positions."""
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
    """Return a row for every unit at every set of positions, its values those of the source (of some of its examples)."""
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
    """Return which columns of a site belong to a head."""
    return columns_of(model, Intervention(site, Replace(torch.zeros(1)), "all", head))


def _recorded(model: Lvlm, inputs: Inputs, start: int, sites: Sequence[Site], keep: int, way: _Way) -> Values:
    if way.shared:
        try:
            return record(model, inputs, start, sites, keep)
        except NotShared as why:
            way.give_up(why)
    # Which positions read which is not known here: all are kept.
    return observe(model, inputs, 0, sites, keep)


def _same(source: Values, run: Values, sites: Sequence[Site]) -> np.ndarray:
    """Return for which examples every patch would put what is there already."""
    count = len(source.logits)
    alike = np.ones(count, bool)
    for site in sites:
        a, b = source.sites[site], run.sites[site]
        size = min(a.shape[1], b.shape[1])
        a, b = a[:, a.shape[1] - size :], b[:, b.shape[1] - size :]
        alike &= (a == b).flatten(1).all(1).cpu().numpy()
    return alike


def _inputs(model: Lvlm, members: Sequence[Plan], side: Literal["clean", "corrupt"] | str) -> Inputs:
    """Return one side of some pairs as inputs, the clean answer's tokens behind the prompt where the metric reads them."""
    encodings = [plan.clean if side == "clean" else plan.corrupt for plan in members]
    inputs = model.collate(encodings)
    if not members[0].answer:
        return inputs
    told = tuple(
        replace(e, example=replace(e.example, question=p.pair.clean.question, answer=p.pair.clean.answer))
        for e, p in zip(encodings, members, strict=True)
    )
    return with_answers(model, Batch(tuple(range(len(told))), told, inputs)).inputs


def _groups(model: Lvlm, plans: Sequence[Plan], rows: int, settings: Settings) -> Iterator[list[int]]:
    """Yield numbers of pairs that run side by side: as many as there is room for with all their patches."""

    def size(first: int) -> int:
        plan = plans[first]
        length = plan.clean.tokens.length + len(plan.answer)
        each = max(rows * row_bytes(model, length - plan.start, length), kept_bytes(model, length - plan.start, length))
        most = settings.memory // each if settings.most is None else min(settings.memory // each, settings.most // rows)
        return max(1, most)

    yield from side_by_side([plan.shape for plan in plans], size)


def side_by_side(shapes: Sequence[Hashable], size: Callable[[int], int]) -> Iterator[list[int]]:
    """Yield numbers of what has equal shapes, together; `size` says how many, given the number of the first of a shape."""
    alike: dict[Hashable, list[int]] = {}
    for number, shape in enumerate(shapes):
        alike.setdefault(shape, []).append(number)
    for members in alike.values():
        step = size(members[0])
        for k in range(0, len(members), step):
            yield members[k : k + step]
