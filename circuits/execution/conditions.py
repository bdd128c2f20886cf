"""Run the same questions under many conditions, computing once what the conditions share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from circuits.execution.memory import MEMORY, kept_bytes
from circuits.execution.patch_runner import PatchRunner
from circuits.interventions.intervention import Intervention, intervened, placed
from lvlm.access.shared_vision_run import share_vision_runs
from lvlm.decoding.prefix_run import PrefixBatch
from lvlm.model import Batch, Lvlm

Condition = Sequence[Intervention]
"""Changes of one run; empty for the unchanged model. `SteeringVector.interventions` returns one."""
_LAST = ("last", "last+generated")
"""In a prompt without generated tokens, both are its last token."""
_AT_LAST = ("z", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


class ConditionLogits:
    """A function from a batch to its logits at the last position under each condition, ``[B, V]`` each; see `logits_under`.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> zero = gs.Intervention(gs.Site.parse("decoder.L3.z"), gs.Zero(), "image:all")
    >>> gs.logits_under(model, [[], [zero]]).continue_prefixes
    (True, False)
    """

    def __init__(self, model: Lvlm, conditions: Sequence[Condition], memory: int) -> None:
        self._model, self._conditions, self._memory = model, tuple(conditions), memory
        kinds = list(enumerate(self._conditions))
        self._plain = [i for i, items in kinds if not items]
        self._late = {i: items for i, items in kinds if items and all(map(_resumable, items))}
        self._at_last = {i: items for i, items in self._late.items() if all(item.positions in _LAST for item in items)}
        self._runner, self._tail_runner = (PatchRunner(model, memory=memory, check="every") for _ in range(2))

    @property
    def continue_prefixes(self) -> tuple[bool, ...]:
        """For each condition, whether questions that share a prefix continue it; otherwise they are whole prompts."""
        return tuple(not items or i in self._late for i, items in enumerate(self._conditions))

    def __call__(self, batch: Batch | PrefixBatch) -> list[Tensor]:
        """Return the logits under each condition."""
        numbers = range(len(self._conditions))
        results = self._after_prefixes(batch) if isinstance(batch, PrefixBatch) else self._whole(batch, numbers)
        return [results[i] for i in numbers]

    def _after_prefixes(self, batch: PrefixBatch) -> dict[int, Tensor]:
        """Return the logits of questions that share prefixes, by index of the condition."""
        model = self._model
        results = _resumed_after_prefixes(model, self._tail_runner, batch, self._at_last, self._plain)
        for i, items in self._late.items():
            if i not in results:  # changes all tokens alike, so those of the prefix once for all questions
                with intervened(model, items):
                    results[i] = PrefixBatch(model, batch.groups).logits()
        others = [i for i in range(len(self._conditions)) if i not in results]
        if others:
            parts = [(part.index, self._whole(part, others)) for part in _whole_prompts(model, batch)]
            order = torch.tensor([row for index, _ in parts for row in index]).argsort()
            for i in others:
                joined = torch.cat([columns[i] for _, columns in parts])
                results[i] = joined[order.to(joined.device)]
        return results

    def _whole(self, batch: Batch, numbers: Collection[int]) -> dict[int, Tensor]:
        """Return the logits of whole prompts under some conditions."""
        resumed = {i: items for i, items in self._late.items() if i in numbers}
        plain = [i for i in self._plain if i in numbers]
        results = _resumed(self._model, self._runner, batch, resumed, plain, self._memory) if resumed else {}
        for i in numbers:
            if i not in results:
                with intervened(self._model, self._conditions[i]):
                    results[i] = self._model.logits(batch.inputs, batch.images)
        return results


def logits_under(model: Lvlm, conditions: Sequence[Condition], *, memory: int = MEMORY) -> ConditionLogits:
    """Return a function from a batch to its logits at the last position under each condition, ``[B, V]`` each.

    A change of the decoder does not affect layers before it, and a change at the last token no earlier position. So the batch is
    run once without changes, and each condition whose changes are all at the last token, or at all tokens, resumes it for these
    tokens from the first layer that it changes; any other condition takes a full forward pass. Each resumed batch includes an
    unchanged row as a check; if a model's layers cannot be resumed, every condition takes a full forward pass, and the logger
    ``circuits.execution.patch_runner`` emits a WARNING. All ways give the same results up to the order of floating-point sums.

    In a batch of questions that share prefixes (`lvlm.decoding.prefix_run.PrefixBatch`), the prefix of an image runs once for all
    its questions and all conditions at the last token, and once for each condition at all tokens; the others take whole prompts.

    Parameters
    ----------
    model
        The model.
    conditions
        Changes of each run.
    memory
        Largest number of bytes for the conditions of one batch.

    Raises
    ------
    SiteError, PatchError
        As `intervened`, when a batch is run.

    Examples
    --------
    >>> import groundscope as gs
    >>> model = gs.load_lvlm("tiny")
    >>> example = gs.scenes.dataset(n_images=10, seed=0)[0]
    >>> zero = gs.Intervention(gs.Site.parse("decoder.L3.z"), gs.Zero())
    >>> run = gs.logits_under(model, [[], [zero]])
    >>> (batch,) = model.batches([example], 1)
    >>> unchanged, ablated = run(batch)
    >>> unchanged.shape == ablated.shape, bool((unchanged == ablated).all())
    (True, False)
    """
    return ConditionLogits(model, conditions, memory)


def _resumable(item: Intervention) -> bool:
    """Whether a change applies to the decoder at the last token or at all tokens only."""
    here = item.site.stack == "decoder" and not item.site.cross and item.site.component in _AT_LAST
    positions = item.positions
    return (
        here and isinstance(positions, str) and positions in (*_LAST, "all") and item.rows is None and item.gate is None
    )


def _resumed_after_prefixes(
    model: Lvlm, runner: PatchRunner, batch: PrefixBatch, at_last: dict[int, Condition], plain: Sequence[int]
) -> dict[int, Tensor]:
    """Return the logits of the unchanged model and of conditions at the last token, for questions that share prefixes.

    Without conditions at the last token, or if the model's runs cannot be resumed, those of the unchanged model only.
    """
    recording = runner.record_tails(batch) if at_last else None
    if recording is None:
        unchanged = batch.logits() if plain else None
        return {i: unchanged for i in plain if unchanged is not None}
    last = (recording.start,)
    rows = [tuple(replace(placed(model, item), positions=last) for item in items) for items in at_last.values()]
    logits = runner.resume(recording, rows, lambda logits: logits[:, :, -1])  # [B, rows, V]
    results = dict.fromkeys(plain, recording.logits[:, -1])
    if logits is not None:
        results |= dict(zip(at_last, logits.unbind(1), strict=True))
    return results


def _whole_prompts(model: Lvlm, batch: PrefixBatch) -> Iterator[Batch]:
    """Yield the rows of a batch as whole prompts of equal shape."""
    by_shape: dict[tuple[Any, ...], list[int]] = {}
    for row, encoding in enumerate(batch.encodings):
        by_shape.setdefault(encoding.shape, []).append(row)
    for rows in by_shape.values():
        encodings = tuple(batch.encodings[row] for row in rows)
        yield Batch(tuple(rows), encodings, model.collate(encodings))


def _resumed(
    model: Lvlm, runner: PatchRunner, batch: Batch, late: dict[int, Condition], plain: Sequence[int], memory: int
) -> dict[int, Tensor]:
    """Return the logits of the unchanged model, and of conditions that can be resumed, by index of the condition.

    Empty if the model's runs cannot be resumed.
    """
    every = any(item.positions == "all" for items in late.values() for item in items)
    length = batch.encodings[0].tokens.length
    rows_within = max(1, memory // kept_bytes(model, length if every else 1, length))
    parts: dict[int, list[Tensor]] = {}
    for k in range(0, len(batch.encodings), rows_within):  # a recording has keys and values of every layer and token
        encodings = batch.encodings[k : k + rows_within]
        whole = len(encodings) == len(batch.encodings)
        last = encodings[0].tokens.last
        with share_vision_runs(model, [e.image_key for e in encodings]):
            recording = runner.record(batch.inputs if whole else model.collate(encodings), 0 if every else last)
        if recording is None:
            return {}
        where = {"all": tuple(range(recording.length))}
        rows = [
            tuple(replace(placed(model, item), positions=where.get(str(item.positions), (last,))) for item in items)
            for items in late.values()
        ]
        logits = runner.resume(recording, rows, lambda logits: logits[:, :, -1])  # [B, rows, V]
        if logits is None:
            return {}
        for number, column in zip(late, logits.unbind(1), strict=True):
            parts.setdefault(number, []).append(column)
        for number in plain:
            parts.setdefault(number, []).append(recording.logits[:, -1])
    return {number: columns[0] if len(columns) == 1 else torch.cat(columns) for number, columns in parts.items()}
