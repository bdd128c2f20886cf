"""What the annotations of a data set say of an image: objects, attributes, relations, and what is certainly absent."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from concepts.annotated_object import AnnotatedObject
from concepts.image_source import ImageSource
from concepts.nouns import PresentNouns, asked_noun, canonical_noun
from concepts.reading.annotation_questions import SPELLINGS, relation_name
from concepts.schema import ConceptDataset, Example


@dataclass(frozen=True)
class ImageAnnotation:
    """The annotations of one image.

    Examples
    --------
    >>> import groundscope as gs
    >>> dog = gs.AnnotatedObject("1", "dog", None, {"color": "brown"})
    >>> image = gs.ImageAnnotation("image 1", (dog,), absent=("cat",))
    >>> image.states_presence("puppy"), image.states_presence("cat"), image.states_presence("tree")
    (True, False, None)
    """

    id: str
    """The image: group of its questions."""
    objects: tuple[AnnotatedObject, ...] = ()
    present: tuple[str, ...] = ()
    """Further nouns of objects that are in the image."""
    absent: tuple[str, ...] = ()
    """Nouns of objects that are certainly not in the image."""
    relations: tuple[tuple[str, str, str, bool], ...] = ()
    """Subject noun, relation, object noun, and whether it is true."""

    @cached_property
    def _present(self) -> PresentNouns:
        return PresentNouns([*(o.noun for o in self.objects), *self.present])

    @cached_property
    def _absent(self) -> frozenset[str]:
        return frozenset(canonical_noun(noun) for noun in self.absent)

    def states_presence(self, noun: str) -> bool | None:
        """Return whether an object is in the image; None if the annotation does not say.

        A noun is present if it may name an annotated object (`concepts.nouns.PresentNouns`: another number, a
        synonym, or a broader or narrower term), and absent if it or its synonym is listed as absent and it is not
        present.
        """
        if self._present.includes(noun):
            return True
        words = canonical_noun(noun).split()
        names = {canonical_noun(noun), canonical_noun(words[-1])} if words else set()
        return False if names & self._absent else None

    def named(self, noun: str) -> tuple[AnnotatedObject, ...]:
        """Return the annotated objects that a noun may name."""
        return tuple(o for o in self.objects if PresentNouns([o.noun]).includes(noun))


def image_annotations(data: ConceptDataset) -> dict[str, ImageAnnotation]:
    """Collect what a data set says of each image, from the objects of its examples, their labels and its yes-no questions.

    - Objects, with attributes and boxes, are those of the examples.
    - Labels ``object:<noun>`` and questions about existence say what is present and absent; a data set whose labels are closed
      (COCO's categories, icon scenes) has one for each noun, so that every listed object that is missing is absent.
    - Questions "Is the A <relation> the B?" say which relations are true and false.

    Returns
    -------
    dict
        Group (image) to its annotation, in the order of the data; that of its first image, if a group has several.

    Examples
    --------
    >>> import groundscope as gs
    >>> data = gs.scenes.dataset(10)
    >>> image = gs.image_annotations(data)[data[0].group]
    >>> sorted(o.noun for o in image.objects), image.states_presence("apple"), image.states_presence("zebra")
    (['airplane', 'banana', 'chair'], False, None)
    """
    first: dict[str, ImageAnnotation] = {}
    for examples in examples_by_image(data):
        if examples[0].group not in first:
            first[examples[0].group] = annotation_of(examples)
    return first


def examples_by_image(data: Iterable[Example]) -> list[list[Example]]:
    """Return the examples of each image; a group can have several images, such as counterfactual variants.

    Examples
    --------
    >>> import groundscope as gs
    >>> from behavior.free_text.annotations import examples_by_image
    >>> data = gs.scenes.dataset(10)
    >>> sum(map(len, examples_by_image(data))) == len(data)
    True
    """
    rows: dict[tuple[str, Hashable], list[Example]] = {}
    for example in data:
        rows.setdefault((example.group, _key(example.image)), []).append(example)
    return list(rows.values())


def _key(image: ImageSource) -> Hashable:
    """Return a key that is equal for equal images: the source itself, since an identity can need the digest of a file."""
    try:
        hash(image)
    except TypeError:
        return image.identity
    return image


def annotation_of(examples: Sequence[Example]) -> ImageAnnotation:
    """Return what the examples of one image say of it; its id is their group.

    Examples
    --------
    >>> import groundscope as gs
    >>> from behavior.free_text.annotations import annotation_of, examples_by_image
    >>> annotation_of(examples_by_image(gs.scenes.dataset(10))[0]).id
    's0-0'
    """
    collector = _Collector(examples[0].group)
    for example in examples:
        collector.add(example)
    return collector.annotation()


class _Collector:
    def __init__(self, group: str) -> None:
        self.group = group
        self.objects: dict[str, AnnotatedObject] = {}
        self.facts: dict[str, bool] = {}
        self.relations: dict[tuple[str, str, str], bool] = {}
        self._seen: set[int] = set()

    def add(self, example: Example) -> None:
        self.objects |= {o.id: o for o in example.objects if o.id not in self.objects}
        if id(example.labels) not in self._seen:
            self._seen.add(id(example.labels))
            self._add_labels(example.labels)
        if set(example.candidates) != {"yes", "no"}:
            return
        noun = asked_noun(example.question)
        if noun is not None:
            self.facts[noun] = example.answer == "yes"
        relation = asked_relation(example.question)
        if relation is not None:
            self.relations[relation] = example.answer == "yes"

    def _add_labels(self, labels: Mapping[str, bool | float]) -> None:
        for name, value in labels.items():
            if name.startswith("object:") and name != "object:named" and isinstance(value, bool):
                self.facts.setdefault(name.removeprefix("object:"), value)

    def annotation(self) -> ImageAnnotation:
        return ImageAnnotation(
            self.group,
            tuple(self.objects.values()),
            tuple(noun for noun, truth in self.facts.items() if truth),
            tuple(noun for noun, truth in self.facts.items() if not truth),
            tuple((*relation, truth) for relation, truth in self.relations.items()),
        )


def asked_relation(question: str) -> tuple[str, str, str] | None:
    """Return subject, relation and object of a question "Is the A <relation> the B?"; None for other questions.

    Examples
    --------
    >>> from behavior.free_text.annotations import asked_relation
    >>> asked_relation("Is the dog to the left of the chair?"), asked_relation("Is the dog brown?")
    (('dog', 'to the left of', 'chair'), None)
    """
    match = re.fullmatch(r"(?:Is|Are) the (.+) the (.+?)\?", question.strip())
    if match is None:
        return None
    words = match[1].split()
    for start in range(1, len(words)):
        relation = " ".join(words[start:])
        name = relation_name(relation)
        if name is not None:
            return " ".join(words[:start]), name, match[2]
    return None


def color_of(word: str) -> str | None:
    """Return the color that a word names, one of `concepts.reading.annotation_questions.COLORS`; None for other words.

    Examples
    --------
    >>> from behavior.free_text.annotations import color_of
    >>> color_of("grey"), color_of("dark blue"), color_of("wooden")
    ('gray', 'blue', None)
    """
    return SPELLINGS.get(word.lower().split()[-1]) if word.split() else None
