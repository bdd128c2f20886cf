"""Yes-no questions about annotated images: existence of objects, their attributes, and relations and actions of two objects.

Questions come in pairs, one with the answer yes and one with the answer no. Existence questions have POPE's wording, with the
number and article of the noun. Only questions with a certain answer are made:

- color: about an object whose noun, in singular or plural, is unique in the image, and that has exactly one color;
- other attributes: about such an object, with a value that excludes another (`concepts.reading.exclusive_values`);
- relation: about two such objects, in a relation that has an opposite;
- action: about two such objects, where one does something with the other that excludes another action;
- existence: the absent noun names no annotated object, in any number and by any synonym (`concepts.nouns.PresentNouns`).

All others are counted by reason.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from concepts.annotated_object import AnnotatedObject
from concepts.concept import Level
from concepts.image_files import FileImage
from concepts.nouns import PresentNouns, canonical_noun, existence_question, is_the, number, singular
from concepts.question import YES_NO, yes_or_no
from concepts.reading.exclusive_values import (
    ACTION_NAMES,
    ACTIONS,
    ANTONYMS,
    EXCLUSIVE,
    alternatives,
    attribute_kinds,
)
from concepts.schema import Example

ATTRIBUTE_KINDS = (*EXCLUSIVE, *ANTONYMS)
"""Kinds of attributes other than ``color``."""
UNUSED_ATTRIBUTES = "attributes that are not colors and exclude no other"
_UNPAIRED = "present objects without an absent object for a pair of questions"
COLORS = tuple("red orange yellow green blue purple pink brown black white gray".split())
SPELLINGS: Mapping[str, str] = MappingProxyType({"grey": "gray", "violet": "purple", **{c: c for c in COLORS}})
"""Color word of an annotation to the color."""
_PAIRS = (
    ("to the left of", "to the right of"),
    ("in front of", "behind"),
    ("above", "below"),
    ("on top of", "under"),
    ("inside", "outside"),
)
OPPOSITES: Mapping[str, str] = MappingProxyType({a: b for pair in _PAIRS for a, b in (pair, pair[::-1])})
"""Relation to its opposite, which is false whenever the relation is true."""
RELATION_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **{name: name for name in OPPOSITES},
        "left of": "to the left of",
        "left": "to the left of",
        "right of": "to the right of",
        "right": "to the right of",
        "front": "in front of",
        "beneath": "below",
        "underneath": "under",
        "in back of": "behind",
    }
)
"""Relation word of an annotation to the relation."""


class PresenceLabels(Mapping[str, bool]):
    """Labels of a closed vocabulary, computed on access: for each noun, whether the image contains it; and one more label."""

    __slots__ = ("_extra", "_object_of_label", "_present")

    def __init__(self, object_of_label: Mapping[str, str], present: frozenset[str], extra: tuple[str, bool]) -> None:
        self._object_of_label, self._present, self._extra = object_of_label, present, extra

    def __getitem__(self, key: str) -> bool:
        if key == self._extra[0]:
            return self._extra[1]
        return self._object_of_label[key] in self._present

    def __iter__(self) -> Iterator[str]:
        yield from self._object_of_label
        yield self._extra[0]

    def __len__(self) -> int:
        return len(self._object_of_label) + 1


@dataclass(frozen=True, slots=True)
class AnnotatedImage:
    """The annotations of one image."""

    id: str
    image: FileImage
    objects: tuple[AnnotatedObject, ...]
    """In the order of the file."""
    relations: tuple[tuple[str, str, str], ...] = ()
    """Id of the first object, one of `OPPOSITES` or of `concepts.reading.exclusive_values.ACTIONS`, id of the second object."""
    absent: tuple[str, ...] | None = None
    """Nouns of objects that are certainly absent; None if every noun is that no annotated object has."""


@dataclass(frozen=True)
class QuestionMaker:
    """Makes the questions of one dataset, and counts in `left_out` those that are not made."""

    nouns: tuple[str, ...]
    """Nouns for questions about absent objects."""
    per_image: int
    """Maximum number of question pairs for an image about existence, colors, other attributes, relations and actions each."""
    seed: int
    left_out: Counter[str]
    """Number of questions that are not made, by reason."""
    object_of_label: Mapping[str, str] | None = None
    """Label ``object:<noun>`` to the canonical noun, if all objects of these nouns are annotated in all images: each example
    then has all of these labels."""
    unpaired: list[Example] = field(default_factory=list)
    """Questions about present objects for which no absent object is left."""

    def make(self, images: Iterable[AnnotatedImage]) -> list[Example]:
        """Return the questions of all images; if there is no question with the answer no, those with the answer yes."""
        examples = [e for image in images for e in self.questions(image)]
        if examples:
            return examples
        self.left_out[_UNPAIRED] -= len(self.unpaired)
        return self.unpaired

    def questions(self, image: AnnotatedImage) -> Iterator[Example]:
        """Yield the questions of an image; random choices depend only on the seed and the image's id."""
        rng = random.Random(f"{self.seed}/{image.id}")
        if not image.objects:
            self.left_out["images without objects"] += 1
            return
        yield from self._existence(image, rng)
        counts = Counter(singular(o.noun) for o in image.objects)
        unique = {o.id: o for o in image.objects if counts[singular(o.noun)] == 1}
        yield from self._colors(image, unique, rng)
        yield from self._relations(image, unique, rng)
        yield from self._attributes(image, unique, rng)
        yield from self._actions(image, unique, rng)

    def _existence(self, image: AnnotatedImage, rng: random.Random) -> Iterator[Example]:
        first_of_noun = {o.noun: o for o in reversed(image.objects)}
        present = frozenset(map(canonical_noun, first_of_noun))
        nouns = dict.fromkeys(o.noun for o in image.objects)
        objects = tuple(first_of_noun[noun] for noun in nouns)[: self.per_image]
        absent = _sample_nouns(
            self.nouns if image.absent is None else image.absent,
            PresentNouns(first_of_noun).includes,
            len(objects),
            rng,
        )
        self.left_out[_UNPAIRED] += len(objects) - len(absent)

        def about(item: AnnotatedObject) -> Example:
            return self._example(image, item.noun, "object", "existence", item.noun, True, item.id, present)

        for item, noun in zip(objects, absent, strict=False):
            yield about(item)
            yield self._example(image, noun, "object", "existence", noun, False, None, present)
        self.unpaired.extend(about(item) for item in objects[len(absent) :])

    def _colors(
        self, image: AnnotatedImage, unique: Mapping[str, AnnotatedObject], rng: random.Random
    ) -> Iterator[Example]:
        colored = [o for o in image.objects if "color" in o.attributes]
        for item in [o for o in colored if o.id in unique][: self.per_image]:
            true_color = item.attributes["color"]
            other_color = rng.choice([c for c in COLORS if c != true_color])
            for color in (true_color, other_color):
                text = f"{is_the(item.noun)} {color}?"
                yield self._example(image, text, "attribute", "color", true_color, color == true_color, item.id)
        self.left_out["colors of objects whose noun is not unique"] += sum(o.id not in unique for o in colored)

    def _relations(
        self, image: AnnotatedImage, unique: Mapping[str, AnnotatedObject], rng: random.Random
    ) -> Iterator[Example]:
        every = [r for r in image.relations if r[1] in OPPOSITES]
        relations = [r for r in dict.fromkeys(every) if r[0] in unique and r[2] in unique and r[0] != r[2]]
        self.left_out["relations of objects whose noun is not unique"] += len(every) - len(relations)
        # If both a relation and its opposite are annotated, neither is certain.
        annotated = set(relations)
        certain = [
            (a, name, b)
            for a, name, b in relations
            if (a, OPPOSITES[name], b) not in annotated and (b, name, a) not in annotated
        ]
        self.left_out["relations that contradict another"] += len(relations) - len(certain)
        for first, name, second in rng.sample(certain, min(self.per_image, len(certain))):
            for relation in (name, OPPOSITES[name]):
                text = f"{is_the(unique[first].noun)} {relation} the {unique[second].noun}?"
                yield self._example(image, text, "relation", "relation", name, relation == name, first)

    def _attributes(
        self, image: AnnotatedImage, unique: Mapping[str, AnnotatedObject], rng: random.Random
    ) -> Iterator[Example]:
        every = [
            (o, kind, o.attributes[kind])
            for o in image.objects
            for kind in ATTRIBUTE_KINDS
            if kind in o.attributes and (kind != "count" or number(o.noun) == "plural")
        ]
        certain = [(o, kind, value) for o, kind, value in every if o.id in unique]
        self.left_out["attributes of objects whose noun is not unique"] += len(every) - len(certain)
        for item, kind, value in rng.sample(certain, min(self.per_image, len(certain))):
            others = alternatives(kind, value, item.noun)
            labels = {f"attribute:{value}": True, **{f"attribute:{other}": False for other in others}}
            for named_value in (value, rng.choice(others)):
                text = attribute_question(kind, named_value, item.noun)
                yield self._example(image, text, "attribute", kind, value, named_value == value, item.id, labels=labels)

    def _actions(
        self, image: AnnotatedImage, unique: Mapping[str, AnnotatedObject], rng: random.Random
    ) -> Iterator[Example]:
        every = [r for r in image.relations if r[1] in ACTIONS]
        actions = [r for r in dict.fromkeys(every) if r[0] in unique and r[2] in unique and r[0] != r[2]]
        self.left_out["actions of objects whose noun is not unique"] += len(every) - len(actions)
        annotated = set(actions)
        certain = [(a, name, b) for a, name, b in actions if not any((a, o, b) in annotated for o in ACTIONS[name])]
        self.left_out["actions that contradict another"] += len(actions) - len(certain)
        for first, name, second in rng.sample(certain, min(self.per_image, len(certain))):
            labels = {f"relation:{name}": True, **{f"relation:{other}": False for other in ACTIONS[name]}}
            for action in (name, rng.choice(ACTIONS[name])):
                text = f"{is_the(unique[first].noun)} {action} the {unique[second].noun}?"
                yield self._example(image, text, "relation", "action", name, action == name, first, labels=labels)

    def _example(
        self,
        image: AnnotatedImage,
        text: str,
        level: Level,
        kind: str,
        value: str,
        truth: bool,
        subject: str | None,
        present: frozenset[str] = frozenset(),
        labels: Mapping[str, bool] | None = None,
    ) -> Example:
        """Return a question; `value` is the noun, true color or true relation, `present` the canonical present nouns."""
        if labels is not None:
            labels = {**labels, f"{level}:named": truth}
        elif level == "attribute":
            labels = {**{f"attribute:{c}": c == value for c in COLORS}, "attribute:named": truth}
        elif level == "relation":
            labels = {f"relation:{value}": True, f"relation:{OPPOSITES[value]}": False, "relation:named": truth}
        elif self.object_of_label is not None:
            labels = PresenceLabels(self.object_of_label, present, ("object:named", truth))
        else:
            labels = {f"object:{value}": truth, "object:named": truth}
        return Example(
            id=f"{image.id}/{text}",
            image=image.image,
            question=existence_question(text) if kind == "existence" else text,
            answer=yes_or_no(truth),
            candidates=YES_NO,
            level=level,
            kind=kind,
            split="random" if kind == "existence" else "neutral",
            group=image.image.name,
            labels=labels,
            objects=image.objects,
            subject=subject,
        )


