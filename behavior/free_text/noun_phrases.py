"""Noun phrases of a sentence: things with those that are coordinated with them, other nouns, and pronouns."""

from __future__ import annotations

from collections.abc import Sequence

from behavior.free_text import word_lists as lists
from behavior.free_text.sentence_state import NEAREST, Predicate, SentenceState
from behavior.free_text.spans import Place
from concepts.nouns import number, singular

_HELD_IN = frozenset("hand hands arm arms mouth lap beak paw paws teeth".split())
_TOWARDS_VIEWER = frozenset(
    "looking look looks posing pose poses smiling smiles staring stares gazing facing faces".split()
)


def read_thing(state: SentenceState, i: int) -> int:
    """Read a noun phrase that names a thing, with those that are coordinated with it; return the index after them."""
    content = _partitive_content(state, i)
    if content is not None:
        return content
    group, after = _coordination(state, i)
    _place_group(state, group, i)
    return after


def _partitive_content(state: SentenceState, i: int) -> int | None:
    """Skip "a slice of" before a noun phrase, and move its attributes there; None if the item is no such amount."""
    item = state.items[i]
    following, content = state.item(i + 1), state.item(i + 2)
    if not item.token.can("partitive") or following is None or not following.token.can("of"):
        return None
    if content is None or content.kind not in {"thing", "other_noun", "pronoun"}:
        return None
    if content.kind == "thing" and singular(item.word) not in lists.GROUPS:
        sizes = [a for a in item.attributes if not (a.can("number") or a.word.isdigit())]
        content.attributes = [*sizes, *content.attributes]
    content.denied = content.denied or item.denied
    return i + 2


def _coordination(state: SentenceState, i: int) -> tuple[tuple[Place, ...], int]:
    """Return the noun phrases that are coordinated with one, and the index after them."""
    first = state.items[i]
    group = [state.add_thing(first)]
    shared = [a for a in first.attributes if not (a.can("number") or a.word.isdigit())]
    j = i + 1
    while True:
        k = j
        while state.kind(k) in {"comma", "conjunction"} or (k > j and state.kind(k) in {"adverb", "other"}):
            k += 1
        item = state.item(k)
        separators = [state.items[n].word for n in range(j, k)]
        if item is None or k == j or any(word in {":", ";", "(", ")"} for word in separators):
            break
        skipped = _skip_partitive(state, k)
        thing = state.item(skipped)
        if thing is None or thing.kind != "thing":
            if item.kind == "other_noun" and state.kind(k + 1) in {"comma", "conjunction"} and "," in separators:
                j = k + 1
                continue
            break
        if _begins_clause(state, skipped, separators) or (
            state.open is not None and state.open.word == "of" and thing.determined
        ):
            break
        if (
            shared
            and not thing.determined
            and separators == ["and"]
            and skipped == k
            and number(first.word) == "plural"
        ):
            state.attributes += [((a.start, a.end), thing.place) for a in shared]
        group.append(state.add_thing(thing))
        j = skipped + 1
    return tuple(place for place in group if place in state.objects), j


def _skip_partitive(state: SentenceState, i: int) -> int:
    return _partitive_content(state, i) or i if state.kind(i) in {"thing", "other_noun"} else i


def _begins_clause(state: SentenceState, i: int, separators: Sequence[str]) -> bool:
    """Whether a noun phrase after a comma or "and" is the subject of a new clause."""
    k = state.after(i)
    kind = state.kind(k)
    following = state.item(k)
    if kind == "auxiliary" or (
        following is not None
        and kind == "verb"
        and following.token.can("finite")
        and not following.token.can("participle")
    ):
        # "a man and a woman are" is one subject, "a man on a bench, and a dog is" two clauses.
        return (state.open is not None and state.has_predicate) or "," in separators
    if kind == "verb" and state.open is not None:
        return "," in separators or (state.open.is_verb is False and state.verb is None)
    return False


def _place_group(state: SentenceState, group: tuple[Place, ...], i: int) -> None:
    """Relate a group of noun phrases to the open predicate, or make it the subject."""
    predicate, state.open = state.open, None
    if predicate is None:
        state.close_verb()
        state.last, state.owner = group, ()
        if state.kind(state.before(i)) == "auxiliary" and (state.subject or state.is_pronoun):
            return  # a predicate noun: "the shoes are casual footwear"
        state.subject, state.is_pronoun, state.has_predicate = group, False, state.kind(state.before(i)) == "auxiliary"
        if state.fronted is not None and state.fronted_objects:
            state.relate((state.fronted.start, state.fronted.end), group, state.fronted_objects)
        state.fronted, state.fronted_objects = None, ()
        return
    item = state.items[i]
    if item.word == "camera" and predicate.verb is not None and predicate.verb.token.word in _TOWARDS_VIEWER:
        state.objects.pop(item.place, None)  # the camera that took the image
        return
    subjects = predicate.subjects
    if (
        predicate.word in {"in", "on"}
        and state.verb is not None
        and state.verb.has_object
        and item.word in _HELD_IN
        and not predicate.verb
    ):
        subjects = state.last
    if not subjects and not state.subject and not predicate.is_verb and not state.is_pronoun and predicate.verb is None:
        if _is_fronted(state, predicate):
            state.fronted, state.fronted_objects = predicate, group
            state.last = group
            return
        if predicate.word != "of":
            state.subject = group
    state.owner = subjects if predicate.word == "of" else ()
    state.relate((predicate.start, predicate.end), subjects, group)
    if predicate.word in NEAREST - {"of"}:
        state.close_verb()
    elif predicate.is_verb and state.verb is not None:
        state.verb.has_object = True
    elif state.verb is not None:
        if predicate.verb is not None or predicate.word not in {"of"}:
            state.verb.has_place = True
        if predicate.word == "with" and predicate.verb is None:
            state.verb.is_consumed = True
            state.verb = None
    state.last = group


def _is_fronted(state: SentenceState, predicate: Predicate) -> bool:
    first = next((item for item in state.items if item.kind not in {"adverb", "other"}), None)
    return first is not None and first.start == predicate.start


def read_other_noun(state: SentenceState, i: int) -> int:
    """Read a noun that names no visible thing, such as an event; return the index after it."""
    content = _partitive_content(state, i)
    if content is not None:
        return content
    item = state.items[i]
    if state.open is not None:
        following = state.item(i + 1)
        if following is not None and following.token.can("of") and not state.open.is_verb:
            state.open.end = following.end
            return i + 2
        if state.verb is not None and state.open.is_verb and state.verb.token.word in lists.EVENT_VERBS:
            end = item.end if item.token.can("sport") else state.verb.end
            state.attributes += [
                ((state.verb.start, end), owner) for owner in state.verb.subjects if owner in state.objects
            ]
            state.verb.is_consumed = state.verb.has_object = True
        state.open = None
        state.last = ()
        return i + 1
    state.close_verb()
    state.subject = state.last = ()
    return i + 1


def read_pronoun(state: SentenceState, i: int) -> int:
    """Read a pronoun, or "there"; return the index after it."""
    item = state.items[i]
    if state.open is not None and item.word != "there":
        state.open = None
        return i + 1
    if item.word in {"there", "here"} or item.word in lists.SUBJECT_PRONOUNS:
        state.close_verb()
        state.subject = state.last = ()
        state.is_pronoun = item.word in lists.SUBJECT_PRONOUNS
        state.open = None
    return i + 1
