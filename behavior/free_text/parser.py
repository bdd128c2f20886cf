"""Parse descriptions to objects, attributes and relations, with the places of their words.

A rule parser over word lists, not a statistical one: models of spaCy or other parsers are separate downloads, which not every
machine may make, and whose versions change results. `benchmarks/free_text.py` measures it on annotated sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from behavior.free_text import word_lists as lists
from behavior.free_text.phrases import Item, group_tokens
from behavior.free_text.spans import Description, Place, Span
from behavior.free_text.tokens import Lexicon, Token, split_sentences
from concepts.nouns import canonical_noun, number, singular
from groundscope.core.errors import DataError

_NO_RELATION = frozenset("about as during after before without instead like to".split()) | {"instead of"}
"""Prepositions without a verb that state nothing visible."""
_HELD_IN = frozenset("hand hands arm arms mouth lap beak paw paws teeth".split())
_TOWARDS_VIEWER = frozenset(
    "looking look looks posing pose poses smiling smiles staring stares gazing facing faces".split()
)
_NEAREST = frozenset("of including like".split()) | {"such as", "a part of", "consisting of"}
"""Predicates that belong to the noun before them."""
_ANIMATE_GROUPS = frozenset("person dog cat horse sheep cow elephant bear zebra giraffe bird".split())
_ANIMATE = frozenset(
    """people couple crowd police family friend animal monkey goat pig rabbit puppy kid men women children batter pitcher
    bridesmaid group""".split()
)


def parse_description(text: str, *, nouns: Iterable[str] = (), id: str = "") -> Description:  # name of the field
    """Parse a description in English to spans of objects, attributes and relations.

    Objects are names of visible things: those in the lists of the parser, and `nouns`. Attributes are visible properties and
    actions of an object; relations are prepositions and verbs between two objects of a sentence. Pronouns are not resolved,
    and what a sentence denies ("no dogs") is not marked. `tests/toys/free_text/GUIDELINE.md` states what counts.

    Parameters
    ----------
    text
        The description.
    nouns
        Further names of things, such as those of a data set's annotations.
    id
        Id of the description.

    Raises
    ------
    DataError
        If the text is not a string.

    Examples
    --------
    >>> from behavior.free_text import parse_description
    >>> for span in parse_description("A man in a red shirt is riding a horse.").spans:
    ...     print(span.level, span.start, span.end)
    object 2 5
    object 15 20
    object 33 38
    attribute 11 14
    relation 6 8
    relation 24 30
    """
    if not isinstance(text, str):
        msg = f"description '{id}': it must be text, not {type(text).__name__}"
        raise DataError(msg)
    lexicon = Lexicon(nouns)
    spans: list[Span] = []
    for start, sentence in split_sentences(text):
        reader = _SentenceReader(group_tokens(lexicon.tokenize(sentence, start)))
        reader.read()
        spans += reader.spans()
    order = {"object": 0, "attribute": 1, "relation": 2}
    return Description(
        id, text, tuple(sorted(dict.fromkeys(spans), key=lambda s: (order[s.level], s.start, s.arguments)))
    )


@dataclass
class _Predicate:
    """A verb or preposition that waits for its object."""

    start: int
    end: int
    subjects: tuple[Place, ...]
    word: str
    is_verb: bool
    verb: _Verb | None = None
    """The verb that the predicate begins with."""


@dataclass
class _Verb:
    token: Token
    start: int
    end: int
    subjects: tuple[Place, ...]
    has_object: bool = False
    has_place: bool = False
    is_consumed: bool = False


@dataclass
class _SentenceReader:
    """Reads the items of a sentence once, with the subject, the verb and the predicate that are open."""

    items: Sequence[Item]
    objects: dict[Place, Item] = field(default_factory=dict)
    attributes: list[tuple[Place, Place]] = field(default_factory=list)
    relations: list[tuple[Place, Place, Place]] = field(default_factory=list)
    subject: tuple[Place, ...] = ()
    last: tuple[Place, ...] = ()
    verb: _Verb | None = None
    open: _Predicate | None = None
    fronted: _Predicate | None = None
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

    def read(self) -> None:
        """Read all items."""
        i = 0
        while i < len(self.items):
            item = self.items[i]
            step = getattr(self, f"_{item.kind}", None)
            i = step(i) if step is not None else i + 1
        self._close_verb()

    # -- helpers -------------------------------------------------------------------------------------------------

    def _item(self, i: int) -> Item | None:
        return self.items[i] if 0 <= i < len(self.items) else None

    def _kind(self, i: int) -> str:
        item = self._item(i)
        return item.kind if item is not None else ""

    def _before(self, i: int) -> int:
        """Return the index of the item before, without adverbs and unknown words."""
        i -= 1
        while self._kind(i) in {"adverb", "other"}:
            i -= 1
        return i

    def _after(self, i: int) -> int:
        i += 1
        while self._kind(i) in {"adverb", "other"}:
            i += 1
        return i

    def _add_thing(self, item: Item) -> Place:
        if not item.denied:
            self.objects[item.place] = item
            self.attributes += [((a.start, a.end), item.place) for a in item.attributes]
        return item.place

    def _relate(self, place: Place, subjects: Iterable[Place], targets: Iterable[Place]) -> None:
        self.relations += [(place, a, b) for a in subjects for b in targets if a in self.objects and b in self.objects]

    def _close_verb(self) -> None:
        """Mark a verb without object and place as an attribute of its subject, if it is a visible action."""
        verb = self.verb
        if verb is not None and not (verb.has_object or verb.has_place or verb.is_consumed) and _is_visible(verb.token):
            self.attributes += [((verb.start, verb.end), owner) for owner in verb.subjects if owner in self.objects]
        self.verb = None

    # -- noun phrases --------------------------------------------------------------------------------------------

    def _thing(self, i: int) -> int:
        content = self._partitive_content(i)
        if content is not None:
            return content
        group, after = self._coordination(i)
        self._place_group(group, i)
        return after

    def _partitive_content(self, i: int) -> int | None:
        """Skip "a slice of" before a noun phrase, and move its attributes there; None if the item is no such amount."""
        item = self.items[i]
        following, content = self._item(i + 1), self._item(i + 2)
        if not item.token.can("partitive") or following is None or not following.token.can("of"):
            return None
        if content is None or content.kind not in {"thing", "other_noun", "pronoun"}:
            return None
        if content.kind == "thing" and singular(item.word) not in lists.GROUPS:
            sizes = [a for a in item.attributes if not (a.can("number") or a.word.isdigit())]
            content.attributes = [*sizes, *content.attributes]
        content.denied = content.denied or item.denied
        return i + 2

    def _coordination(self, i: int) -> tuple[tuple[Place, ...], int]:
        """Return the noun phrases that are coordinated with one, and the index after them."""
        first = self.items[i]
        group = [self._add_thing(first)]
        shared = [a for a in first.attributes if not (a.can("number") or a.word.isdigit())]
        j = i + 1
        while True:
            k = j
            while self._kind(k) in {"comma", "conjunction"} or (k > j and self._kind(k) in {"adverb", "other"}):
                k += 1
            item = self._item(k)
            separators = [self.items[n].word for n in range(j, k)]
            if item is None or k == j or any(word in {":", ";", "(", ")"} for word in separators):
                break
            skipped = self._skip_partitive(k)
            thing = self._item(skipped)
            if thing is None or thing.kind != "thing":
                if item.kind == "other_noun" and self._kind(k + 1) in {"comma", "conjunction"} and "," in separators:
                    j = k + 1
                    continue
                break
            if self._begins_clause(skipped, separators) or (
                self.open is not None and self.open.word == "of" and thing.determined
            ):
                break
            if (
                shared
                and not thing.determined
                and separators == ["and"]
                and skipped == k
                and number(first.word) == "plural"
            ):
                self.attributes += [((a.start, a.end), thing.place) for a in shared]
            group.append(self._add_thing(thing))
            j = skipped + 1
        return tuple(place for place in group if place in self.objects), j

    def _skip_partitive(self, i: int) -> int:
        return self._partitive_content(i) or i if self._kind(i) in {"thing", "other_noun"} else i

    def _begins_clause(self, i: int, separators: Sequence[str]) -> bool:
        """Whether a noun phrase after a comma or "and" is the subject of a new clause."""
        k = self._after(i)
        kind = self._kind(k)
        following = self._item(k)
        if kind == "auxiliary" or (
            following is not None
            and kind == "verb"
            and following.token.can("finite")
            and not following.token.can("participle")
        ):
            # "a man and a woman are" is one subject, "a man on a bench, and a dog is" two clauses.
            return (self.open is not None and self.has_predicate) or "," in separators
        if kind == "verb" and self.open is not None:
            return "," in separators or (self.open.is_verb is False and self.verb is None)
        return False

    def _place_group(self, group: tuple[Place, ...], i: int) -> None:
        """Relate a group of noun phrases to the open predicate, or make it the subject."""
        predicate, self.open = self.open, None
        if predicate is None:
            self._close_verb()
            self.last, self.owner = group, ()
            if self._kind(self._before(i)) == "auxiliary" and (self.subject or self.is_pronoun):
                return  # a predicate noun: "the shoes are casual footwear"
            self.subject, self.is_pronoun, self.has_predicate = group, False, self._kind(self._before(i)) == "auxiliary"
            if self.fronted is not None and self.fronted_objects:
                self._relate((self.fronted.start, self.fronted.end), group, self.fronted_objects)
            self.fronted, self.fronted_objects = None, ()
            return
        item = self.items[i]
        if item.word == "camera" and predicate.verb is not None and predicate.verb.token.word in _TOWARDS_VIEWER:
            self.objects.pop(item.place, None)  # the camera that took the image
            return
        subjects = predicate.subjects
        if (
            predicate.word in {"in", "on"}
            and self.verb is not None
            and self.verb.has_object
            and item.word in _HELD_IN
            and not predicate.verb
        ):
            subjects = self.last
        if (
            not subjects
            and not self.subject
            and not predicate.is_verb
            and not self.is_pronoun
            and predicate.verb is None
        ):
            if self._is_fronted(predicate):
                self.fronted, self.fronted_objects = predicate, group
                self.last = group
                return
            if predicate.word != "of":
                self.subject = group
        self.owner = subjects if predicate.word == "of" else ()
        self._relate((predicate.start, predicate.end), subjects, group)
        if predicate.word in _NEAREST - {"of"}:
            self._close_verb()
        elif predicate.is_verb and self.verb is not None:
            self.verb.has_object = True
        elif self.verb is not None:
            if predicate.verb is not None or predicate.word not in {"of"}:
                self.verb.has_place = True
            if predicate.word == "with" and predicate.verb is None:
                self.verb.is_consumed = True
                self.verb = None
        self.last = group

    def _is_fronted(self, predicate: _Predicate) -> bool:
        first = next((item for item in self.items if item.kind not in {"adverb", "other"}), None)
        return first is not None and first.start == predicate.start

    def _other_noun(self, i: int) -> int:
        content = self._partitive_content(i)
        if content is not None:
            return content
        item = self.items[i]
        if self.open is not None:
            following = self._item(i + 1)
            if following is not None and following.token.can("of") and not self.open.is_verb:
                self.open.end = following.end
                return i + 2
            if self.verb is not None and self.open.is_verb and self.verb.token.word in lists.EVENT_VERBS:
                end = item.end if item.token.can("sport") else self.verb.end
                self.attributes += [
                    ((self.verb.start, end), owner) for owner in self.verb.subjects if owner in self.objects
                ]
                self.verb.is_consumed = self.verb.has_object = True
            self.open = None
            self.last = ()
            return i + 1
        self._close_verb()
        self.subject = self.last = ()
        return i + 1

    def _pronoun(self, i: int) -> int:
        item = self.items[i]
        if self.open is not None and item.word != "there":
            self.open = None
            return i + 1
        if item.word in {"there", "here"} or item.word in lists.SUBJECT_PRONOUNS:
            self._close_verb()
            self.subject = self.last = ()
            self.is_pronoun = item.word in lists.SUBJECT_PRONOUNS
            self.open = None
        return i + 1

    # -- predicates ----------------------------------------------------------------------------------------------

    def _verb(self, i: int) -> int:
        item = self.items[i]
        subjects = self._subject_of_verb(i)
        before = self._item(self._before(i))
        if before is not None and before.token.word == "to" and self.verb is not None:
            subjects = self.verb.subjects  # "waiting to board": one action
            self.verb.is_consumed = True
        self._close_verb()
        self.has_predicate = self.has_predicate or item.token.can("finite")
        is_intended = before is not None and before.token.word == "to"  # "to throw it" is no action that can be seen
        self.verb = _Verb(item.token, item.start, item.end, subjects, is_consumed=is_intended)
        self.open = _Predicate(item.start, item.end, subjects, item.word, True, self.verb)
        return i + 1

    def _subject_of_verb(self, i: int) -> tuple[Place, ...]:
        item = self.items[i]
        j = self._before(i)
        before = self._item(j)
        kind = before.kind if before is not None else ""
        if kind in {"thing", "relative", "attribute"}:
            if (
                kind == "thing"
                and item.word.endswith("ing")
                and self._is_animate(self.subject)
                and not self._is_animate(self.last)
            ):
                return self.subject
            if kind == "thing" and self.owner:
                return self.owner
            return self.last or (() if self.is_pronoun else self.subject)
        if kind == "conjunction" and self.verb is not None:
            return self.verb.subjects
        if kind == "conjunction" and self._kind(self._before(j)) == "comma":
            return self.subject
        if kind == "auxiliary" and self._kind(self._before(j)) == "relative":
            return self.last
        return self.subject

    def _is_animate(self, places: Sequence[Place]) -> bool:
        words = [self.objects[place].word for place in places if place in self.objects]
        return any(
            canonical_noun(word.split()[-1]) in _ANIMATE_GROUPS or word in _ANIMATE or singular(word) in _ANIMATE
            for word in words
        )

    def _auxiliary(self, i: int) -> int:
        if self._kind(self._before(i)) != "relative":
            self._close_verb()
        self.open = None
        self.has_predicate = True
        return i + 1

    def _report(self, i: int) -> int:
        item = self.items[i]
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
        self.open = None
        if finite and self.subject and self._kind(self._before(i)) in {"thing", "relative", "comma", "conjunction"}:
            self._close_verb()
            self.verb = _Verb(
                item.token,
                item.start,
                item.end,
                self.last if self._kind(i - 1) in {"thing", "relative"} else self.subject,
                is_consumed=True,
            )
            self.open = _Predicate(item.start, item.end, self.verb.subjects, item.word, True, self.verb)
        elif finite:
            self._close_verb()
            self.subject = self.last = ()
        return i + 1

    def _preposition(self, i: int) -> int:
        item = self.items[i]
        j = self._before(i)
        kind = self._kind(j)
        verb = self.verb
        if verb is not None and kind == "verb" and self.items[j].start == verb.start:
            verb_start = verb.start
            self.open = _Predicate(verb_start, item.end, verb.subjects, item.word, False, verb)
            return i + 1
        if (
            self._kind(i - 1) == "preposition" and self.open is not None and not self.open.is_verb
        ):  # "out of", "down onto"
            self.open.end = item.end
            self.open.word = item.word
            return i + 1
        subjects = self._subject_of_preposition(item, i, kind)
        self.open = _Predicate(item.start, item.end, subjects, item.word, False)
        return i + 1

    def _subject_of_preposition(self, item: Item, i: int, before: str) -> tuple[Place, ...]:
        if item.word in _NEAREST:
            if before == "comma" and self.last and number(self.objects[self.last[-1]].word) == "singular":
                return self.subject
            return self.last[-1:] if item.word == "of" else self.last or self.subject
        if self._kind(i - 1) == "other" and self._kind(i - 2) == "preposition":
            return ()  # the object of the preposition before is an unknown word
        if item.word in _NO_RELATION:
            return ()
        if item.word == "with" and self._is_about_pronoun(i):
            return self.last
        if before == "comma" and item.word in {"with", "in"}:
            return self.subject
        verb = self.verb
        if verb is None:
            nearest = self.last[-1:] if item.word == "with" else self.last
            return (
                nearest
                if nearest and before in {"thing", "attribute", "report", "verb", "other_noun"}
                else self.subject
            )
        if item.word == "with" and verb.has_object and not verb.has_place:
            return self.last
        return verb.subjects

    def _is_about_pronoun(self, i: int) -> bool:
        """Whether "with" a thing "on it" follows: the thing belongs to the noun before."""
        j = i + 1
        while self._kind(j) in {"thing", "other_noun", "comma", "conjunction", "adverb", "other", "attribute"}:
            j += 1
            if j < len(self.items) and self.items[j].kind == "preposition" and self.items[j].token.can("of"):
                j += 1
        following = self._item(j + 1)
        return self._kind(j) == "preposition" and following is not None and following.word in {"it", "them"}

    # -- others --------------------------------------------------------------------------------------------------

    def _attribute(self, i: int) -> int:
        item = self.items[i]
        j = self._before(i)
        while self._kind(j) in {"attribute", "conjunction", "comma"} and any(
            self._kind(n) == "auxiliary" for n in range(max(0, j - 6), j)
        ):
            j = self._before(j)
        owners = (
            self.subject if self._kind(j) in {"auxiliary", "report"} else self.last if self._kind(j) == "thing" else ()
        )
        if self._kind(j) == "auxiliary" and self._kind(self._before(j)) == "relative":
            owners = self.last
        self.attributes += [((item.start, item.end), owner) for owner in owners if owner in self.objects]
        return i + 1

    def _comma(self, i: int) -> int:
        if self.open is not None and self.open.word not in _NEAREST:
            self.open = None
        return i + 1

    def _conjunction(self, i: int) -> int:
        if self.open is not None and self.open.word not in _NEAREST:
            self.open = None
        return i + 1

    def _link(self, i: int) -> int:
        if self.items[i].word != "where":  # "close to where the man stands"
            self.open = None
        return i + 1

    def _relative(self, i: int) -> int:
        self.open = None
        return i + 1


def _is_visible(token: Token) -> bool:
    word = token.word
    if word in lists.INVISIBLE_VERBS or word in lists.REPORT_VERBS:
        return False
    if token.can("attribute"):
        return True
    return word.endswith("ing") or (
        token.can("finite") and not token.can("participle") and word in lists.FINITE_VERBS - _STATIC
    )


_STATIC = frozenset(
    """reads read has have had include includes contain contains consists feature features shows offers
    houses makes make does share shares""".split()
)
