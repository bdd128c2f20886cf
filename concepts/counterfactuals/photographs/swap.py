"""Exchange a photograph for another on which the same question has another true answer.

Nothing is edited, so there are no artifacts, but more than one thing differs between two photographs. Partners are therefore
chosen by the objects that both show, and placebo pairs (two photographs with the same true answer) measure what the
exchange itself does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from concepts.annotated_object import AnnotatedObject
from concepts.counterfactual_pair import CounterfactualPair
from concepts.image_files import FileImage
from concepts.nouns import asked_noun, canonical_noun, is_the
from concepts.schema import ConceptDataset, Example

MAX_PARTNERS = 200
"""Photographs that are compared for one question, in the order of the dataset."""
_KINDS: Mapping[str, str] = {"existence": "object", "color": "color", "relation": "relation", "action": "action"}


def pair_kind(example: Example) -> str:
    """Return what changes between two images with different true answers.

    ``object``, ``color``, ``attribute`` (another than the color), ``relation`` or ``action``.
    """
    return _KINDS.get(example.kind, example.level or "")


def swap_pairs(
    data: ConceptDataset, left_out: Counter[str], kind: str, *, placebo: bool = False
) -> Iterator[CounterfactualPair]:
    """Yield pairs of two photographs of equal size under the same question, twice: either photograph is the clean one once.

    Else nearly all true answers would be "yes", because most questions about a photograph are about what it shows. Every
    photograph is in one couple at most, so that couples are independent: both examples of a pair have the group of the first
    photograph. For a photograph that a question is not asked about, the true answer follows from its labels (a noun is
    present or absent) or annotated objects (an attribute of the only such object).

    Parameters
    ----------
    data
        Examples with candidates.
    left_out
        Counts of examples without a pair, by reason; increased.
    kind
        Kind of the pairs (`pair_kind`).
    placebo
        Yield pairs with equal true answers instead.
    """
    examples = [e for e in data if e.candidates and pair_kind(e) == kind]
    index = _Index(examples, data)
    partners: dict[str, str | None] = {}
    for example in examples:
        if example.group not in partners:
            partner = index.partner(example, partners, placebo=placebo)
            if partner is None:
                left_out[index.reason(example, placebo=placebo)] += 1
                continue
            partners[example.group], partners[partner] = partner, None
        other = partners[example.group]
        answer = index.answer(example, other) if other is not None else None
        if other is None or answer is None or (answer == example.answer) is not placebo:
            left_out["questions that do not distinguish the two photographs of their couple"] += 1
            continue
        counterpart = index.counterpart(example, other, answer)
        change = f"photograph {example.group} -> {other}"
        corrupt = replace(counterpart, id=f"{example.id}|{change}", group=example.group)
        yield CounterfactualPair(example, corrupt, kind, change, "swap", placebo=placebo)
        if not placebo:
            change = f"photograph {other} -> {example.group}"
            # The id of a question that was asked about the other photograph; else that of the one it is made from.
            name = counterpart.id if index.is_asked(example, other) else f"{example.id}|{other}"
            clean = replace(counterpart, id=name, group=example.group)
            yield CounterfactualPair(clean, replace(example, id=f"{name}|{change}"), kind, change, "swap")


@dataclass(frozen=True)
class _Photograph:
    example: Example
    """Any example of the photograph; its image, objects and labels are used."""
    things: frozenset[str]
    labels: Mapping[str, bool]


class _Index:
    """The true answers to questions, by question and photograph."""

    def __init__(self, examples: list[Example], data: ConceptDataset) -> None:
        self._by_question: dict[tuple[str, str, tuple[str, ...]], dict[str, Example]] = defaultdict(dict)
        for example in examples:
            self._by_question[example.question, example.prefix, example.candidates].setdefault(example.group, example)
        labels: dict[str, dict[str, bool]] = defaultdict(dict)
        first: dict[str, Example] = {}
        for example in data:
            first.setdefault(example.group, example)
            labels[example.group].update((k, bool(v)) for k, v in example.labels.items() if k.startswith("object:"))
        self._photographs = {
            group: _Photograph(example, frozenset(canonical_noun(o.noun) for o in example.objects), labels[group])
            for group, example in first.items()
        }
        self._sizes: dict[str, tuple[int, int]] = {}

    def partner(self, example: Example, used: Mapping[str, str | None], *, placebo: bool) -> str | None:
        """Return the unused photograph of equal size, with another (placebo: the same) answer, that shares most objects."""
        own = self._photographs[example.group].things
        groups = (
            group
            for group in self._candidates(example)
            if group != example.group
            and group not in used
            and (answer := self.answer(example, group)) is not None
            and (answer == example.answer) is placebo
            and self._size(group) == self._size(example.group)
        )
        best = list(islice(groups, MAX_PARTNERS))
        return max(best, key=lambda group: _similarity(own, self._photographs[group].things), default=None)

    def reason(self, example: Example, *, placebo: bool) -> str:
        """Return why a question has no partner."""
        same = "the same" if placebo else "another"
        answers = (self.answer(example, group) for group in self._candidates(example) if group != example.group)
        if any(a is not None and (a == example.answer) is placebo for a in answers):
            return f"questions with {same} answer only on photographs of another size or in another couple"
        return f"questions without {same} answer on any other photograph"

    def _candidates(self, example: Example) -> Iterator[str]:
        own_groups = self._by_question[example.question, example.prefix, example.candidates]
        yield from own_groups
        if example.kind == "existence" or _is_attribute(example):
            yield from (group for group in self._photographs if group not in own_groups)

    def answer(self, example: Example, group: str) -> str | None:
        """Return the true answer to the example's question about another photograph; None if it is not known."""
        counterpart = self._by_question[example.question, example.prefix, example.candidates].get(group)
        if counterpart is not None:
            return counterpart.answer
        if set(example.candidates) != {"yes", "no"}:
            return None
        photograph = self._photographs[group]
        if example.kind == "existence":
            truth = photograph.labels.get(f"object:{asked_noun(example.question)}")
        elif _is_attribute(example):
            subject = self._same_thing(example, photograph)
            truth = subject.attributes[example.kind] == _asked_value(example) if subject else None
        else:
            truth = None
        return None if truth is None else "yes" if truth else "no"

    def is_asked(self, example: Example, group: str) -> bool:
        """Whether the example's question is asked about another photograph too."""
        return group in self._by_question[example.question, example.prefix, example.candidates]

    def counterpart(self, example: Example, group: str, answer: str) -> Example:
        """Return the example's question about another photograph."""
        counterpart = self._by_question[example.question, example.prefix, example.candidates].get(group)
        if counterpart is not None:
            return counterpart
        photograph = self._photographs[group]
        subject = (
            self._same_thing(example, photograph) if _is_attribute(example) else self._present(example, photograph)
        )
        return replace(
            photograph.example, question=example.question, candidates=example.candidates, answer=answer,
            level=example.level, kind=example.kind, split=example.split, subject=subject.id if subject else None,
            prior_answer=example.prior_answer, prefix=example.prefix,
            labels=_labels(example, photograph, subject, answer),
        )  # fmt: skip

    def _same_thing(self, example: Example, photograph: _Photograph) -> AnnotatedObject | None:
        """Return the only object of another photograph that is what the question is about, if its attribute is annotated."""
        own = example.named_object()
        if own is None:
            return None
        same = [o for o in photograph.example.objects if canonical_noun(o.noun) == canonical_noun(own.noun)]
        return same[0] if len(same) == 1 and example.kind in same[0].attributes else None

    def _present(self, example: Example, photograph: _Photograph) -> AnnotatedObject | None:
        noun = asked_noun(example.question)
        return next(
            (o for o in photograph.example.objects if noun and canonical_noun(o.noun) == canonical_noun(noun)), None
        )

    def _size(self, group: str) -> tuple[int, int]:
        if group not in self._sizes:
            image = self._photographs[group].example.image
            self._sizes[group] = image.header.upright_size if isinstance(image, FileImage) else image.load().size
        return self._sizes[group]


