"""Which objects a text names, by a lexicon of words and phrases."""

from __future__ import annotations

import re
from collections.abc import Mapping

_WORD = re.compile(r"[^\W_]+")
_PLURALS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))
"""Ending of a plural to that of its singular, tried in this order."""


def plain(words: str) -> str:
    """Return the words in lower case with single spaces, as a lexicon has them."""
    return " ".join(_WORD.findall(words.lower()))


def named_objects(text: str, lexicon: Mapping[str, str]) -> tuple[str, ...]:
    """Return the objects a text names, in order, as often as it names them.

    Words are runs of letters and digits, in lower case. The longest entry is found first, so that a "hot dog" is no dog.
    A word that is not known is tried without a plural's ending (ies -> y, ves -> f or fe, es, s).

    Parameters
    ----------
    text
        A caption.
    lexicon
        `plain` words to the object they mean; words that mean nothing (an empty text) are passed over as a whole.
    """
    longest = max((len(words.split()) for words in lexicon), default=1)
    words = _WORD.findall(text.lower())
    found: list[str] = []
    start = 0
    while start < len(words):
        for length in range(min(longest, len(words) - start), 0, -1):
            noun = _meaning(" ".join(words[start : start + length]), lexicon)
            if noun is not None:
                found += [noun] if noun else []
                start += length
                break
        else:
            start += 1
    return tuple(found)


def _meaning(words: str, lexicon: Mapping[str, str]) -> str | None:
    """Return the object that words mean, as they are or as a plural."""
    if words in lexicon:
        return lexicon[words]
    for ending, singular in _PLURALS:
        if (
            words.endswith(ending)
            and len(words) > len(ending)
            and (single := words.removesuffix(ending) + singular) in lexicon
        ):
            return lexicon[single]
    return None
