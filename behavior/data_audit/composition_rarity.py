"""How rare the composition of an object with an attribute or relation is, and splits by rarity.

PMI(a, b) = log n(a, b) N / (n(a) n(b)) in nats, where n counts mentions: annotated attributes of objects, each image and
object once, and affirmed relations of its questions; N is the number of mentions of the kind. No smoothing: a composition
without mention is ``unseen``; the others are divided into terciles of PMI over questions: ``rare``, ``middle``, ``frequent``.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from behavior.free_text.annotations import asked_relation
from concepts.nouns import canonical_noun
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, DataError

BINS = ("unseen", "rare", "middle", "frequent")
"""Bins of rarity, rarest first."""


@dataclass(frozen=True, slots=True)
class Rarity:
    """How rare the composition of a question is.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(60)
    >>> rarity = gs.composition_rarity(data)
    >>> sorted({row.bin for row in rarity.values()} - {"unseen"})
    ['frequent', 'middle', 'rare']
    """

    composition: tuple[str, str]
    """Noun, and attribute or relation."""
    pmi: float
    """In nats; -inf if unseen."""
    count: int
    """Mentions of the composition."""
    bin: str
    """One of `BINS`."""


def composition_rarity(data: ConceptDataset) -> dict[str, Rarity]:
    """Return how rare the composition is that each question is about.

    A question about an attribute is about its subject and the subject's annotated value; a question about a relation is about its
    subject and the relation that it names. Others are left out.

    Returns
    -------
    dict
        Id of an example to its rarity.

    Examples
    --------
    >>> import groundscope as gs
    >>> rows = gs.composition_rarity(gs.scenes.dataset(60))
    >>> all(row.count > 0 for row in rows.values() if row.bin != "unseen")
    True
    """
    counts = _mentions(data)
    singles: dict[str, tuple[Counter[str], Counter[str], int]] = {}
    for kind in ("attribute", "relation"):
        nouns: Counter[str] = Counter()
        values: Counter[str] = Counter()
        for (level, noun, value), n in counts.items():
            if level == kind:
                nouns[noun] += n
                values[value] += n
        singles[kind] = (nouns, values, sum(nouns.values()))
    measured: dict[str, tuple[tuple[str, str], float, int]] = {}
    for example in data:
        composition = composition_of(example)
        if composition is None:
            continue
        level, noun, value = composition
        n = counts[composition]
        nouns, values, total = singles[level]
        pmi = math.log(n * total / (nouns[noun] * values[value])) if n else -math.inf
        measured[example.id] = ((noun, value), pmi, n)
    finite = [pmi for _, pmi, _ in measured.values() if math.isfinite(pmi)]
    first, second = np.quantile(finite, [1 / 3, 2 / 3]) if finite else (0.0, 0.0)

    def bin_of(pmi: float) -> str:
        if not math.isfinite(pmi):
            return "unseen"
        return "rare" if pmi <= first else "middle" if pmi <= second else "frequent"

    return {name: Rarity(names, pmi, n, bin_of(pmi)) for name, (names, pmi, n) in measured.items()}


def composition_of(example: Example) -> tuple[str, str, str] | None:
    """Return level, noun and attribute or relation of a question; None if it is about neither, or its subject is unknown."""
    if example.level == "relation":
        relation = asked_relation(example.question)
        return None if relation is None else ("relation", canonical_noun(relation[0]), relation[1])
    subject = example.named_object()
    if example.level != "attribute" or subject is None:
        return None
    kind = "color" if example.kind == "what_color" else example.kind
    value = subject.attributes.get(kind)
    return None if value is None else ("attribute", canonical_noun(subject.noun), value)


def _mentions(data: Iterable[Example]) -> Counter[tuple[str, str, str]]:
    counts: Counter[tuple[str, str, str]] = Counter()
    seen: set[tuple[str, ...]] = set()
    for example in data:
        for item in example.objects:
            noun = canonical_noun(item.noun)
            for value in set(item.attributes.values()):
                # Variants of an image that share a group count once, unless the attribute is what they differ in.
                if (example.group, item.id, noun, value) not in seen:
                    seen.add((example.group, item.id, noun, value))
                    counts["attribute", noun, value] += 1
        relation = asked_relation(example.question) if example.answer == "yes" else None
        if relation is not None and (example.group, *relation) not in seen:
            seen.add((example.group, *relation))
            counts["relation", canonical_noun(relation[0]), relation[1]] += 1
    return counts


def split_by_rarity(data: ConceptDataset) -> ConceptDataset:
    """Return the questions about compositions, with the bin of rarity (`BINS`) as their split.

    So that every table by split is one by rarity.

    Raises
    ------
    DataError
        If no question is about an attribute or relation of an annotated object.

    Examples
    --------
    >>> import groundscope as gs
    >>> rows = gs.split_by_rarity(gs.scenes.dataset(60))
    >>> {example.split for example in rows} <= {"unseen", "rare", "middle", "frequent"}
    True
    """
    rarity = _required(data)
    rows = tuple(replace(e, split=rarity[e.id].bin) for e in data if e.id in rarity)
    return ConceptDataset(f"{data.name} by rarity", rows, {**data.provenance, "split": "rarity of compositions"})


def hold_out_compositions(
    data: ConceptDataset, *, share: float = 0.2, seed: int = 0
) -> tuple[ConceptDataset, ConceptDataset]:
    """Divide questions about compositions into training and test questions without common compositions or images.

    Test compositions are drawn from the rare half; each of their nouns and attributes or relations stays in other training
    compositions, so that only the composition is new. Training questions about images of test questions are left out.

    Parameters
    ----------
    data
        Questions with annotated objects.
    share
        Share of compositions that are held out.
    seed
        Seed of the draw.

    Raises
    ------
    ConfigError
        If the share is not between 0 and 1.
    DataError
        If there are no compositions, or none can be held out.

    Examples
    --------
    >>> import groundscope as gs
    >>> train, test = gs.hold_out_compositions(gs.scenes.dataset(120), share=0.1)
    >>> {e.group for e in train}.isdisjoint(e.group for e in test), len(test) > 0
    (True, True)
    """
    if not 0 < share < 1:
        msg = f"share={share}; give a share between 0 and 1"
        raise ConfigError(msg)
    rarity = _required(data)
    pmi = {row.composition: row.pmi for row in rarity.values()}
    ordered = sorted(pmi, key=lambda c: (pmi[c], c))
    rare = ordered[: max(1, math.ceil(len(ordered) / 2))]
    random.Random(seed).shuffle(rare)
    withheld: set[tuple[str, str]] = set()
    remaining: Counter[str] = Counter(part for composition in pmi for part in composition)
    for composition in rare:
        if len(withheld) >= max(1, round(share * len(ordered))):
            break
        if all(remaining[part] > 1 for part in composition):
            withheld.add(composition)
            remaining.subtract(composition)
    test = [e for e in data if e.id in rarity and rarity[e.id].composition in withheld]
    if not test:
        msg = (
            "no composition can be held out: each noun, attribute or relation is in one composition only; use more data"
        )
        raise DataError(msg)
    images = {e.group for e in test}
    train = [e for e in data if e.id in rarity and rarity[e.id].composition not in withheld and e.group not in images]
    about = {**data.provenance, "held_out": sorted(map(list, withheld)), "seed": seed}
    return (
        ConceptDataset(f"{data.name}, training compositions", tuple(train), about),
        ConceptDataset(f"{data.name}, held-out compositions", tuple(test), about),
    )


def _required(data: ConceptDataset) -> dict[str, Rarity]:
    rarity = composition_rarity(data)
    if not rarity:
        msg = "no question is about an attribute or relation of an annotated object; load data with such questions"
        raise DataError(msg)
    return rarity
