"""BLEU of captions against references (Papineni et al. 2002), over a whole set of captions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from groundscope.core.errors import ConfigError, DataError

_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")


def bleu(captions: Mapping[str, str], references: Mapping[str, Sequence[str]], *, order: int = 4) -> float:
    """Return the corpus BLEU of captions, from 0 to 1.

    With c_n clipped matches of n-grams and m_n n-grams of all captions,
    ``BLEU = min(1, exp(1 - r / c)) (prod_n c_n / m_n) ** (1 / order)``. c is the length of all captions, r the sum of the lengths
    of the references that are nearest in length, the shorter of two. No smoothing: without a match of some order it is 0. Words
    are compared in lower case; each punctuation mark is a word.

    Parameters
    ----------
    captions
        Image to its caption.
    references
        Image to its reference captions; may contain more images.
    order
        Length of the longest n-grams.

    Raises
    ------
    DataError
        If there are no captions, or the references of a caption are missing.
    ConfigError
        For an order below 1.

    Examples
    --------
    >>> from behavior import bleu
    >>> round(bleu({"1": "a cat on a mat"}, {"1": ["a cat sat on a mat"]}, order=2), 3)
    0.709
    """
    if order < 1:
        msg = f"order={order}: must be at least 1"
        raise ConfigError(msg)
    missing = next((name for name in captions if not references.get(name) or isinstance(references[name], str)), None)
    if missing is not None or not captions:
        msg = (
            "there are no captions to score"
            if missing is None
            else f"caption of image '{missing}': give a list of its reference captions"
        )
        raise DataError(msg)
    matches, totals = [0] * order, [0] * order
    length = reference_length = 0
    for name, caption in captions.items():
        words, others = _words(caption), [_words(text) for text in references[name]]
        length += len(words)
        reference_length += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for n in range(1, order + 1):
            counts = _grams(words, n)
            most: Counter[tuple[str, ...]] = Counter()
            for other in others:
                most |= _grams(other, n)
            matches[n - 1] += (counts & most).total()
            totals[n - 1] += counts.total()
    if not all(matches):
        return 0.0
    precision = math.fsum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / order
    return math.exp(min(0.0, 1 - reference_length / length) + precision)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
