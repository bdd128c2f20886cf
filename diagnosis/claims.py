"""Claims: the concept that a question is about, and the answers that compete."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from activation_store import ActivationStore
from concepts.concept import LEVELS, Concept
from concepts.nouns import asked_noun, singular
from concepts.object_mentions import tokenize_words
from concepts.schema import Example

_YES_NO = {"yes", "no"}


@dataclass(frozen=True)
class Claim:
    """A row of a store as a choice between the true answer and others."""

    row: int
    id: str
    group: str
    kind: str
    """Level and kind of the question, ``attribute what_color``."""
    level: str
    concept: str
    """Concept of the question, ``attribute:red``; of an open question, its true answer; empty if no label matches."""
    holds: bool
    """Whether the statement of the question is true of the image."""
    yes_no: bool
    truth: str
    model_answer: str
    rivals: tuple[str, ...]
    """Concepts of the other answers; for a wrong answer that of the model's answer. Empty for yes or no."""
    nouns: tuple[str, ...]
    """Concepts of the objects that the question names, in its order: two for a relation, one for an attribute; else empty."""
    margin: float
    """The model's log-odds of the truth against the best other answer; negative for a wrong answer."""
    opposite: str = ""
    """Value in the question, ``small``, if only its single alternative has a label; that alternative is then the concept."""

    @property
    def right(self) -> bool:
        """Whether the model's answer is the true one."""
        return self.model_answer == self.truth

    @property
    def concept_holds(self) -> bool:
        """Whether the concept is true of the image."""
        return self.holds != bool(self.opposite)

    @property
    def question_concept(self) -> str:
        """Concept in the question, with or without a label."""
        return f"{self.level}:{self.opposite}" if self.opposite else self.concept

    @property
    def named(self) -> str:
        """Concept that the statement of the question is true of the image."""
        return f"{self.level}:named"


def claims_of(
    store: ActivationStore, opposites: Mapping[str, str] | None = None, concepts: Iterable[str] = ()
) -> list[Claim | None]:
    """Return the claim of each row of a store; None for rows without an answer of the model.

    `concepts` are further concepts that questions may name, such as those of probes that were fitted on other data.

    The concept of a yes-no question is the longest label of its level whose name occurs in the question; if there is no such
    label, the opposite of an attribute that occurs (`opposites_of`). Whole words are compared ("bear" is not in
    "bear-shaped"), nouns in singular and plural: "Are there bananas" is about the label ``object:banana``. If no label
    occurs in an existence question of a known wording, its noun is the concept (`presence_noun`).
    """
    opposites = opposites or {}
    others = Names(opposites)
    columns = store.columns
    names: dict[str, list[str]] = {}
    labels = dict.fromkeys((*store.labels, *concepts))
    for label in labels:
        level, _, name = label.partition(":")
        if level in LEVELS and name and name != "named":
            names.setdefault(level, []).append(name)
    names_of_level = {level: Names(level_names, numbers=level == "object") for level, level_names in names.items()}
    kinds = [f"{a} {b}" for a, b in zip(columns["level"], columns["kind"], strict=True)]
    answers: dict[str, set[str]] = {}
    for kind, truth in zip(kinds, columns["answer"], strict=True):
        answers.setdefault(kind, set()).add(str(truth))
    claims: list[Claim | None] = []
    for row, (kind, question) in enumerate(zip(kinds, columns["question"], strict=True)):
        level, truth, model_answer = (str(columns[name][row]) for name in ("level", "answer", "model_answer"))
        if not model_answer:
            claims.append(None)
            continue
        yes_no = truth in _YES_NO
        if yes_no:
            matches = _longest(names_of_level.get(level), str(question))
            opposite = _longest(others, str(question)) if level == "attribute" and not matches else ""
            matches = matches or opposites.get(opposite, "")
            if level == "object" and not matches:
                matches = presence_noun(str(question)) or ""
            concept, rivals = (f"{level}:{matches}" if matches else ""), ()
            holds = truth == "yes"
        else:
            concept, holds, opposite = f"{level}:{truth}", True, ""
            wrong = sorted(answers[kind] - {truth}) if model_answer == truth else [model_answer]
            rivals = tuple(f"{level}:{name}" for name in wrong)
            concept = concept if concept in labels else ""
        nouns = _nouns_of(names_of_level.get("object"), str(question), level) if level == "attribute" or yes_no else ()
        about = (str(columns["id"][row]), str(columns["group"][row]))
        claims.append(
            Claim(
                row,
                *about,
                kind,
                level,
                concept,
                holds,
                yes_no,
                truth,
                model_answer,
                rivals,
                nouns,
                float(columns["margin"][row]),
                opposite,
            )
        )
    return claims


