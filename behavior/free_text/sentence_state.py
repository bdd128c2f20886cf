"""The state of a sentence while it is read: its items, what was found, and the subject, verb and predicate that are open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from behavior.free_text import word_lists as lists
from behavior.free_text.phrases import Item
from behavior.free_text.spans import Place, Span
from behavior.free_text.tokens import Token

NEAREST = frozenset("of including like".split()) | {"such as", "a part of", "consisting of"}
"""Predicates that belong to the noun before them."""
_STATIC = frozenset(
    """reads read has have had include includes contain contains consists feature features shows offers
    houses makes make does share shares""".split()
)
"""Verbs that are no action that can be seen."""


@dataclass
class Predicate:
    """A verb or preposition that waits for its object."""

    start: int
    end: int
    subjects: tuple[Place, ...]
    word: str
    is_verb: bool
    verb: Verb | None = None
    """The verb that the predicate begins with."""


@dataclass
class Verb:
    """A verb that waits for its object or its place."""

    token: Token
    start: int
    end: int
    subjects: tuple[Place, ...]
    has_object: bool = False
    has_place: bool = False
    is_consumed: bool = False


@dataclass
class SentenceState:
    """A sentence while its items are read once, from left to right."""

    items: Sequence[Item]
    objects: dict[Place, Item] = field(default_factory=dict)
    attributes: list[tuple[Place, Place]] = field(default_factory=list)
    relations: list[tuple[Place, Place, Place]] = field(default_factory=list)
    subject: tuple[Place, ...] = ()
    last: tuple[Place, ...] = ()
    verb: Verb | None = None
    open: Predicate | None = None
    fronted: Predicate | None = None
    """A place phrase before the subject: "On the table, there is …"."""
    fronted_objects: tuple[Place, ...] = ()
    owner: tuple[Place, ...] = ()
    """The noun before "of" in "a glass of wine", which a verb after it belongs to."""
    has_predicate: bool = False
    """Whether the subject has a verb."""
    is_pronoun: bool = False
    """Whether the subject is a pronoun, whose relations are not marked."""

    def spans(self) -> list[Span]:
        """Return the spans in the order of levels."""
        return [
            *(Span(*place, "object") for place in self.objects),
            *(Span(*place, "attribute", (owner,)) for place, owner in dict.fromkeys(self.attributes)),
            *(Span(*p, "relation", (a, b)) for p, a, b in dict.fromkeys(self.relations) if a != b),
        ]

    def item(self, i: int) -> Item | None:
        """Return an item; None outside the sentence."""
        return self.items[i] if 0 <= i < len(self.items) else None

    def kind(self, i: int) -> str:
        """Return the kind of an item; empty outside the sentence."""
        item = self.item(i)
        return item.kind if item is not None else ""

    def before(self, i: int) -> int:
        """Return the index of the item before, without adverbs and unknown words."""
        i -= 1
        while self.kind(i) in {"adverb", "other"}:
            i -= 1
        return i

    def after(self, i: int) -> int:
        """Return the index of the item after, without adverbs and unknown words."""
        i += 1
        while self.kind(i) in {"adverb", "other"}:
            i += 1
        return i

    def add_thing(self, item: Item) -> Place:
        """Add an object with its attributes, unless it is denied; return its place."""
        if not item.denied:
            self.objects[item.place] = item
            self.attributes += [((a.start, a.end), item.place) for a in item.attributes]
        return item.place

    def relate(self, place: Place, subjects: Iterable[Place], targets: Iterable[Place]) -> None:
        """Add relations between objects."""
        self.relations += [(place, a, b) for a in subjects for b in targets if a in self.objects and b in self.objects]

    def close_verb(self) -> None:
        """Mark a verb without object and place as an attribute of its subject, if it is a visible action."""
        verb = self.verb
        if verb is not None and not (verb.has_object or verb.has_place or verb.is_consumed) and _is_visible(verb.token):
            self.attributes += [((verb.start, verb.end), owner) for owner in verb.subjects if owner in self.objects]
        self.verb = None


def _is_visible(token: Token) -> bool:
    word = token.word
    if word in lists.INVISIBLE_VERBS or word in lists.REPORT_VERBS:
        return False
    if token.can("attribute"):
        return True
    return word.endswith("ing") or (
        token.can("finite") and not token.can("participle") and word in lists.FINITE_VERBS - _STATIC
    )
