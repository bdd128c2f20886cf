"""Group the tokens of a sentence into noun phrases and predicates.

The rules read the text once from left to right, without a statistical model: the same text always has the same spans,
nothing has to be downloaded, and a wrong span can be traced to a rule or a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from behavior.free_text import word_lists as lists
from behavior.free_text.spans import Place
from behavior.free_text.tokens import Token
from concepts.nouns import number


@dataclass
class Item:
    """A noun phrase, predicate or other part of a sentence.

    Kinds: ``thing`` (a noun phrase with a visible thing), ``other_noun``, ``pronoun``, ``preposition``, ``verb``,
    ``auxiliary``, ``report``, ``attribute`` (one that follows its noun), ``comma``, ``conjunction``, ``relative``,
    ``link``, ``adverb``, ``other``.
    """

    kind: str
    start: int
    end: int
    word: str
    token: Token
    attributes: list[Token] = field(default_factory=list)
    """Attributes before the noun, or predicative ones."""
    place: Place = (0, 0)
    """Span of the name of a thing, without attributes."""
    determined: bool = False
    """Whether the noun phrase has a determiner, a possessive or attributes."""
    denied: bool = False


def group_tokens(tokens: Sequence[Token]) -> list[Item]:
    """Return the items of a sentence."""
    items: list[Item] = []
    i = 0
    while i < len(tokens):
        previous = items[-1] if items else None
        item, i = _next_item(tokens, i, previous)
        if item is not None:
            items.append(item)
    return items


def _next_item(tokens: Sequence[Token], i: int, previous: Item | None) -> tuple[Item | None, int]:
    token = tokens[i]

    def simple(kind: str) -> tuple[Item, int]:
        return Item(kind, token.start, token.end, token.word, token), i + 1

    if token.can("comma"):
        return simple("comma")
    if token.can("conjunction"):
        return simple("conjunction")
    if token.can("partitive") and not token.can("noun") and i + 1 < len(tokens) and tokens[i + 1].can("of"):
        return simple("other_noun")
    if token.can("relative") and not (token.word == "that" and _starts_noun_phrase(tokens, i + 1)):
        return simple("relative")
    if token.can("link"):
        return simple("link")
    if _is_verb_here(tokens, i, previous):
        return simple("verb")
    if token.can("auxiliary"):
        return simple("auxiliary")
    if token.can("preposition") and not token.can("noun"):
        return simple("report" if token.word == "featuring" else "preposition")
    if token.can("report") and not token.can("noun", "non_object"):
        return simple("report")
    phrase, after = _noun_phrase(tokens, i, previous)
    if phrase is not None:
        return phrase, after
    if token.can("report"):
        return simple("report")
    if token.can("pronoun"):
        return simple("pronoun")
    if token.can("attribute") and not token.can("verb"):
        return simple("attribute")
    if token.can("verb"):
        return simple("other_noun" if i and tokens[i - 1].can("possessive") else "verb")
    if token.can("adverb"):
        return simple("adverb")
    return simple("other")


def _starts_noun_phrase(tokens: Sequence[Token], i: int) -> bool:
    return i < len(tokens) and tokens[i].can("noun", "non_object") and not tokens[i].can("auxiliary", "verb")


def _is_verb_here(tokens: Sequence[Token], i: int, previous: Item | None) -> bool:
    """Whether a token that can be a verb is one at this place, outside of a noun phrase."""
    token = tokens[i]
    if i and tokens[i - 1].can("possessive"):
        return False
    is_infinitive = (
        previous is not None
        and previous.kind == "preposition"
        and previous.word == "to"
        and i
        and tokens[i - 1].word == "to"
    )
    if is_infinitive and token.can("other"):
        return True
    if not token.can("verb") or token.can("report"):
        return False
    following = tokens[i + 1] if i + 1 < len(tokens) else None
    if token.can("participle"):
        after_noun = previous is not None and previous.kind in {
            "thing",
            "pronoun",
            "auxiliary",
            "relative",
            "adverb",
            "report",
        }
        governs = following is not None and following.can("noun", "modifier", "determiner", "preposition")
        if token.can("attribute") and not token.can("noun", "non_object"):
            return after_noun and not (
                previous is not None and previous.kind == "auxiliary" and token.word in _PREDICATIVE
            )
        if token.can("noun", "modifier", "non_object"):
            is_auxiliary = previous is not None and previous.kind == "auxiliary"
            return is_auxiliary or (after_noun and governs)
        return True
    if token.can("noun", "non_object", "attribute", "modifier"):
        if previous is None or previous.kind not in {"thing", "relative", "pronoun"}:
            return bool(is_infinitive) and _takes_object(following)
        if previous.kind == "pronoun":
            return previous.word in lists.SUBJECT_PRONOUNS
        is_followed = following is None or following.can(
            "preposition", "determiner", "adverb", "pronoun", "number", "attribute"
        )
        return is_followed and (_agrees(previous, token.word) or (token.word.endswith("s") and following is not None))
    return True


_PREDICATIVE = frozenset("open closed lit covered".split())


def _takes_object(token: Token | None) -> bool:
    return token is not None and token.can("determiner", "possessive", "preposition")


def _agrees(subject: Item, verb: str) -> bool:
    """Whether a finite verb agrees with a noun phrase in number."""
    if subject.kind == "relative":
        return True
    plural = number(subject.word) == "plural" or subject.word in {"people", "police", "couple"}
    return plural != (verb.endswith("s") and not verb.endswith("ss"))


def _noun_phrase(tokens: Sequence[Token], start: int, previous: Item | None) -> tuple[Item | None, int]:
    """Return the noun phrase that begins at a token, and the index after it; None if none begins there."""
    i = start
    attributes: list[Token] = []
    modifiers: list[Token] = []
    determined = denied = False
    head: Token | None = None
    unknown = 0
    while i < len(tokens):
        token = tokens[i]
        following = tokens[i + 1] if i + 1 < len(tokens) else None
        if head is not None and not _continues_name(head, token, following):
            break
        if head is not None:
            modifiers.append(head)
            head = None
        if token.can("determiner", "possessive") and not (modifiers or (attributes and not _only_numbers(attributes))):
            if not token.can("possessive") and token.can("pronoun") and not _can_continue(following):
                break
            denied = denied or token.can("denial")
            determined = True
            i += 1
            continue
        if _is_head(token, following, bool(attributes or modifiers or determined)):
            head = token
            i += 1
            continue
        if token.can("attribute") and (
            following is not None and (_can_continue(following) or _joins_attribute(tokens, i))
        ):
            attributes.append(token)
            i += 2 if _joins_attribute(tokens, i) and not _can_continue(following) else 1
            continue
        if token.can("modifier", "material") and _can_continue(following):
            (attributes if token.can("material") else modifiers).append(token)
            i += 1
            continue
        if _is_loose_modifier(token, following, determined or bool(attributes)):
            if token.can("participle") and token.word.endswith("ing") and token.word not in lists.INVISIBLE_VERBS:
                attributes.append(token)
            unknown += 1
            i += 1
            continue
        break
    if head is None:
        if modifiers and modifiers[-1].can("noun"):
            head = modifiers.pop()
        elif determined and i > start and (unknown or _is_bare_number(tokens[start:i])):
            last = tokens[i - 1]
            return Item("other_noun", tokens[start].start, last.end, last.word, last), i
        else:
            return None, start
    if head.can("noun") and not _names_no_thing(head, previous, tokens, i, start):
        first = modifiers[0].start if modifiers else head.start
        is_marked = determined or bool(attributes)
        item = Item(
            "thing", tokens[start].start, head.end, head.word, head, attributes, (first, head.end), is_marked, denied
        )
        return item, i
    return Item("other_noun", tokens[start].start, head.end, head.word, head, attributes, determined=determined), i


def _names_no_thing(head: Token, previous: Item | None, tokens: Sequence[Token], after: int, start: int) -> bool:
    """Whether a word that can name a thing does not here: a sport, a place in the image, or the image itself."""
    if head.can("sport"):
        is_alone = after - start == 1
        return is_alone and previous is not None and previous.word in {"of", "playing", "play", "plays", "played"}
    if not head.can("non_object"):
        return False
    return (
        head.word in _IMAGE_WORDS
        and (previous is None or previous.kind in {"auxiliary", "preposition"})
        and after < len(tokens)
    )


_IMAGE_WORDS = frozenset("picture photo photograph image display".split())


def _is_bare_number(tokens: Sequence[Token]) -> bool:
    return all(token.can("attribute", "determiner") for token in tokens)


def _only_numbers(attributes: Sequence[Token]) -> bool:
    return all(token.can("number") or token.word.isdigit() for token in attributes)


def _can_continue(token: Token | None) -> bool:
    """Whether a token can be part of a noun phrase after its first word."""
    if token is None:
        return False
    if token.can(
        "preposition", "auxiliary", "link", "relative", "conjunction", "comma", "determiner", "genitive"
    ) and not token.can("noun"):
        return False
    return token.can("noun", "non_object", "attribute", "modifier", "material", "other", "adverb") or (
        token.can("participle") and not token.can("finite")
    )


def _joins_attribute(tokens: Sequence[Token], i: int) -> bool:
    """Whether an attribute is followed by a comma or "and" and another attribute of the same noun phrase."""
    j = i + 1
    while j < len(tokens) and tokens[j].can("comma", "conjunction") and j - i <= 2:
        j += 1
    return j > i + 1 and j < len(tokens) and tokens[j].can("attribute", "material", "other") and j + 1 < len(tokens) and (
        _can_continue(tokens[j + 1]) or (tokens[j + 1].can("conjunction", "comma") and not tokens[j].can("noun"))
    ) and not (tokens[j].can("noun") and not _can_continue(tokens[j + 1]))  # fmt: skip


def _is_head(token: Token, following: Token | None, has_start: bool) -> bool:
    """Whether a token is the last word of the name so far."""
    if not token.can("noun", "non_object"):
        return False
    if (
        token.can("attribute", "material", "modifier")
        and following is not None
        and following.can("noun", "modifier")
        and not following.can("preposition")
    ):
        if token.can("attribute", "material"):
            return False
        return not following.can("verb") or not token.can("modifier")
    if token.can("attribute", "material") and not token.can("noun") and _can_continue(following):
        return False
    if (
        token.can("non_object")
        and not token.can("noun", "modifier")
        and following is not None
        and following.can("noun")
    ):
        return following.can("verb", "preposition")
    if token.can("verb", "preposition") and not has_start and not token.can("noun"):
        return False
    return not (token.can("attribute") and not token.can("noun"))


def _continues_name(head: Token, token: Token, following: Token | None) -> bool:
    """Whether a noun after a noun belongs to the same name, as in "kitchen table"."""
    if not token.can("noun", "non_object", "modifier") or token.can("preposition", "auxiliary", "conjunction"):
        return False
    if (number(head.word) == "plural" and not head.can("modifier")) or (
        head.can("non_object") and not head.can("modifier", "noun")
    ):
        return False
    if token.can("finite") and (
        following is None or following.can("preposition", "determiner", "adverb", "pronoun", "number", "attribute")
    ):
        return not _agrees_word(head.word, token.word)
    if token.can("participle"):
        return False
    if token.can("modifier") and not token.can("noun"):
        return following is not None and following.can("noun")
    return not (token.can("attribute") and not token.can("noun"))


def _agrees_word(noun: str, verb: str) -> bool:
    return (number(noun) == "plural") != (verb.endswith("s") and not verb.endswith("ss"))


def _is_loose_modifier(token: Token, following: Token | None, has_start: bool) -> bool:
    """Whether a token can be an adjective or adverb that is in no list."""
    if token.can("noun", "conjunction", "comma", "preposition", "auxiliary", "relative", "link", "pronoun", "genitive"):
        return False
    if token.can("verb"):
        return has_start and token.can("participle") and not token.can("finite") and _can_continue(following)
    if token.can("non_object"):
        return following is not None and following.can("noun")
    return token.can("other", "adverb", "attribute", "modifier", "material", "report") and (
        _can_continue(following) or has_start
    )