def _sample_nouns(
    nouns: Sequence[str], is_excluded: Callable[[str], bool], count: int, rng: random.Random
) -> list[str]:
    """Draw up to `count` nouns that are not excluded and name different objects, with equal probability."""
    sample: dict[str, str] = {}
    for _ in range(20 * count if nouns else 0):  # rejection sampling is nearly always enough; the rest is exact
        noun = rng.choice(nouns)
        if not is_excluded(noun):
            sample.setdefault(canonical_noun(noun), noun)
        if len(sample) == count:
            return list(sample.values())
    remaining: dict[str, str] = {}
    for noun in nouns:
        if not is_excluded(noun) and canonical_noun(noun) not in sample:
            remaining.setdefault(canonical_noun(noun), noun)
    return [*sample.values(), *rng.sample(list(remaining.values()), min(count - len(sample), len(remaining)))]


def attributes_of(words: Sequence[str], left_out: Counter[str], noun: str = "") -> dict[str, str]:
    """Return the attributes of an object from its annotated words.

    A color is stored under ``color`` if the object has exactly one; a value that excludes others under its kind, such as
    ``material`` or ``size`` (`concepts.reading.exclusive_values`); and every word that is not a color also under its own name.

    Parameters
    ----------
    words
        Words in lower case.
    left_out
        Counts the words that are neither, and the objects with several colors.
    noun
        The noun of the object.

    Examples
    --------
    >>> from collections import Counter
    >>> from concepts.reading.annotation_questions import attributes_of
    >>> attributes_of(["grey", "wooden"], Counter(), "table")
    {'wooden': 'wooden', 'material': 'wooden', 'color': 'gray'}
    """
    colors = {SPELLINGS[word] for word in words if word in SPELLINGS}
    others = {word: word for word in words if word not in SPELLINGS}
    kinds = attribute_kinds(words, noun)
    left_out[UNUSED_ATTRIBUTES] += max(len(others) - len(kinds), 0)
    if len(colors) > 1:
        left_out["objects with several colors"] += 1
    return {**others, **kinds, **({"color": colors.pop()} if len(colors) == 1 else {})}


def relation_name(word: str) -> str | None:
    """Return the relation or action that a word of an annotation names, or None if it has no opposite.

    >>> from concepts.reading.annotation_questions import relation_name
    >>> relation_name("left"), relation_name("wears"), relation_name("near")
    ('to the left of', 'wearing', None)
    """
    return RELATION_NAMES.get(word) or ACTION_NAMES.get(word)


def attribute_question(kind: str, value: str, noun: str) -> str:
    """Return the question whether an object has an attribute.

    >>> from concepts.reading.annotation_questions import attribute_question
    >>> attribute_question("material", "wooden", "table"), attribute_question("count", "two", "dogs")
    ('Is the table wooden?', 'Are there two dogs in the image?')
    """
    if kind == "count":
        return f"Are there {value} {noun} in the image?"
    return f"{is_the(noun)} {value}?"
