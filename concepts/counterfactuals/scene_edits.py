"""Pairs from icon scenes: the scene is drawn again with one object, color or relation changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from concepts.counterfactual_pair import CounterfactualPair
from concepts.question import Question
from concepts.scenes import questions
from concepts.scenes.distributions import COLOR_NAMES
from concepts.scenes.scene import RELATIONS, Scene
from concepts.schema import ConceptDataset, Example


def object_pairs(data: ConceptDataset) -> Iterator[CounterfactualPair]:
    """Yield pairs of existence questions: the object is removed, or the absent one replaces the last object of the scene."""
    for example in data:
        scene = example.image
        if not isinstance(scene, Scene) or example.kind != "existence":
            continue
        noun = example.question.removesuffix(" in the image?").rsplit(" ", 1)[-1]
        if example.answer == "yes":
            edited, change = scene.without(noun), f"{noun} removed"
        else:
            old = scene.objects[-1].noun
            edited, change = scene.replaced(old, noun), f"{old} -> {noun}"
        yield from _pair(example, edited, questions.existence(edited, noun), "object", change)


def color_pairs(data: ConceptDataset) -> Iterator[CounterfactualPair]:
    """Yield pairs of color questions: the object gets another color."""
    for example in data:
        scene, subject = example.image, example.named_object()
        if not isinstance(scene, Scene) or subject is None or example.kind not in {"color", "what_color"}:
            continue
        true_color = subject.attributes["color"]
        question_color = example.question.rstrip("?").rsplit(" ", 1)[-1]
        if example.kind == "color" and example.answer == "no":
            new_color = question_color
        else:
            # The next color of the list: a fixed choice, so that pairs do not depend on a random seed.
            new_color = COLOR_NAMES[(COLOR_NAMES.index(true_color) + 1) % len(COLOR_NAMES)]
        edited = scene.recolored(subject.noun, new_color)
        recolored = edited.get(subject.noun) or subject
        question = (
            questions.what_color(edited, recolored)
            if example.kind == "what_color"
            else questions.color(edited, recolored, question_color)
        )
        yield from _pair(example, edited, question, "color", f"{subject.noun}: {true_color} -> {new_color}")


def relation_pairs(data: ConceptDataset) -> Iterator[CounterfactualPair]:
    """Yield pairs of relation questions: the scene is mirrored along the axis of the relation."""
    for example in data:
        scene, subject = example.image, example.named_object()
        if not isinstance(scene, Scene) or subject is None or example.kind != "relation":
            continue
        name = next(relation for relation in RELATIONS if f" {relation} the " in example.question)
        axis, _ = RELATIONS[name]
        edited = scene.mirrored(axis)
        first, second = edited.get(subject.noun), edited.get(example.question.rstrip("?").rsplit(" ", 1)[-1])
        if first is None or second is None:
            continue
        question = questions.relation(edited, first, second, name)
        if question is not None:
            change = f"mirrored {'left-right' if axis == 0 else 'up-down'}"
            yield from _pair(example, edited, question, "relation", change)


def _pair(clean: Example, edited: Scene, question: Question, kind: str, change: str) -> Iterator[CounterfactualPair]:
    """Yield the pair of an example and an edited scene, if their true answers differ."""
    if question.answer == clean.answer:
        return
    corrupt = questions.as_example(edited, question, clean.split, group=clean.group)
    yield CounterfactualPair(clean, replace(corrupt, id=f"{clean.id}|{change}", prefix=clean.prefix), kind, change)
