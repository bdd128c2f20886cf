"""Pairs at a word of a written text: what is before it, both answers and both images."""

from __future__ import annotations

import numpy as np
import pytest

from concepts import Example, Mention, counterfactuals, scenes
from groundscope.core.errors import ConfigError, DataError

TEXT = "A dog, a hotdog and a dog."


@pytest.fixture(scope="module")
def caption() -> Example:
    return scenes.dataset(10, splits=["caption"])[0]


def test_the_prefix_ends_before_the_word(caption: Example) -> None:
    pair = counterfactuals.word_pair(caption, TEXT, "dog", "cat", occurrence=2)
    assert pair.clean.prefix == pair.corrupt.prefix == "A dog, a hotdog and a "
    assert (pair.clean.answer, pair.corrupt.answer, pair.clean.candidates) == ("cat", "dog", ("cat", "dog"))
    assert pair.clean.image is caption.image
    assert len(np.unique(np.asarray(pair.corrupt.image.load()).reshape(-1, 3), axis=0)) == 1
    assert (pair.kind, pair.clean.kind, pair.group) == ("blank", "word", caption.group)
    by_mention = counterfactuals.word_pair(caption, TEXT, Mention("dog", 22, 25), "cat")
    assert by_mention == pair


def test_a_word_without_a_right_one_has_no_candidates(caption: Example) -> None:
    other = scenes.dataset(20, splits=["caption"])[1].image
    pair = counterfactuals.word_pair(caption, TEXT, "A dog", image=other)
    assert pair.clean.prefix == ""
    assert (pair.clean.answer, pair.corrupt.answer, pair.clean.candidates) == ("A dog", "", ())
    assert pair.corrupt.image is other
    assert (pair.kind, pair.change) == ("image", "another image")


def test_words_that_cannot_be_paired_are_refused(caption: Example) -> None:
    for word, right, occurrence, message in [
        ("dog", "cat", 3, "contains 'dog' 2 times as a whole word, so it has no occurrence 3"),
        ("hot", "cat", 1, "contains 'hot' 0 times as a whole word"),
        ("dog", "Dog", 1, "the right word must be another word than 'dog', not 'Dog'"),
        (Mention("dog", 40, 43), "cat", 1, "the text has no characters 40-42"),
    ]:
        with pytest.raises(DataError, match=message):
            counterfactuals.word_pair(caption, TEXT, word, right, occurrence=occurrence)
    with pytest.raises(ConfigError, match="unknown edit 'mask' of the image; choose from blank, blur, noise"):
        counterfactuals.word_pair(caption, TEXT, "dog", "cat", image="mask")
