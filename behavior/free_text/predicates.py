"""Predicates of a sentence: verbs, auxiliaries, prepositions, adjectives, and the words that end a predicate."""

from __future__ import annotations

from collections.abc import Sequence

from behavior.free_text.phrases import Item
from behavior.free_text.sentence_state import NEAREST, Predicate, SentenceState, Verb
from behavior.free_text.spans import Place
from concepts.nouns import canonical_noun, number, singular

_NO_RELATION = frozenset("about as during after before without instead like to".split()) | {"instead of"}
"""Prepositions without a verb that state nothing visible."""
_ANIMATE_GROUPS = frozenset("person dog cat horse sheep cow elephant bear zebra giraffe bird".split())
_ANIMATE = frozenset(
    """people couple crowd police family friend animal monkey goat pig rabbit puppy kid men women children batter pitcher
    bridesmaid group""".split()
)


def read_verb(state: SentenceState, i: int) -> int:
    """Read a verb, which waits for its object or place."""
    item = state.items[i]
    subjects = _subject_of_verb(state, i)
    before = state.item(state.before(i))
    if before is not None and before.token.word == "to" and state.verb is not None:
        subjects = state.verb.subjects  # "waiting to board": one action
        state.verb.is_consumed = True
    state.close_verb()
    state.has_predicate = state.has_predicate or item.token.can("finite")
    is_intended = before is not None and before.token.word == "to"  # "to throw it" is no action that can be seen
    state.verb = Verb(item.token, item.start, item.end, subjects, is_consumed=is_intended)
    state.open = Predicate(item.start, item.end, subjects, item.word, True, state.verb)
    return i + 1


def _subject_of_verb(state: SentenceState, i: int) -> tuple[Place, ...]:
    item = state.items[i]
    j = state.before(i)
    before = state.item(j)
    kind = before.kind if before is not None else ""
    if kind in {"thing", "relative", "attribute"}:
        if (
            kind == "thing"
            and item.word.endswith("ing")
            and _is_animate(state, state.subject)
            and not _is_animate(state, state.last)
        ):
            return state.subject
        if kind == "thing" and state.owner:
            return state.owner
        return state.last or (() if state.is_pronoun else state.subject)
    if kind == "conjunction" and state.verb is not None:
        return state.verb.subjects
    if kind == "conjunction" and state.kind(state.before(j)) == "comma":
        return state.subject
    if kind == "auxiliary" and state.kind(state.before(j)) == "relative":
        return state.last
    return state.subject


def _is_animate(state: SentenceState, places: Sequence[Place]) -> bool:
    words = [state.objects[place].word for place in places if place in state.objects]
    return any(
        canonical_noun(word.split()[-1]) in _ANIMATE_GROUPS or word in _ANIMATE or singular(word) in _ANIMATE
        for word in words
    )


def read_auxiliary(state: SentenceState, i: int) -> int:
    """Read an auxiliary, such as "is"."""
    if state.kind(state.before(i)) != "relative":
        state.close_verb()
    state.open = None
    state.has_predicate = True
    return i + 1


def read_report(state: SentenceState, i: int) -> int:
    """Read a verb of report, such as "can be seen" or "holds"."""
    item = state.items[i]
    finite = item.word not in {
        "visible",
        "seen",
        "found",
        "spotted",
        "observed",
        "noticed",
        "present",
        "shown",
        "noticeable",
        "evident",
    }
    state.open = None
    if finite and state.subject and state.kind(state.before(i)) in {"thing", "relative", "comma", "conjunction"}:
        state.close_verb()
        state.verb = Verb(
            item.token,
            item.start,
            item.end,
            state.last if state.kind(i - 1) in {"thing", "relative"} else state.subject,
            is_consumed=True,
        )
        state.open = Predicate(item.start, item.end, state.verb.subjects, item.word, True, state.verb)
    elif finite:
        state.close_verb()
        state.subject = state.last = ()
    return i + 1


def read_preposition(state: SentenceState, i: int) -> int:
    """Read a preposition, which waits for its object."""
    item = state.items[i]
    j = state.before(i)
    kind = state.kind(j)
    verb = state.verb
    if verb is not None and kind == "verb" and state.items[j].start == verb.start:
        verb_start = verb.start
        state.open = Predicate(verb_start, item.end, verb.subjects, item.word, False, verb)
        return i + 1
    if (
        state.kind(i - 1) == "preposition" and state.open is not None and not state.open.is_verb
    ):  # "out of", "down onto"
        state.open.end = item.end
        state.open.word = item.word
        return i + 1
    subjects = _subject_of_preposition(state, item, i, kind)
    state.open = Predicate(item.start, item.end, subjects, item.word, False)
    return i + 1


def _subject_of_preposition(state: SentenceState, item: Item, i: int, before: str) -> tuple[Place, ...]:
    if item.word in NEAREST:
        if before == "comma" and state.last and number(state.objects[state.last[-1]].word) == "singular":
            return state.subject
        return state.last[-1:] if item.word == "of" else state.last or state.subject
    if state.kind(i - 1) == "other" and state.kind(i - 2) == "preposition":
        return ()  # the object of the preposition before is an unknown word
    if item.word in _NO_RELATION:
        return ()
    if item.word == "with" and _is_about_pronoun(state, i):
        return state.last
    if before == "comma" and item.word in {"with", "in"}:
        return state.subject
    verb = state.verb
    if verb is None:
        nearest = state.last[-1:] if item.word == "with" else state.last
        return (
            nearest if nearest and before in {"thing", "attribute", "report", "verb", "other_noun"} else state.subject
        )
    if item.word == "with" and verb.has_object and not verb.has_place:
        return state.last
    return verb.subjects


def _is_about_pronoun(state: SentenceState, i: int) -> bool:
    """Whether "with" a thing "on it" follows: the thing belongs to the noun before."""
    j = i + 1
    while state.kind(j) in {"thing", "other_noun", "comma", "conjunction", "adverb", "other", "attribute"}:
        j += 1
        if j < len(state.items) and state.items[j].kind == "preposition" and state.items[j].token.can("of"):
            j += 1
    following = state.item(j + 1)
    return state.kind(j) == "preposition" and following is not None and following.word in {"it", "them"}


def read_attribute(state: SentenceState, i: int) -> int:
    """Read a predicate adjective, such as in "the apple is red"."""
    item = state.items[i]
    j = state.before(i)
    while state.kind(j) in {"attribute", "conjunction", "comma"} and any(
        state.kind(n) == "auxiliary" for n in range(max(0, j - 6), j)
    ):
        j = state.before(j)
    owners = (
        state.subject if state.kind(j) in {"auxiliary", "report"} else state.last if state.kind(j) == "thing" else ()
    )
    if state.kind(j) == "auxiliary" and state.kind(state.before(j)) == "relative":
        owners = state.last
    state.attributes += [((item.start, item.end), owner) for owner in owners if owner in state.objects]
    return i + 1


def close_predicate(state: SentenceState, i: int) -> int:
    """Read a comma or conjunction: what waits for an object gets none."""
    if state.open is not None and state.open.word not in NEAREST:
        state.open = None
    return i + 1


def read_link(state: SentenceState, i: int) -> int:
    """Read a word that links clauses."""
    if state.items[i].word != "where":  # "close to where the man stands"
        state.open = None
    return i + 1


def read_relative(state: SentenceState, i: int) -> int:
    """Read a relative pronoun."""
    state.open = None
    return i + 1
