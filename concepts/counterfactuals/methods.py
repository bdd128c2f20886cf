"""The open table of methods that make counterfactual pairs from photographs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from concepts.counterfactual_pair import CounterfactualPair
from concepts.counterfactuals.photographs.inpaint import inpaint_pairs
from concepts.counterfactuals.photographs.listed_pairs import listed_pairs
from concepts.counterfactuals.photographs.mirror import mirror_pairs
from concepts.counterfactuals.photographs.recolor import recolor_pairs
from concepts.counterfactuals.photographs.swap import swap_pairs
from concepts.schema import ConceptDataset
from groundscope.core.errors import ConfigError
from groundscope.core.registry import Registry
from groundscope.core.text import nearest

MethodMaker = Callable[[ConceptDataset, str, Counter[str], bool], Iterable[CounterfactualPair]]
"""Function of a dataset, a kind, a counter of left-out examples by reason, and whether to make placebo pairs, to the pairs."""


@dataclass(frozen=True)
class PairMethod:
    """A method that makes pairs from photographs.

    Examples
    --------
    >>> import groundscope as gs
    >>> gs.counterfactuals.METHODS["recolor"].kinds
    ('color',)
    """

    kinds: tuple[str, ...]
    """Kinds of pairs that it makes."""
    make: MethodMaker
    """Yields the pairs in the order of the dataset."""


def _of_one_kind(
    function: Callable[..., Iterator[CounterfactualPair]], data: ConceptDataset, kind: str, left_out: Counter[str],
    placebo: bool,
) -> Iterator[CounterfactualPair]:  # fmt: skip
    del kind
    return function(data, left_out, placebo=placebo)


def _swap(data: ConceptDataset, kind: str, left_out: Counter[str], placebo: bool) -> Iterator[CounterfactualPair]:
    return swap_pairs(data, left_out, kind, placebo=placebo)


def _listed(data: ConceptDataset, kind: str, left_out: Counter[str], placebo: bool) -> Iterator[CounterfactualPair]:
    return iter(()) if placebo else listed_pairs(data, left_out, kind)


METHODS: Registry[PairMethod] = Registry(
    "method of pairs",
    {
        "given": PairMethod(("object", "color", "attribute", "relation", "action"), _listed),
        "swap": PairMethod(("object", "color", "attribute", "relation", "action"), _swap),
        "mirror": PairMethod(("relation",), partial(_of_one_kind, mirror_pairs)),
        "recolor": PairMethod(("color",), partial(_of_one_kind, recolor_pairs)),
        "inpaint": PairMethod(("object",), partial(_of_one_kind, inpaint_pairs)),
    },
    group="groundscope.pair_methods",
    check=lambda method: None if isinstance(method, PairMethod) else "it must be a PairMethod",
)
"""Methods for photographs by name, the one with the fewest artifacts first: built-in, registered, and of installed packages
(entry-point group ``groundscope.pair_methods``)."""


def methods_of(kind: str, method: str | Sequence[str] | None) -> dict[str, PairMethod]:
    """Return the methods that make pairs of a kind: all, the one that is named, or those of several, in their order.

    Raises
    ------
    ConfigError
        For an unknown method, or if none that is named makes that kind.
    """
    if method is None:
        return {name: entry for name, entry in METHODS.usable().items() if kind in entry.kinds}
    if not isinstance(method, str):
        named = {name: METHODS[name] for name in method}
        methods = {name: entry for name, entry in named.items() if kind in entry.kinds}
        able = [name for name, entry in METHODS.usable().items() if kind in entry.kinds]
        if able and not methods:
            msg = f"none of the methods {', '.join(named)} makes pairs of kind '{kind}'; choose from {', '.join(able)}"
            raise ConfigError(msg)
        return methods
    entry = METHODS[method]
    if kind not in entry.kinds:
        kinds = ", ".join(entry.kinds)
        msg = f"method '{method}' makes pairs of kind {kinds}, not '{kind}'{nearest(kind, entry.kinds)}"
        raise ConfigError(msg)
    return {method: entry}
