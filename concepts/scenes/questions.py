"""Questions about a scene, with exact answers: existence, color, size, relation, position and caption.

Existence questions have POPE's wording. Nouns are unique in a scene, so "the apple" is unambiguous.
"""

from __future__ import annotations

from concepts.annotated_object import AnnotatedObject
from concepts.concept import Concept
from concepts.nouns import article, existence_question
from concepts.question import YES_NO, Question, yes_or_no
from concepts.scenes.distributions import TYPICAL
from concepts.scenes.icons import COLORS, NOUNS
from concepts.scenes.scene import RELATIONS, SIDE, Scene
from concepts.schema import Example

COLOR_ANSWERS = tuple(COLORS)
THIRDS = {"column": ("left", "middle", "right"), "row": ("top", "middle", "bottom")}


def existence(scene: Scene, noun: str) -> Question:
    """Return the question whether an object is in the image.

    Examples
    --------
    >>> import groundscope as gs
    >>> scene = gs.scenes.dataset(10)[0].image
    >>> question = gs.scenes.questions.existence(scene, "dog")
    >>> question.text, question.answer, question.candidates
    ('Is there a dog in the image?', 'no', ('yes', 'no'))
    """
    item = scene.get(noun)
    return Question(
        existence_question(noun),
        yes_or_no(item is not None),
        YES_NO,
        "object",
        "existence",
        item.id if item else None,
        {"object:named": item is not None},
    )


def _attribute_labels(item: AnnotatedObject) -> dict[str, bool]:
    labels = {str(Concept("attribute", c)): item.attributes["color"] == c for c in COLORS}
    labels["attribute:big"] = item.attributes["size"] == "big"
    return labels


def color(scene: Scene, item: AnnotatedObject, name: str) -> Question:
    """Return the question whether an object has a color; the prior answer is that of its typical color.

    Examples
    --------
    >>> import groundscope as gs
    >>> scene = gs.scenes.dataset(10)[0].image
    >>> first, *others = scene.objects
    >>> gs.scenes.questions.color(scene, first, first.attributes["color"]).answer
    'yes'
    """
    truth = item.attributes["color"] == name
    typical = TYPICAL.get(item.noun)
    return Question(
        f"Is the {item.noun} {name}?",
        yes_or_no(truth),
        YES_NO,
        "attribute",
        "color",
        item.id,
        {**_attribute_labels(item), "attribute:named": truth},
        yes_or_no(typical[0] == name) if typical else None,
    )


def what_color(scene: Scene, item: AnnotatedObject) -> Question:
    """Return the question which color an object has; the prior answer is its typical color.

    Examples
    --------
    >>> import groundscope as gs
    >>> scene = gs.scenes.dataset(10)[0].image
    >>> first, *others = scene.objects
    >>> question = gs.scenes.questions.what_color(scene, first)
    >>> question.answer == first.attributes["color"]
    True
    """
    typical = TYPICAL.get(item.noun)
    return Question(
        f"What color is the {item.noun}?",
        item.attributes["color"],
        COLOR_ANSWERS,
        "attribute",
        "what_color",
        item.id,
        _attribute_labels(item),
        typical[0] if typical else None,
    )


def size(scene: Scene, item: AnnotatedObject, name: str) -> Question:
    """Return the question whether an object is ``big`` or ``small``.

    Examples
    --------
    >>> import groundscope as gs
    >>> scene = gs.scenes.dataset(10)[0].image
    >>> first, *others = scene.objects
    >>> gs.scenes.questions.size(scene, first, first.attributes["size"]).answer
    'yes'
    """
    truth = item.attributes["size"] == name
    return Question(
        f"Is the {item.noun} {name}?",
        yes_or_no(truth),
        YES_NO,
        "attribute",
        "size",
        item.id,
        {**_attribute_labels(item), "attribute:named": truth},
    )


def relation(scene: Scene, first: AnnotatedObject, second: AnnotatedObject, name: str) -> Question | None:
    """Return the question whether `first` has a relation to `second`; None if the relation is not defined (`Scene.relation`).

    Examples
    --------
    >>> import groundscope as gs
    >>> example = next(e for e in gs.scenes.dataset(10) if e.kind == "relation")
    >>> first, second = example.image.objects[:2]
    >>> question = gs.scenes.questions.relation(example.image, first, second, "left of")
    >>> question is None or question.candidates == ("yes", "no")
    True
    """
    truth = scene.relation(first, second, name)
    if truth is None:
        return None
    labels = {f"relation:{r}": bool(t) for r in RELATIONS if (t := scene.relation(first, second, r)) is not None}
    return Question(
        f"Is the {first.noun} {name} the {second.noun}?",
        yes_or_no(truth),
        YES_NO,
        "relation",
        "relation",
        first.id,
        {**labels, "relation:named": truth},
    )


def place(scene: Scene, item: AnnotatedObject, axis: str) -> Question:
    """Return the question which third of the image, by ``column`` or ``row``, contains an object's center; used in training.

    Examples
    --------
    >>> import groundscope as gs
    >>> scene = gs.scenes.dataset(10)[0].image
    >>> first, *others = scene.objects
    >>> gs.scenes.questions.place(scene, first, "column").candidates
    ('left', 'middle', 'right')
    """
    coordinate = item.require_box().center[0 if axis == "column" else 1]
    words = THIRDS[axis]
    return Question(
        f"Which {axis} is the {item.noun} in?",
        words[min(2, int(coordinate * 3 / SIDE))],
        words,
        "relation",
        "place",
        item.id,
    )


def caption(scene: Scene) -> Question:
    """Return the request for a description; the reference names each object with its color, from left to right.

    Examples
    --------
    >>> import groundscope as gs
    >>> scene = gs.scenes.dataset(10)[0].image
    >>> first, *others = scene.objects
    >>> gs.scenes.questions.caption(scene).text
    'Describe the image.'
    """
    objects = sorted(scene.objects, key=lambda o: o.require_box().center)
    parts = [f"{article(o.attributes['color'])} {o.attributes['color']} {o.noun}" for o in objects]
    text = ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else "".join(parts)
    return Question("Describe the image.", f"{text}.", (), "object", "caption")


def as_example(scene: Scene, question: Question, split: str, group: str | None = None) -> Example:
    """Return a scene and a question as an example, labeled with the presence of each of the 24 nouns.

    Parameters
    ----------
    scene, question
        The image, and a question about it.
    split
        Test condition of the example.
    group
        Group of the example; by default the scene's id.

    Examples
    --------
    >>> import groundscope as gs
    >>> scene = gs.scenes.dataset(10)[0].image
    >>> first, *others = scene.objects
    >>> question = gs.scenes.questions.existence(scene, first.noun)
    >>> example = gs.scenes.questions.as_example(scene, question, "neutral")
    >>> example.answer, example.split
    ('yes', 'neutral')
    """
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
