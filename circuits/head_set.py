"""Heads that are patched or ablated together, as one unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from groundscope.core.errors import SiteError
from lvlm.sites import Head, parse_heads

if TYPE_CHECKING:
    from lvlm.model import Lvlm


@dataclass(frozen=True, init=False)
class HeadSet:
    """Heads that are patched or ablated together, in one run; prints as ``L1.H2+L4.H0``.

    A sequence of heads means one run for each head; a `HeadSet` is one run for all of its heads.

    Parameters
    ----------
    heads
        Heads or their names, or one text such as ``"L1.H2+L4.H0"``. The order and repetitions do not matter.

    Raises
    ------
    SiteError
        If `heads` is empty or contains anything but heads.

    Examples
    --------
    >>> from circuits import HeadSet
    >>> both = HeadSet(["L4.H0", "L1.H2"])
    >>> print(both, len(both))
    L1.H2+L4.H0 2
    >>> both == HeadSet("L1.H2+L4.H0")
    True
    """

    heads: tuple[Head, ...]
    """Sorted by layer and head."""

    def __init__(self, heads: str | Iterable[Head | str]) -> None:
        names = heads.split("+") if isinstance(heads, str) else heads
        parts = tuple(sorted(set(parse_heads(names))))
        if not parts:
            msg = "empty set of heads; pass at least one head, as in HeadSet(['L1.H2', 'L4.H0'])"
            raise SiteError(msg)
        object.__setattr__(self, "heads", parts)

    def __str__(self) -> str:
        return "+".join(map(str, self.heads))

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)


def head_sets_of(model: Lvlm, heads: Head | HeadSet | str | Sequence[Head | HeadSet | str]) -> tuple[HeadSet, ...]:
    """Return the unit of each run: a head alone, or a set of heads together.

    Raises
    ------
    SiteError
        If the model has no such head, or an item is a tuple, list or set of heads: pass a `HeadSet` instead.
    """
    items = [heads] if isinstance(heads, Head | HeadSet | str) else list(heads)
    sets = tuple(head_set(item) for item in items)
    unknown = dict.fromkeys(
        str(head)
        for heads_of_run in sets
        for head in heads_of_run
        if not (0 <= head.layer < model.n_layers and 0 <= head.head < model.n_heads)
    )
    if unknown:
        msg = f"unknown heads {', '.join(unknown)}: {model.name} has {model.n_layers} layers of {model.n_heads} heads"
        raise SiteError(msg)
    return sets


def head_set(item: object) -> HeadSet:
    """Return a head, its name or a set of heads as a `HeadSet`; raise `SiteError` for anything else."""
    if isinstance(item, HeadSet):
        return item
    if isinstance(item, str):
        return HeadSet(item)
    if isinstance(item, Head):
        return HeadSet([item])
    msg = f"{item!r} is not a head; pass 'L12.H7' or Head(12, 7), or HeadSet([…]) for heads that are patched together"
    raise SiteError(msg)


def all_heads(model: Lvlm) -> list[Head]:
    """Return all heads of the decoder, layer by layer.

    Examples
    --------
    >>> import groundscope as gs
    >>> heads = gs.all_heads(gs.load_lvlm("tiny"))
    >>> len(heads), str(heads[-1])
    (48, 'L5.H7')
    """
    return [Head(i, h) for i in range(model.n_layers) for h in range(model.n_heads)]