def objects_of(claim: Claim, example: Example) -> tuple[str, ...]:
    """Return the ids of the two objects of a relation in the order of the question; empty if one is not in the image."""
    by_noun = {f"object:{o.noun}": o.id for o in example.objects}
    matches = tuple(by_noun[noun] for noun in claim.nouns if noun in by_noun)
    return matches if len(matches) == 2 else ()


def opposites_of(examples: Iterable[Example], labels: Iterable[str]) -> dict[str, str]:
    """Return attribute values without a label, each with the label that is its only alternative: ``{"small": "big"}``."""
    kinds: dict[str, set[str]] = {}
    for value, kind in attribute_kinds(examples).items():
        kinds.setdefault(kind, set()).add(value)
    labelled = {Concept.parse(c).name for c in labels if c.startswith("attribute:")}
    pairs = (sorted(values, key=lambda v: v in labelled) for values in kinds.values() if len(values) == 2)
    return {a: b for a, b in pairs if a not in labelled and b in labelled}


def attribute_kinds(examples: Iterable[Example]) -> dict[str, str]:
    """Return the kind of each attribute value: ``{"green": "color"}``."""
    return {value: kind for e in examples for o in e.objects for kind, value in o.attributes.items()}


class Names:
    """Names of concepts, searched in questions as whole words.

    Parameters
    ----------
    names
        The names.
    numbers
        Whether they are nouns, which match in singular and plural.
    """

    def __init__(self, names: Iterable[str], *, numbers: bool = False) -> None:
        self._numbers = numbers
        self._names = {" ".join(tokenize_words(name)): name for name in names}
        if numbers:
            self._names = {singular(words): name for words, name in self._names.items()} | self._names
        self._longest = max((words.count(" ") + 1 for words in self._names), default=0)

    def find(self, question: str) -> list[str]:
        """Return the names in a question in order, the longest at each position."""
        words = tokenize_words(question)
        names: list[str] = []
        start = 0
        while start < len(words):
            lengths = range(min(self._longest, len(words) - start), 0, -1)
            matches = ((length, self._name(" ".join(words[start : start + length]))) for length in lengths)
            length, name = next(((length, name) for length, name in matches if name is not None), (1, None))
            names += [] if name is None else [name]
            start += length
        return names

    def _name(self, words: str) -> str | None:
        name = self._names.get(words)
        return self._names.get(singular(words)) if name is None and self._numbers else name


def _longest(names: Names | None, question: str) -> str:
    return max(names.find(question) if names else [], key=len, default="")


def _nouns_of(names: Names | None, question: str, level: str) -> tuple[str, ...]:
    matches = tuple(dict.fromkeys(f"object:{name}" for name in names.find(question))) if names else ()
    if level == "attribute":
        return matches[:1]
    return matches if level == "relation" and len(matches) == 2 else ()


def presence_noun(question: str) -> str | None:
    """Return the noun of a question whether something is in the image, in the wordings of POPE, AMBER and MME.

    >>> from diagnosis.claims import presence_noun
    >>> presence_noun("Is there a dog in this image? Please answer yes or no."), presence_noun("Is the dog red?")
    ('dog', None)
    """
    first, mark, _ = question.partition("?")
    noun = asked_noun(_PICTURE.sub("the image", first) + mark)
    return None if noun is None else noun.lower()


_PICTURE = re.compile(r"\b(?:the|this) (?:image|picture|photo|photograph)\b", re.IGNORECASE)
