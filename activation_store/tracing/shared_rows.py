"""Token selections of rows with a common prefix: what is read while the prefix runs, and what while the other tokens run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from activation_store.tracing.plan import make_reducer
from lvlm.sites import Stack
from lvlm.token_selection import TokenSelection

if TYPE_CHECKING:
    from lvlm.decoding.prefix_run import PrefixBatch


@dataclass(frozen=True, eq=False)
class SharedSelection:
    """One token selection of the rows of a batch with prefixes of equal length."""

    part: Literal["prefix", "tail", "both"]
    """Forward passes that contain the selected tokens of the rows."""
    from_prefix: Callable[[Tensor], Tensor]
    """Maps a site's tensor of the prefixes, ``[groups, T, D]``, to the vectors of the different selections among the rows."""
    from_tail: Callable[[Tensor], Tensor]
    """Maps a site's tensor of the tails, ``[B, T, D]``, to selected vectors."""
    for_rows: Callable[[Tensor], Tensor]
    """Maps results of `from_prefix` to those of all rows, if the part is ``prefix``; of both, concatenated, if it is ``both``."""


def share_selection(
    positions: Sequence[tuple[int, ...]], selection: TokenSelection, batch: PrefixBatch, stack: Stack
) -> SharedSelection:
    """Return how a selection is read from the run of the prefixes and that of the tails.

    Parameters
    ----------
    positions
        The selected positions of each row.
    selection
        Determines the reduction: single token, mean or all tokens.
    batch
        Rows whose prefixes have equal length.
    stack
        Stack of the sites; all but the decoder run with the prefix only.
    """
    device, length, count = batch.model.device, batch.lengths[0], batch.tail
    moved = [length - (count - len(tail)) for tail in batch.tails()]  # position minus column of the tail pass
    before = [tuple(p for p in row if stack != "decoder" or p < length) for row in positions]
    after = [
        tuple(p - offset for p in row if stack == "decoder" and p >= length)
        for row, offset in zip(positions, moved, strict=True)
    ]
    if not any(after):
        return _in_prefix(before, selection, batch, device)
    if not any(before):
        return SharedSelection("tail", _nothing, make_reducer(after, selection, device), _nothing)
    return _in_both(positions, before, after, selection, batch, device)


def _in_prefix(
    positions: Sequence[tuple[int, ...]], selection: TokenSelection, batch: PrefixBatch, device: torch.device
) -> SharedSelection:
    """Read each different selection of a group once."""
    different = list(dict.fromkeys(zip(batch.group_of, positions, strict=True)))
    number = {pair: i for i, pair in enumerate(different)}
    of_row = [number[pair] for pair in zip(batch.group_of, positions, strict=True)]
    groups = [group for group, _ in different]
    reduce = make_reducer([chosen for _, chosen in different], selection, device)
    every = groups == list(range(len(batch.groups)))
    rows = torch.tensor(groups, device=device)
    if selection.ragged:
        starts = [0]
        for _, chosen in different:
            starts.append(starts[-1] + len(chosen))
        index = torch.tensor(
            [i for k in of_row for i in range(starts[k], starts[k + 1])], device=device, dtype=torch.long
        )
    else:
        index = torch.tensor(of_row, device=device)
    return SharedSelection(
        "prefix",
        reduce if every else lambda x: reduce(x[rows.to(x.device)]),
        _nothing,
        lambda x: x[index.to(x.device)],
    )


def _in_both(
    positions: Sequence[tuple[int, ...]],
    before: Sequence[tuple[int, ...]],
    after: Sequence[tuple[int, ...]],
    selection: TokenSelection,
    batch: PrefixBatch,
    device: torch.device,
) -> SharedSelection:
    """Read the tokens of both passes, then order and reduce them as those of one pass."""
    gather = _gather([(g, p) for g, row in zip(batch.group_of, before, strict=True) for p in row], device)
    later = _gather([(i, p) for i, row in enumerate(after) for p in row], device)
    first, second = 0, sum(map(len, before))
    order: list[int] = []
    for whole, early in zip(positions, before, strict=True):
        inside = set(early)
        for p in whole:
            if p in inside:
                order.append(first)
                first += 1
            else:
                order.append(second)
                second += 1
    index = torch.tensor(order, device=device, dtype=torch.long)
    if selection.ragged:
        return SharedSelection("both", gather, later, lambda x: x[index.to(x.device)])
    row_of = torch.tensor([i for i, row in enumerate(positions) for _ in row], device=device)
    counts = torch.tensor([len(row) for row in positions], device=device)

    def mean(x: Tensor) -> Tensor:
        tokens = x[index.to(x.device)].float()
        total = tokens.new_zeros(len(positions), x.shape[-1]).index_add_(0, row_of.to(x.device), tokens)
        return total / counts.to(x.device)[:, None]  # an empty selection gives 0 / 0 = NaN

    return SharedSelection("both", gather, later, mean)


def _gather(places: Sequence[tuple[int, int]], device: torch.device) -> Callable[[Tensor], Tensor]:
    row, column = torch.tensor(places, device=device).reshape(-1, 2).long().T
    return lambda x: x[row.to(x.device), column.to(x.device)]


def _nothing(x: Tensor) -> Tensor:
    msg = "no token of the selection is in this forward pass"
    raise RuntimeError(msg)
