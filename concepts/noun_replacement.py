"""Replace the nouns of a question by other nouns: the same form of question about other things."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

from concepts.concept import Level
from concepts.nouns import article, asked_noun, canonical_noun, number, singular
from concepts.schema import Example

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_ARTICLE = re.compile(r"\b(an?)\s+$", re.IGNORECASE)
_NOUNS_OF_LEVEL = {"object": 1, "attribute": 1, "relation": 2}
"""Number of nouns that a question of a level is about."""
_NOT_THINGS = ("image", "picture")
"""Nouns that questions use for the image itself."""


def nouns_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """Return the nouns of some examples in lower case, sorted: of objects, of labels ``object:<noun>``, and of questions.

    >>> import groundscope as gs
    >>> from concepts.noun_replacement import nouns_of
    >>> nouns = nouns_of(gs.scenes.dataset(10))
    >>> len(nouns), nouns[:3]
    (24, ('airplane', 'apple', 'balloon'))
    """
    names: set[str] = set()
    for example in examples:
        names.update(thing.noun for thing in example.objects)
        names.update(label.partition(":")[2] for label in example.labels if label.startswith("object:"))
        names.add(asked_noun(example.question) or "")
    names = {" ".join(name.lower().split()) for name in names}
    return tuple(
        sorted(name for name in names if name not in ("", "named") and canonical_noun(name) not in _NOT_THINGS)
    )


def replace_nouns(
    question: str, level: Level, nouns: Iterable[str], *, count: int, seed: int | list[int] = 0
) -> tuple[str, ...]:
    """Return a question with its nouns replaced by others.

    One noun is replaced in questions about objects (the noun of an existence question, otherwise the longest) and attributes
    (the first), and two in questions about relations. The other nouns have the same grammatical number and name other objects
    (`concepts.nouns.canonical_noun`); the article is that of the new noun.

    Parameters
    ----------
    question
        The question.
    level
        Its level.
    nouns
        Nouns to search in the question, in singular and plural, and to replace them by.
    count
        Largest number of results.
    seed
        Seed of the choice.

    Returns
    -------
    tuple of str
        Different questions; empty if the question has too few of the nouns, or no other noun fits.

    Examples
    --------
    >>> from concepts.noun_replacement import replace_nouns
    >>> replace_nouns("Is there a banana in the image?", "object", ["banana", "apple", "people"], count=4)
    ('Is there an apple in the image?',)
    >>> replace_nouns("Is the dog left of the cat?", "relation", ["dog", "cat", "car", "bus"], count=1)
    ('Is the car left of the bus?',)
    """
    lexicon = list(dict.fromkeys(nouns))
    spans = _spans(question, level, lexicon)
    if not spans:
        return ()
    own = {canonical_noun(question[start:stop]) for start, stop in spans}
    order = np.random.default_rng(seed).permutation(len(lexicon))
    others = [lexicon[int(i)] for i in order if canonical_noun(lexicon[int(i)]) not in own]
    fitting = [[n for n in others if number(n) == number(question[start:stop].lower())] for start, stop in spans]
    results: dict[str, None] = {}
    for draw in range(min(map(len, fitting))):
        chosen = [nouns_here[(draw + k) % len(nouns_here)] for k, nouns_here in enumerate(fitting)]
        if len({canonical_noun(noun) for noun in chosen}) == len(spans):
            results[_replaced(question, spans, chosen)] = None
        if len(results) == count:
            break
    return tuple(results)


def _spans(question: str, level: Level, lexicon: list[str]) -> list[tuple[int, int]]:
    """Return where the nouns that a question is about begin and end, in its order; empty if there are too few."""
    noun = asked_noun(question)
    if level == "object" and noun is not None:
        start = question.index(noun)
        return [(start, start + len(noun))]
    matches = list(_matches(question, frozenset(lexicon)))
    if level == "object":
        matches.sort(key=lambda span: span[0] - span[1])  # the longest first
    needed = _NOUNS_OF_LEVEL[level]
    return matches[:needed] if len(matches) >= needed else []


def _matches(question: str, lexicon: frozenset[str]) -> Iterator[tuple[int, int]]:
    """Yield where nouns of a lexicon are, the longest at each word."""
    words = [match.span() for match in _WORD.finditer(question)]
    longest = max((noun.count(" ") + 1 for noun in lexicon), default=0)
    at = 0
    while at < len(words):
        for size in range(min(longest, len(words) - at), 0, -1):
            start, stop = words[at][0], words[at + size - 1][1]
            text = " ".join(question[start:stop].lower().split())
            if text in lexicon or singular(text) in lexicon:
                yield start, stop
                at += size - 1
                break
        at += 1


def _replaced(question: str, spans: list[tuple[int, int]], nouns: list[str]) -> str:
    parts, end = [], 0
    for (start, stop), noun in zip(spans, nouns, strict=True):
        before = question[end:start]
        if match := _ARTICLE.search(before):
            word = article(noun)
            before = (
                before[: match.start(1)]
                + (word.capitalize() if match[1][0].isupper() else word)
                + before[match.end(1) :]
            )
        parts += [before, noun]
        end = stop
    return "".join([*parts, question[end:]])
