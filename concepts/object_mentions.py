"""Words of a text, and the objects that it names by a lexicon of words and phrases."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from concepts.nouns import singular

_SPACED = (
    (re.compile(r"\.{2,}"), r" \g<0> "),
    # A period ends a sentence before white space and punctuation; within "t.v" or "dog.a" it is part of the word.
    (re.compile(r"(?<=[^.\s])\.(?=\s|$|[])}>\"'»”\u2019;*:@({\[?!])"), " . "),
    (re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)"), "' "),
    (re.compile(r"[:,](?!\d)"), r" \g<0> "),
    (re.compile(r"[][(){}<>;@#$%&?!*\"«»“”\u2018\u2019„`\u2012-\u2015]|--|''"), r" \g<0> "),
    (re.compile(r"(?<=[^'\s])'(?=\s|$)"), " ' "),
    (re.compile(r"(?<=[^'\s])(?:n't|'(?:s|m|d|ll|re|ve))(?=\s|$)"), r" \g<0> "),
)


def words_of(text: str) -> list[str]:
    """Return the words of an English text in lower case, punctuation as words.

    They are those of NLTK's ``word_tokenize`` (Penn Treebank rules within sentences), but for its list of abbreviations:
    a word with a hyphen is one word, "man's" is "man" and "'s", and "dog.A" without a blank is one word.
    """
    text = text.lower()
    for pattern, spaced in _SPACED:
        text = pattern.sub(spaced, text)
    return text.split()


def named_objects(text: str, lexicon: Mapping[str, str]) -> tuple[str, ...]:
    """Return the objects a text names, in order, as often as it names them.

    The longest entry is found first, so that a "hot dog" is no dog. Words that are no entry are looked up in the singular
    (`concepts.nouns.singular`); a word with a hyphen is one word.

    Parameters
    ----------
    text
        A caption.
    lexicon
        Words in lower case, with single blanks between them, to the object they mean; words that mean nothing (an empty
        text) are passed over as a whole.
    """
    return matches(words_of(text), lexicon, numbers=True)


def matches(words: Sequence[str], lexicon: Mapping[str, str], *, numbers: bool) -> tuple[str, ...]:
    """Return the objects that words name, the longest entry first.

    Parameters
    ----------
    words
        As `words_of` returns them.
    lexicon
        As for `named_objects`.
    numbers
        Whether the last word of an entry may also be in the plural.
    """
    longest = max((entry.count(" ") + 1 for entry in lexicon), default=1)
    objects: list[str] = []
    start = 0
    while start < len(words):
        for length in range(min(longest, len(words) - start), 0, -1):
            entry = " ".join(words[start : start + length])
            noun = lexicon.get(entry)
            if noun is None and numbers:
                noun = lexicon.get(singular(entry))
            if noun is not None:
                objects += [noun] if noun else []
                start += length
                break
        else:
            start += 1
    return tuple(objects)
