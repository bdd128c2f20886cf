"""Words of a description with their places and possible classes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from behavior.free_text import word_lists as lists
from concepts.nouns import number, singular

_WORD = re.compile(r"\d+(?:-[A-Za-z]+)+|\d+(?:[.,]\d+)*|[^\W\d_]+(?:-[^\W_]+)*|['\u2019]s\b|[^\w\s]")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\u201d)]*\s+|\n+")
_LONGEST = 6
"""Words of the longest phrase of the lists."""


@dataclass(frozen=True, slots=True)
class Token:
    """A word, or a phrase that counts as one, with its place in the text and the classes that it can have."""

    start: int
    end: int
    word: str
    """In lower case, words separated by single spaces."""
    classes: frozenset[str]

    def can(self, *classes: str) -> bool:
        """Whether the token can have one of some classes."""
        return not self.classes.isdisjoint(classes)


class Lexicon:
    """The classes of words: the lists of this package, and further names of things."""

    def __init__(self, nouns: Iterable[str] = ()) -> None:
        further = {" ".join(noun.lower().split()) for noun in nouns}
        self._nouns = lists.OBJECT_NOUNS | further | {singular(noun) for noun in further}
        phrases = (
            *self._nouns, *lists.MODIFIER_NOUNS, *lists.ATTRIBUTES, *lists.NON_OBJECTS, *_PREPOSITIONS, *lists.REPORT_VERBS,
            *lists.AUXILIARIES, *lists.DETERMINERS, *lists.PRONOUNS, *lists.SPORT_NAMES,
        )  # fmt: skip
        self._starts = frozenset(phrase.split()[0] for phrase in phrases if " " in phrase)

    def phrase_classes(self, phrase: str) -> frozenset[str]:
        """Return the classes of a word or phrase in lower case; a phrase that is in no list has none."""
        single = singular(phrase)
        is_phrase = " " in phrase
        classes = {name for name, words in _CLASSES.items() if phrase in words}
        if phrase in self._nouns or single in self._nouns:
            classes.add("noun")
        if not is_phrase and single in lists.NON_OBJECTS:
            classes.add("non_object")
        if is_phrase:
            return frozenset(classes)
        if phrase[0].isdigit():
            classes.add("attribute" if phrase.isdigit() or "-" in phrase else "other")
        classes |= _verb_classes(phrase)
        if phrase.endswith("ly") and not classes:
            classes.add("adverb")
        return frozenset(classes)

    def tokenize(self, text: str, offset: int = 0) -> list[Token]:
        """Return the tokens of a text, the longest phrase of the lists first."""
        words = [(m.start() + offset, m.end() + offset, m[0].lower()) for m in _WORD.finditer(text)]
        tokens: list[Token] = []
        i = 0
        while i < len(words):
            age = _age_length(words, i)
            length = age or self._phrase_length(words, i)
            phrase = " ".join(word for _, _, word in words[i : i + length])
            classes = frozenset({"attribute", "number"}) if age else self.phrase_classes(phrase)
            tokens.append(Token(words[i][0], words[i + length - 1][1], phrase, classes or frozenset({"other"})))
            i += length
        return tokens

    def _phrase_length(self, words: list[tuple[int, int, str]], i: int) -> int:
        if words[i][2] in self._starts:
            for length in range(min(_LONGEST, len(words) - i), 1, -1):
                parts = [word for _, _, word in words[i : i + length]]
                if self.phrase_classes(" ".join(parts)) and not (length == 2 and _is_compound_of_verb(parts, self)):
                    return length
        return 1


def _is_compound_of_verb(parts: list[str], lexicon: Lexicon) -> bool:
    """Whether two words that a list joins are a plural noun and a verb, as in "people stand"."""
    return (
        parts[1] in lists.FINITE_VERBS and number(parts[0]) == "plural" and "noun" in lexicon.phrase_classes(parts[0])
    )


def _age_length(words: list[tuple[int, int, str]], i: int) -> int:
    following = [word for _, _, word in words[i : i + 3]]
    return (
        3
        if len(following) == 3 and following[0].isdigit() and following[1:] in (["year", "old"], ["years", "old"])
        else 0
    )


@lru_cache(maxsize=1 << 15)
def _verb_classes(word: str) -> frozenset[str]:
    if word.endswith("ing") and len(word) > 4 and word not in lists.NOT_VERBS_IN_ING:
        return frozenset({"verb", "participle"})
    if word in lists.FINITE_VERBS:
        past = word in lists.IRREGULAR_PARTICIPLES
        return frozenset({"verb", "finite", *(("participle",) if past else ())})
    if word in lists.IRREGULAR_PARTICIPLES or (word.endswith("ed") and "-" not in word and len(word) > 4):
        return frozenset({"verb", "participle"})
    return frozenset()


_PREPOSITIONS = frozenset(" ".join(entry.split()) for entry in lists.PREPOSITIONS.split(",") if entry.strip())
_CLASSES: dict[str, frozenset[str]] = {
    "modifier": lists.MODIFIER_NOUNS,
    "attribute": lists.ATTRIBUTES,
    "material": lists.MATERIALS,
    "color": lists.COLORS,
    "number": lists.NUMBERS,
    "non_object": lists.NON_OBJECTS,
    "sport": lists.SPORT_NAMES,
    "preposition": _PREPOSITIONS,
    "report": lists.REPORT_VERBS,
    "auxiliary": lists.AUXILIARIES,
    "determiner": lists.DETERMINERS,
    "possessive": lists.POSSESSIVES,
    "pronoun": lists.PRONOUNS,
    "relative": lists.RELATIVES,
    "link": lists.LINKS,
    "denial": lists.DENIALS,
    "partitive": lists.PARTITIVES,
    "conjunction": frozenset({"and", "or", "&", "as well as"}),
    "comma": frozenset({",", ";", ":", "(", ")", '"', "\u201c", "\u201d", "-", "\u2013", "\u2014"}),
    "of": frozenset({"of"}),
    "genitive": frozenset({"'s", "\u2019s"}),
}


def split_sentences(text: str) -> list[tuple[int, str]]:
    """Return the sentences of a text with the place of their first character.

    Examples
    --------
    >>> from behavior.free_text.tokens import split_sentences
    >>> split_sentences("A cat sits. It is black.")
    [(0, 'A cat sits.'), (12, 'It is black.')]
    """
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text))]
    ends = [*(match.start() for match in _SENTENCE_END.finditer(text)), len(text)]
    return [(start, text[start:end]) for start, end in zip(starts, ends, strict=True) if text[start:end].strip()]
