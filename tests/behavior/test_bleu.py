"""BLEU against values computed by hand."""

from __future__ import annotations

import math

import pytest

from behavior import bleu
from groundscope.core.errors import ConfigError, DataError


def test_bleu_is_the_value_computed_by_hand() -> None:
    captions = {"1": "The cat is on the mat.", "2": "A red car"}
    references = {"1": ["the cat sat on the mat .", "A cat is on a mat."], "2": ["a red car and a dog", "one car"]}
    # Image 1, 7 words: the cat is on the mat .; "the" at most twice in the first reference; 7 of 7 words, bigrams the cat,
    # cat is, is on, on the, the mat, mat .: 6 of 6; trigrams: cat is on, on the mat, the mat .: 3 of 5; on the mat .: 1 of 4.
    # Image 2, 3 words: 3 of 3, 2 of 2, 1 of 1, 0 of 0. Nearest lengths: 7, and 2 (at distance 1, as no other).
    precisions = [10 / 10, 8 / 8, 4 / 6, 1 / 4]
    expected = math.prod(precisions) ** 0.25 * min(1.0, math.exp(1 - 9 / 10))
    assert bleu(captions, references) == pytest.approx(expected, abs=1e-12)


def test_counts_are_clipped_and_short_captions_are_penalized() -> None:
    # The example of the paper: seven times "the", of which two match, against seven words.
    assert bleu({"1": "the the the the the the the"}, {"1": ["The cat is on the mat"]}, order=1) == pytest.approx(2 / 7)
    assert bleu({"1": "the cat"}, {"1": ["the cat is on the mat"]}, order=2) == pytest.approx(math.exp(1 - 6 / 2))
    assert bleu({"1": "a dog"}, {"1": ["the cat"]}) == 0.0


def test_missing_references_are_named() -> None:
    with pytest.raises(DataError, match="caption of image '1': give a list of its reference captions"):
        bleu({"1": "a cat"}, {"1": "a cat"})
    with pytest.raises(DataError, match="there are no captions to score"):
        bleu({}, {})
    with pytest.raises(ConfigError, match="order=0: must be at least 1"):
        bleu({"1": "a"}, {"1": ["a"]}, order=0)
