"""Captions of the model alone, cut to the length or to the recall of a method's captions.

A method that shortens captions invents less and names less. The critics' control is the model's own caption, cut to the same mean
number of words, or to the same recall: a method that invents as much as these cuts gains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from behavior.metrics import score_dataset_captions
from behavior.result import BehaviorResult
from concepts.schema import ConceptDataset


@dataclass(frozen=True)
class CutCaptions:
    """CHAIR_i of the model's own captions after a cut.

    Examples
    --------
    >>> from mitigation.arena.caption_controls import CutCaptions
    >>> CutCaptions(words=9, chair_i=0.05, recall=0.8, mean_words=8.6).words
    9
    """

    words: int
    """Number of words after which each caption is cut."""
    chair_i: float
    recall: float
    mean_words: float


def cut_to_length(plain: BehaviorResult, data: ConceptDataset, mean_words: float) -> CutCaptions:
    """Return the cut of the model's captions whose mean number of words is nearest to `mean_words`."""
    lengths = [len(text.split()) for text in plain.texts.values()]

    def mean_at(words: int) -> float:
        return sum(min(n, words) for n in lengths) / len(lengths)

    words = min(range(1, max(lengths) + 1), key=lambda n: (abs(mean_at(n) - mean_words), n)) if any(lengths) else 1
    return _cut(plain, data, words)


def cut_to_recall(plain: BehaviorResult, data: ConceptDataset, recall: float) -> CutCaptions:
    """Return the shortest cut of the model's captions with at least a recall; the whole captions if none has it."""
    longest = max((len(text.split()) for text in plain.texts.values()), default=1)
    low, high = 1, max(longest, 1)
    while low < high:  # a longer cut names at least as much
        middle = (low + high) // 2
        low, high = (low, middle) if _cut(plain, data, middle).recall >= recall else (middle + 1, high)
    return _cut(plain, data, low)


def _cut(plain: BehaviorResult, data: ConceptDataset, words: int) -> CutCaptions:
    rows = tuple(
        replace(a, text=" ".join((a.text or "").split()[:words])) for a in plain.answers if a.kind == "caption"
    )
    scores = score_dataset_captions(BehaviorResult(rows, plain.cost, plain.provenance), data)
    lengths = [len((row.text or "").split()) for row in rows]
    return CutCaptions(words, scores.chair_i.value, scores.recall.value, sum(lengths) / len(lengths))


def same_texts(first: Mapping[str, str], second: Mapping[str, str]) -> float:
    """Return the share of captions that are equal, by id."""
    return sum(text == second.get(key) for key, text in first.items()) / len(first) if first else 1.0