def _labels(example: Example, photograph: _Photograph, subject: AnnotatedObject | None, answer: str) -> dict[str, bool]:
    """Return the labels of the example's question about another photograph."""
    named = f"{example.level}:named"
    if example.kind == "existence":
        return {**{k: photograph.labels[k] for k in example.labels if k in photograph.labels}, named: answer == "yes"}
    value = subject.attributes[example.kind] if subject else None
    return {**{k: k == f"attribute:{value}" for k in example.labels}, named: answer == "yes"}


def _similarity(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the Jaccard index of two sets of things; 0 for two empty sets."""
    union = len(first | second)
    return len(first & second) / union if union else 0.0


def _is_attribute(example: Example) -> bool:
    """Whether the question is about an attribute that follows from an annotated object; a number of objects does not."""
    subject = example.named_object()
    return (
        example.level == "attribute"
        and example.kind != "count"
        and example.kind in (subject.attributes if subject else {})
    )


def _asked_value(example: Example) -> str:
    """Return the value of a question such as "Is the apple red?"."""
    subject, question = example.named_object(), example.question.rstrip("?")
    beginning = f"{is_the(subject.noun)} " if subject else ""
    return question.removeprefix(beginning) if question.startswith(beginning) else question.rsplit(" ", 1)[-1]
