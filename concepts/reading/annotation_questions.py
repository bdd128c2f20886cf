"""Yes-no questions about annotated images: is a thing there, has it a color, how do two of them stand.

Each kind is asked in pairs, one question answered yes and one no, in the wording of POPE with the number and article of the
noun. Only what the annotation decides is asked: a thing whose name, singular or plural, is unique in the image, with exactly
one color; two such things in a relation that has an opposite; as absent a noun that means nothing annotated in the image,
whatever its number or synonym (`concepts.nouns.PresentNouns`). The rest is counted.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from concepts.image_files import FileImage
from concepts.nouns import PresentNouns, canonical_noun, existence_question, is_the, singular
from concepts.reading.assembly import YES_NO, yes_or_no
from concepts.schema import Example, Level, SceneObject

_UNPAIRED = "objects that no absent one is left to ask beside"
COLORS = tuple("red orange yellow green blue purple pink brown black white gray".split())
SPELLINGS: Mapping[str, str] = MappingProxyType({"grey": "gray", "violet": "purple", **{c: c for c in COLORS}})
"""Word of an annotation to the color it means."""
_PAIRS = (
    ("to the left of", "to the right of"),
    ("in front of", "behind"),
    ("above", "below"),
    ("on top of", "under"),
    ("inside", "outside"),
)
OPPOSITES: Mapping[str, str] = MappingProxyType({a: b for pair in _PAIRS for a, b in (pair, pair[::-1])})
"""Relation to the one that does not hold where it does."""
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
"""Word of an annotation to the relation it means."""


class Presence(Mapping[str, bool]):
    """Concept labels of a closed vocabulary: of every noun whether it is in the image, kept in a few bytes."""

    __slots__ = ("_extra", "_known", "_present")

    def __init__(self, known: Mapping[str, str], present: frozenset[str], extra: tuple[str, bool]) -> None:
        self._known, self._present, self._extra = known, present, extra

    def __getitem__(self, key: str) -> bool:
        if key == self._extra[0]:
            return self._extra[1]
        return self._known[key] in self._present

    def __iter__(self) -> Iterator[str]:
        yield from self._known
        yield self._extra[0]

    def __len__(self) -> int:
        return len(self._known) + 1


@dataclass(frozen=True, slots=True)
class Annotated:
    """What is annotated in one image."""

    id: str
    image: FileImage
    objects: tuple[SceneObject, ...]
    """In the order of the file."""
    relations: tuple[tuple[str, str, str], ...] = ()
    """Object id, one of `OPPOSITES`, object id."""


@dataclass(frozen=True)
class Asker:
    """Makes the questions of one data set."""

    nouns: tuple[str, ...]
    """What may be asked about though it is absent."""
    per_image: int
    """Pairs of questions of each level an image gets at most."""
    seed: int
    left_out: Counter[str]
    """Counts, by reason, what is not asked."""
    known: Mapping[str, str] | None = None
    """``object:<noun>`` to the thing that the noun names, where every noun is annotated in every image that shows it: each is
    then a label."""
    unpaired: list[Example] = field(default_factory=list)
    """Questions about present objects that lack an absent one to ask beside."""

    def ask(self, scenes: Iterable[Annotated]) -> list[Example]:
        """Return the questions of all images; those about present objects alone where no other question is possible."""
        examples = [e for scene in scenes for e in self.questions(scene)]
        if examples:
            return examples
        self.left_out[_UNPAIRED] -= len(self.unpaired)
        return self.unpaired

    def questions(self, scene: Annotated) -> Iterator[Example]:
        """Yield the questions of an image; what is drawn depends on the seed and the image's id alone."""
        chance = random.Random(f"{self.seed}/{scene.id}")
        if not scene.objects:
            self.left_out["images without objects"] += 1
            return
        yield from self._existence(scene, chance)
        counts = Counter(singular(o.noun) for o in scene.objects)
        alone = {o.id: o for o in scene.objects if counts[singular(o.noun)] == 1}
        yield from self._colors(scene, alone, chance)
        yield from self._relations(scene, alone, chance)

    def _existence(self, scene: Annotated, chance: random.Random) -> Iterator[Example]:
        first = {o.noun: o for o in reversed(scene.objects)}
        present = frozenset(map(canonical_noun, first))
        asked = tuple(first[noun] for noun in dict.fromkeys(o.noun for o in scene.objects))[: self.per_image]
        absent = _draw(self.nouns, PresentNouns(first).includes, len(asked), chance)
        self.left_out[_UNPAIRED] += len(asked) - len(absent)
        for one, other in zip(asked, absent, strict=False):
            yield self._asked(scene, one.noun, "object", "existence", one.noun, True, one.id, present)
            yield self._asked(scene, other, "object", "existence", other, False, None, present)
        for one in asked[len(absent) :]:
            self.unpaired.append(self._asked(scene, one.noun, "object", "existence", one.noun, True, one.id, present))

    def _colors(self, scene: Annotated, alone: Mapping[str, SceneObject], chance: random.Random) -> Iterator[Example]:
        told = [o for o in scene.objects if "color" in o.attributes]
        for one in [o for o in told if o.id in alone][: self.per_image]:
            own = one.attributes["color"]
            other = chance.choice([c for c in COLORS if c != own])
            for color in (own, other):
                text = f"{is_the(one.noun)} {color}?"
                yield self._asked(scene, text, "attribute", "color", own, color == own, one.id)
        self.left_out["colors of things whose name is not unique"] += sum(o.id not in alone for o in told)

    def _relations(
        self, scene: Annotated, alone: Mapping[str, SceneObject], chance: random.Random
    ) -> Iterator[Example]:
        possible = [r for r in dict.fromkeys(scene.relations) if r[0] in alone and r[2] in alone and r[0] != r[2]]
        self.left_out["relations of things whose name is not unique"] += len(scene.relations) - len(possible)
        # A pair annotated one way and the other decides nothing.
        held = {(a, name, b) for a, name, b in possible}
        clear = [r for r in possible if (r[0], OPPOSITES[r[1]], r[2]) not in held and (r[2], r[1], r[0]) not in held]
        self.left_out["relations that contradict another"] += len(possible) - len(clear)
        for first, name, second in chance.sample(clear, min(self.per_image, len(clear))):
            for asked in (name, OPPOSITES[name]):
                text = f"{is_the(alone[first].noun)} {asked} the {alone[second].noun}?"
                yield self._asked(scene, text, "relation", "relation", name, asked == name, first)

    def _asked(
        self,
        scene: Annotated,
        text: str,
        level: Level,
        kind: str,
        value: str,
        truth: bool,
        subject: str | None,
        present: frozenset[str] = frozenset(),
    ) -> Example:
        labels: Mapping[str, bool]
        if level == "attribute":
            labels = {**{f"attribute:{c}": c == value for c in COLORS}, "attribute:named": truth}
        elif level == "relation":
            labels = {f"relation:{value}": True, f"relation:{OPPOSITES[value]}": False, "relation:named": truth}
        elif self.known is not None:
            labels = Presence(self.known, present, ("object:named", truth))
        else:
            labels = {f"object:{value}": truth, "object:named": truth}
        return Example(
            id=f"{scene.id}/{text}",
            image=scene.image,
            question=existence_question(text) if kind == "existence" else text,
            answer=yes_or_no(truth),
            candidates=YES_NO,
            level=level,
            kind=kind,
            split="random" if kind == "existence" else "neutral",
            group=scene.image.name,
            labels=labels,
            objects=scene.objects,
            subject=subject,
        )


def _draw(nouns: Sequence[str], barred: Callable[[str], bool], count: int, chance: random.Random) -> list[str]:
    """Draw up to `count` nouns that are not barred and name different things, all equally likely."""
    drawn: dict[str, str] = {}
    for _ in range(20 * count):  # nearly always enough; below is exact
        noun = chance.choice(nouns)
        if not barred(noun):
            drawn.setdefault(canonical_noun(noun), noun)
        if len(drawn) == count:
            return list(drawn.values())
    free: dict[str, str] = {}
    for noun in nouns:
        if not barred(noun) and canonical_noun(noun) not in drawn:
            free.setdefault(canonical_noun(noun), noun)
    return [*drawn.values(), *chance.sample(list(free.values()), min(count - len(drawn), len(free)))]
