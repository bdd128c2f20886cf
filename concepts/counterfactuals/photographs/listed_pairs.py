"""Pairs that a file lists (`concepts.loaders.pairs`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from concepts.counterfactual_pair import CounterfactualPair
from concepts.counterfactuals.photographs.swap import pair_kind
from concepts.schema import ConceptDataset


def listed_pairs(data: ConceptDataset, left_out: Counter[str], kind: str) -> Iterator[CounterfactualPair]:
    """Yield the pairs of a dataset that `concepts.loaders.pairs` has read.

    Parameters
    ----------
    data
        Examples; the id of a corrupt example is the id of its clean example, ``|``, and the change.
    left_out
        Counts of examples without a pair, by reason; increased.
    kind
        Kind of the pairs.
    """
    examples = {example.id: example for example in data}
    for corrupt in data:
        name, separator, change = corrupt.id.partition("|")
        clean = examples.get(name)
        if not separator or clean is None or pair_kind(clean) != kind:
            continue
        if clean.answer == corrupt.answer:
            left_out["pairs with equal answers"] += 1
            continue
        yield CounterfactualPair(clean, corrupt, kind, change, "given")
