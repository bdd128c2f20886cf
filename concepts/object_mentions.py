"""Words of an English text, and the objects that it mentions according to a lexicon."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from concepts.nouns import singular

_SPACING_RULES = (
    (re.compile(r"\.{2,}"), r" \g<0> "),
    # A period ends a sentence before white space and punctuation; within "t.v" or "dog.a" it is part of the word.
    (re.compile(r"(?<=[^.\s])\.(?=\s|$|[])}>\"'»”\u2019;*:@({\[?!])"), " . "),
    (re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)"), "' "),
    (re.compile(r"[:,](?!\d)"), r" \g<0> "),
    (re.compile(r"[][(){}<>;@#$%&?!*\"«»“”\u2018\u2019„`\u2012-\u2015]|--|''"), r" \g<0> "),
    (re.compile(r"(?<=[^'\s])'(?=\s|$)"), " ' "),
    (re.compile(r"(?<=[^'\s])(?:n't|'(?:s|m|d|ll|re|ve))(?=\s|$)"), r" \g<0> "),
)
"""Patterns and replacements that put spaces around punctuation and before clitics."""


def tokenize_words(text: str) -> list[str]:
    """Return the words of an English text in lower case, with punctuation marks as words.

    Equal to NLTK's ``word_tokenize`` (Penn Treebank rules) except for its list of abbreviations: a hyphenated word is one
    word, "man's" is "man" and "'s", and "dog.A" without a space is one word.

    Examples
    --------
    >>> from concepts.object_mentions import tokenize_words
    >>> tokenize_words("A man's hot-dog, please.")
    ['a', 'man', "'s", 'hot-dog', ',', 'please', '.']
    """
    text = text.lower()
    for pattern, replacement in _SPACING_RULES:
        text = pattern.sub(replacement, text)
    return text.split()


def mentioned_objects(text: str, lexicon: Mapping[str, str]) -> tuple[str, ...]:
    """Return the objects that a text mentions, in order, with repetitions.

    At each word the longest entry of the lexicon is used, so a "hot dog" is not a dog. Plurals are looked up in the
    singular (`concepts.nouns.singular`).

    Parameters
    ----------
    text
        A caption.
    lexicon
        Entry (words in lower case, separated by single spaces) to the object it means; an entry with an empty object is
        skipped as a whole.

    Examples
    --------
    >>> from concepts.object_mentions import mentioned_objects
    >>> mentioned_objects("Two puppies eat a hot dog.", {"dog": "dog", "puppy": "dog", "hot dog": "hot dog"})
    ('dog', 'hot dog')
    """
    return match_lexicon(tokenize_words(text), lexicon, plurals=True)


def match_lexicon(words: Sequence[str], lexicon: Mapping[str, str], *, plurals: bool) -> tuple[str, ...]:
    """Return the objects that words mention, using the longest matching entry of a lexicon at each word.

    Parameters
    ----------
    words
        Words as returned by `tokenize_words`.
    lexicon
        As for `mentioned_objects`.
    plurals
        Whether an entry also matches if its last word is in the plural.

    Examples
    --------
    >>> from concepts.object_mentions import match_lexicon
    >>> match_lexicon(["two", "dogs"], {"dog": "dog"}, plurals=True)
    ('dog',)
    """
    return tuple(noun for noun, _, _ in _matches(words, lexicon, plurals=plurals))


def find_mentions(text: str, lexicon: Mapping[str, str]) -> tuple[tuple[str, int, int], ...]:
    """Return the objects that a text mentions, as `mentioned_objects`, each with its first character and one after its last.

    Examples
    --------
    >>> from concepts.object_mentions import find_mentions
    >>> find_mentions("A puppy, two hot dogs.", {"puppy": "dog", "hot dog": "hot dog"})
    (('dog', 2, 7), ('hot dog', 13, 21))
    """
    # Words are runs of characters of the text in lower case, in order; white space and case are all that changes.
    lower = [character.lower() for character in text]
    place = [i for i, characters in enumerate(lower) for _ in characters]
    joined = "".join(lower)
    spans, at = [], 0
    words = tokenize_words(text)
    for word in words:
        start = joined.index(word, at)
        at = start + len(word)
        spans.append((place[start], place[at - 1] + 1))
    return tuple((noun, spans[a][0], spans[b - 1][1]) for noun, a, b in _matches(words, lexicon, plurals=True))


def caption_lexicon(
    nouns: Iterable[str], synonyms: Mapping[str, str] | None = None, phrases: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the lexicon of captions: the objects that can be named, and the words for them.

    Parameters
    ----------
    nouns
        Objects.
    synonyms
        Word or phrase to the object it means.
    phrases
        Word pair to the word it counts as; that word is looked up among the others, and the pair is no object if it is not
        there.

    Examples
    --------
    >>> from concepts.object_mentions import caption_lexicon
    >>> caption_lexicon(["dog"], {"puppy": "dog"}, {"baby dog": "dog", "home plate": "home plate"})
    {'dog': 'dog', 'puppy': 'dog', 'baby dog': 'dog', 'home plate': ''}
    """
    meaning = {normalize_words(word): normalize_words(noun) for word, noun in (synonyms or {}).items()}
    named = [normalize_words(noun) for noun in (*nouns, *meaning.values())]
    words = {**{noun: meaning.get(noun, noun) for noun in named}, **meaning}
    pairs = {
        normalize_words(phrase): words.get(normalize_words(means), "") for phrase, means in (phrases or {}).items()
    }
    return {**words, **pairs}


def normalize_words(words: str) -> str:
    """Return words in lower case, separated by single spaces.

    Examples
    --------
    >>> from concepts.object_mentions import normalize_words
    >>> normalize_words(" Hot  dog")
    'hot dog'
    """
    return " ".join(words.lower().split())


def _matches(words: Sequence[str], lexicon: Mapping[str, str], *, plurals: bool) -> list[tuple[str, int, int]]:
    """Return each object with its first word and one after its last."""
    longest = max((entry.count(" ") + 1 for entry in lexicon), default=1)
    objects: list[tuple[str, int, int]] = []
    start = 0
    while start < len(words):
        for length in range(min(longest, len(words) - start), 0, -1):
            entry = " ".join(words[start : start + length])
            noun = lexicon.get(entry)
            if noun is None and plurals:
                noun = lexicon.get(singular(entry))
            if noun is not None:
                objects += [(noun, start, start + length)] if noun else []
                start += length
                break
        else:
            start += 1
    return objects
