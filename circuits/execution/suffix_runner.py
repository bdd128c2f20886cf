"""Run many patches of one prompt at about the cost of one forward pass.

Activations before the first patched position and below the patched layer do not change. So a run is recorded once (keys
and values at all positions; every layer's input from the first patched position on). Each patch joins the batch at its
own layer as one more row; rows consist of the suffix only, and attend to the prefix that all rows of an example share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from circuits.execution.memory import rows_within
from circuits.execution.prefix_attention import NotShared, Prefix, SharedAttention, shared_attention
from circuits.execution.prefix_cache import CACHE, Recording, See, crosses
from circuits.interventions.hooks import edit
from circuits.interventions.intervention import Intervention, columns_of
from lvlm.family.specification import TOLERANCE
from lvlm.model import Lvlm
from lvlm.sites import Site

Row = tuple[Intervention, ...]
"""All changes of one run. Positions are integers, counted from 0 in the prompt."""
Reader = Callable[[Tensor], Tensor]
"""From logits ``[P, n, keep, V]`` to a result ``[P, n, …]``."""
# By argument name: the axis of examples and the axis of positions, counted from the end.
_AXES = {
    "position_embeddings": (-3, -2),
    "position_ids": (-2, -1),
    "cache_position": (None, -1),
    "full_text_row_masked_out_mask": (-4, -2),
}
# Arguments that only attention uses; it takes them from the recording.
_ATTENDED = ("attention_mask", "cross_attention_mask", "cross_attention_states", "causal_mask")


@dataclass(frozen=True)
class _Chunk:
    """Rows of one batch."""

    start: int
    """First position of the suffix."""
    numbers: tuple[int, ...]
    """Indices of rows, lowest layer first."""


@torch.no_grad()
def resume(
    model: Lvlm,
    run: Recording,
    rows: Sequence[Row],
    read: Reader,
    *,
    memory: int,
    most: int | None = None,
    examples: Sequence[int] | None = None,
    check: bool = False,
    see: See | None = None,
) -> Tensor:
    """Resume a recording under each row of changes and return what `read` computes from the logits.

    Parameters
    ----------
    model
        The model of the recording.
    run
        The recorded run to change.
    rows
        Changes; one run per row.
    read
        Function of the logits ``[P, n, keep, V]`` of n rows.
    memory
        Largest number of bytes for the rows of one batch.
    most
        Largest number of rows per batch; None for as many as memory allows.
    examples
        Indices of examples of the recording; None for all.
    check
        Whether to add an unchanged row and compare its logits with the recording.
    see
        Called with each layer's head outputs, from the first position of the suffix on.

    Returns
    -------
    Tensor
        Results of `read`, ``[P, rows, …]``.

    Raises
    ------
    NotShared
        If this model's layers cannot run one by one on a shared prefix.
    PatchError
        If `memory` is too small for one row.
    """
    which = torch.arange(len(run.logits)) if examples is None else torch.tensor(list(examples))
    which = which.to(run.logits.device)
    results: dict[int, Tensor] = {}
    with shared_attention(model) as attention:
        for number, chunk in enumerate(_chunks(model, run, rows, len(which), memory, most)):
            row_items = [rows[i] for i in chunk.numbers]
            checked = check and number == 0
            watcher = None if see is None else (see, (-1, *chunk.numbers) if checked else chunk.numbers)
            logits = _run(
                model, run, [(), *row_items] if checked else row_items, chunk.start, which, attention, watcher
            )
            if checked:
                _compare(model, run, logits[:, 0], which)
                logits = logits[:, 1:]
            reading = read(logits)
            results.update((i, reading[:, k]) for k, i in enumerate(chunk.numbers))
    return torch.stack([results[i] for i in range(len(rows))], dim=1)


def _run(
    model: Lvlm,
    run: Recording,
    rows: Sequence[Row],
    start: int,
    which: Tensor,
    attention: SharedAttention,
    watcher: tuple[See, tuple[int, ...]] | None = None,
) -> Tensor:
    """Return the logits of rows at the last positions, ``[P, n, keep, V]``; rows are sorted by first layer."""
    entry = [_first_layer(row) for row in rows]
    offset, examples = start - run.start, len(which)
    hidden = run.residual[0][which][:, None, offset:][:, :0]  # [P, n, S, D]
    for layer in range(entry[0], model.n_layers):
        entering = entry.count(layer)
        new = run.residual[layer][which][:, None, offset:].expand(-1, entering, -1, -1)
        hidden = torch.cat([hidden, new], dim=1)
        count = hidden.shape[1]
        attention.prefix = _prefix(run, layer, start, which)
        attention.calls = 0
        hooks = _edits(model, layer, rows[:count], start, examples)
        if watcher is not None:
            hooks.append(_watch(model, layer, examples, watcher[0], watcher[1][:count]))
        try:
            module = model.place("decoder", layer, "resid_post").module
            out = module(hidden.flatten(0, 1), **_arguments(run, layer, start, which, count))
        finally:
            for hook in hooks:
                hook.remove()
            attention.prefix = None
        if attention.calls != 1:
            msg = f"layer {layer} does not use transformers' table of attention functions"
            raise NotShared(msg)
        hidden = (out[0] if isinstance(out, tuple) else out).unflatten(0, (examples, count))
        if run.added and layer + 1 < model.n_layers and (more := run.added[layer]) is not None:
            hidden = hidden + more[which][:, None, offset:]
    logits = model.unembed(hidden[:, :, hidden.shape[2] - run.logits.shape[1] :])
    lowest = torch.finfo(logits.dtype).min / 2  # Chameleon masks image tokens with the dtype's minimum
    own = run.logits[which][:, None]
    return torch.where(own > lowest, logits, own) if bool((own <= lowest).any()) else logits


def _first_layer(row: Row) -> int:
    return min((item.site.layer for item in row), default=0)


def first_position(row: Row) -> int:
    """Return the first position that a row changes."""
    return min(min(positions_of(item)) for item in row)


def positions_of(item: Intervention) -> tuple[int, ...]:
    """Return the positions of an intervention with explicit positions."""
    if isinstance(item.positions, tuple):
        return item.positions
    msg = f"positions {item.positions!r} at '{item.site}': patches with a shared prefix need a tuple of positions"
    raise NotShared(msg)


def _chunks(
    model: Lvlm, run: Recording, rows: Sequence[Row], examples: int, memory: int, most: int | None
) -> Iterator[_Chunk]:
    """Yield batches of rows with the same suffix, sorted by first layer, as large as `memory` allows."""
    by_start: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_start.setdefault(run.closed(first_position(row)), []).append(number)
    for start, numbers in sorted(by_start.items()):
        numbers.sort(key=lambda i: _first_layer(rows[i]))
        size = rows_within(model, run, start, examples, memory, most)
        for k in range(0, len(numbers), size):
            yield _Chunk(start, tuple(numbers[k : k + size]))


def _prefix(run: Recording, layer: int, start: int, which: Tensor) -> Prefix:
    keys, values, mask = run.keys[layer], run.values[layer], run.masks[layer]
    cross = layer in run.cross
    if not cross:
        keys, values = keys[:, :, :start], values[:, :, :start]
    if mask is not None:
        mask = (mask if len(mask) == 1 else mask[which])[..., start - run.first :, :]
    everything = len(which) == len(run.logits)  # then `which` is in order
    return Prefix(keys if everything else keys[which], values if everything else values[which], mask, cross)


def _edits(model: Lvlm, layer: int, rows: Sequence[Row], start: int, examples: int) -> list[Any]:
    """Register hooks at the changed sites of a layer; each row changes only its own part of the batch."""
    by_site: dict[Site, list[tuple[int, Intervention]]] = {}
    for number, row in enumerate(rows):
        for item in row:
            if item.site.layer == layer:
                by_site.setdefault(item.site, []).append((number, item))
    hooks = []
    for site, items in by_site.items():
        edits = [(number, _slice(positions_of(item), start), columns_of(model, item), item) for number, item in items]

        def change(x: Tensor, edits: list[Any] = edits) -> Tensor:
            x = x.clone()
            by_row = x.unflatten(0, (examples, -1))
            for number, at, columns, item in edits:
                by_row[:, number, at, columns] = item.change(by_row[:, number, at, columns])
            return x

        hooks.append(edit(model, site, change))
    return hooks


def _watch(model: Lvlm, layer: int, examples: int, see: See, numbers: tuple[int, ...]) -> Any:
    place = model.place("decoder", layer, "z", cross=crosses(model, layer))
    return place.watch(lambda x: see(layer, numbers, x.unflatten(0, (examples, -1))))


def _slice(positions: tuple[int, ...], start: int) -> slice | list[int]:
    first, last = positions[0], positions[-1]
    if positions == tuple(range(first, last + 1)):
        return slice(first - start, last + 1 - start)
    return [p - start for p in positions]


def _compare(model: Lvlm, run: Recording, logits: Tensor, which: Tensor) -> None:
    own = run.logits[which].float()
    finite = own > torch.finfo(run.logits.dtype).min / 2
    scale = max(float(own[finite].abs().max()), 1e-6)
    error = float((logits.float() - own)[finite].abs().max()) / scale
    if not error <= TOLERANCE[model.dtype]:
        msg = f"its decoder layers, run one by one, do not reproduce the model's logits (relative error {error:.1e})"
        raise NotShared(msg)


class _SuffixCache:
    """The cache interface that a decoder layer uses; it returns new keys and values only, as the prefix is shared."""

    def __init__(self, run: Recording, start: int) -> None:
        self._run, self._start = run, start

    @property
    def layers(self) -> list[SimpleNamespace]:
        """Keys and values by layer, for cross-attention."""
        return [SimpleNamespace(keys=k, values=v) for k, v in zip(self._run.keys, self._run.values, strict=True)]

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values unchanged."""
        return keys, values

    def get_seq_length(self, *_args: Any) -> int:
        """Return the number of positions before the suffix."""
        return self._start


