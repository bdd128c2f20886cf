"""Questions about a scene, with exact answers: existence, attribute, relation, caption.

Wording follows POPE where it has one. Nouns are unique in a scene, so "the apple" is never ambiguous.
"""

from __future__ import annotations

from concepts.nouns import article, existence_question
from concepts.scenes.distributions import TYPICAL
from concepts.scenes.icons import COLORS, NOUNS
from concepts.scenes.scene import RELATIONS, SIDE, Scene
from concepts.schema import Concept, Example, Question, SceneObject

YES_NO = ("yes", "no")
COLOR_ANSWERS = tuple(COLORS)
THIRDS = {"column": ("left", "middle", "right"), "row": ("top", "middle", "bottom")}


def _yes(truth: bool) -> str:
    return YES_NO[0] if truth else YES_NO[1]


def existence(scene: Scene, noun: str) -> Question:
    """Ask whether a noun is in the image, in the words of POPE."""
    thing = scene.get(noun)
    return Question(
        existence_question(noun),
        _yes(thing is not None),
        YES_NO,
        "object",
        "existence",
        thing.id if thing else None,
        {"object:named": thing is not None},
    )


def _attribute_labels(thing: SceneObject) -> dict[str, bool]:
    labels = {str(Concept("attribute", c)): thing.attributes["color"] == c for c in COLORS}
    labels["attribute:big"] = thing.attributes["size"] == "big"
    return labels


def color(scene: Scene, thing: SceneObject, name: str) -> Question:
    """Ask whether an object has a color."""
    truth = thing.attributes["color"] == name
    typical = TYPICAL.get(thing.noun)
    return Question(
        f"Is the {thing.noun} {name}?",
        _yes(truth),
        YES_NO,
        "attribute",
        "color",
        thing.id,
        {**_attribute_labels(thing), "attribute:named": truth},
        _yes(typical[0] == name) if typical else None,
    )


def what_color(scene: Scene, thing: SceneObject) -> Question:
    """Ask for an object's color."""
    typical = TYPICAL.get(thing.noun)
    return Question(
        f"What color is the {thing.noun}?",
        thing.attributes["color"],
        COLOR_ANSWERS,
        "attribute",
        "what_color",
        thing.id,
        _attribute_labels(thing),
        typical[0] if typical else None,
    )


def size(scene: Scene, thing: SceneObject, name: str) -> Question:
    """Ask whether an object is ``big`` or ``small``."""
    truth = thing.attributes["size"] == name
    return Question(
        f"Is the {thing.noun} {name}?",
        _yes(truth),
        YES_NO,
        "attribute",
        "size",
        thing.id,
        {**_attribute_labels(thing), "attribute:named": truth},
    )


def relation(scene: Scene, first: SceneObject, second: SceneObject, name: str) -> Question | None:
    """Ask whether `first` is in a relation to `second`; None where the scene leaves it ambiguous."""
    truth = scene.relation(first, second, name)
    if truth is None:
        return None
    labels = {f"relation:{r}": bool(t) for r in RELATIONS if (t := scene.relation(first, second, r)) is not None}
    return Question(
        f"Is the {first.noun} {name} the {second.noun}?",
        _yes(truth),
        YES_NO,
        "relation",
        "relation",
        first.id,
        {**labels, "relation:named": truth},
    )


def place(scene: Scene, thing: SceneObject, axis: str) -> Question:
    """Ask in which third of the image (``column`` or ``row``) an object's centre lies; used in training."""
    along = thing.require_box().center[0 if axis == "column" else 1]
    words = THIRDS[axis]
    return Question(
        f"Which {axis} is the {thing.noun} in?",
        words[min(2, int(along * 3 / SIDE))],
        words,
        "relation",
        "place",
        thing.id,
    )


def caption(scene: Scene) -> Question:
    """Ask for a description; the reference names every object with its color, left to right."""
    things = sorted(scene.objects, key=lambda o: o.require_box().center)
    parts = [f"{article(o.attributes['color'])} {o.attributes['color']} {o.noun}" for o in things]
    text = ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else "".join(parts)
    return Question("Describe the image.", f"{text}.", (), "object", "caption")


def as_example(scene: Scene, question: Question, split: str, group: str | None = None) -> Example:
    """Join a scene and a question; the labels say of every noun whether it is in the image."""
    present = {o.noun for o in scene.objects}
    nouns = {f"object:{noun}": noun in present for noun in NOUNS}
    return Example(
        id=f"{split}/{scene.id}/{question.text}",
        image=scene,
        question=question.text,
        answer=question.answer,
        candidates=question.candidates,
        level=question.level,
        kind=question.kind,
        split=split,
        group=group or scene.id,
        labels={**nouns, **question.labels},
        objects=scene.objects,
        subject=question.subject,
        prior_answer=question.prior_answer,
    )