def _arguments(run: Recording, layer: int, start: int, which: Tensor, rows: int) -> dict[str, Any]:
    """Return a layer's arguments, except the hidden states ``[P rows, S, D]``, for the examples `which`.

    Raises
    ------
    NotShared
        If an argument is a tensor of unknown meaning.
    """
    arguments: dict[str, Any] = {}
    for name, value in run.arguments[layer].items():
        if value is CACHE:
            arguments[name] = _SuffixCache(run, start)
        elif name in _ATTENDED:
            arguments[name] = None
        elif name in _AXES and isinstance(value, Tensor):
            arguments[name] = _part(value, name, start - run.first, which, rows)
        elif name in _AXES and isinstance(value, tuple):
            arguments[name] = tuple(_part(x, name, start - run.first, which, rows) for x in value)
        elif isinstance(value, Tensor):
            msg = f"its layers receive '{name}', which shared prefixes do not support"
            raise NotShared(msg)
        else:
            arguments[name] = value
    return arguments


def _part(x: Tensor, name: str, start: int, which: Tensor, rows: int) -> Tensor:
    examples, positions = _AXES[name]
    x = x.narrow(positions, start, x.shape[positions] - start)
    if examples is None or x.dim() < -examples or x.shape[examples] == 1:
        return x
    return x.index_select(examples, which).repeat_interleave(rows, dim=examples)
