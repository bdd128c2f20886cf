"""What a question is about, and what it would take for each of two answers to be true."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from activation_store import ActivationStore
from concepts.nouns import singular
from concepts.object_mentions import tokenize_words
from concepts.schema import Concept, Example

_YES_NO = {"yes", "no"}


@dataclass(frozen=True)
class Claim:
    """One row of a store as a choice between its true answer and others."""

    row: int
    id: str
    group: str
    kind: str
    """Level and kind of the question, ``attribute what_color``."""
    level: str
    concept: str
    """What it is about, ``attribute:red``; of a question with open answers the true one; empty where no label says so."""
    holds: bool
    """Whether what is asked is true of the image."""
    yes_no: bool
    truth: str
    said: str
    rivals: tuple[str, ...]
    """Concepts of the other answers; of a wrong answer the one given. None for yes or no."""
    nouns: tuple[str, ...]
    """For a relation, the two object concepts it is between, in the order of the question."""
    margin: float
    """Log-odds of the truth against the best other answer, as the model has it; below 0 where it is wrong."""
    opposite: str = ""
    """The value asked for where no label is of it, but of its only alternative, which is then the concept: ``small``."""

    @property
    def right(self) -> bool:
        """Whether the model's answer is the true one."""
        return self.said == self.truth

    @property
    def concept_holds(self) -> bool:
        """Whether the concept is true of the image."""
        return self.holds != bool(self.opposite)

    @property
    def asked(self) -> str:
        """The concept that is asked for, with a label or without."""
        return f"{self.level}:{self.opposite}" if self.opposite else self.concept

    @property
    def named(self) -> str:
        """The concept that what is asked is true of the image."""
        return f"{self.level}:named"


def claims_of(store: ActivationStore, opposites: Mapping[str, str] | None = None) -> list[Claim | None]:
    """Return what each row of a store is about; None for rows without an answer to choose.

    The concept of a yes-no question is the longest name among the store's labels of its level that stands in the question; or,
    where none does, the opposite of an attribute that does (`opposites_of`). Words are compared whole ("bear" is not in
    "bear-shaped"), and nouns in either number: "Are there bananas" is about the label ``object:banana``.
    """
    opposites = opposites or {}
    others = _Names(opposites)
    columns = store.columns
    names: dict[str, list[str]] = {}
    for label in store.labels:
        concept = Concept.parse(label)
        if concept.name != "named":
            names.setdefault(concept.level, []).append(concept.name)
    known = {level: _Names(found, numbers=level == "object") for level, found in names.items()}
    kinds = [f"{a} {b}" for a, b in zip(columns["level"], columns["kind"], strict=True)]
    answers: dict[str, set[str]] = {}
    for kind, truth in zip(kinds, columns["answer"], strict=True):
        answers.setdefault(kind, set()).add(str(truth))
    out: list[Claim | None] = []
    for row, (kind, question) in enumerate(zip(kinds, columns["question"], strict=True)):
        level, truth, said = (str(columns[name][row]) for name in ("level", "answer", "model_answer"))
        if not said:
            out.append(None)
            continue
        yes_no = truth in _YES_NO
        if yes_no:
            found = _longest(known.get(level), str(question))
            opposite = _longest(others, str(question)) if level == "attribute" and not found else ""
            found = found or opposites.get(opposite, "")
            concept, rivals = (f"{level}:{found}" if found else ""), ()
            holds = truth == "yes"
        else:
            concept, holds, opposite = f"{level}:{truth}", True, ""
            wrong = sorted(answers[kind] - {truth}) if said == truth else [said]
            rivals = tuple(f"{level}:{name}" for name in wrong)
            concept = concept if concept in columns else ""
        nouns = _between(known.get("object"), str(question)) if level == "relation" and yes_no else ()
        about = (str(columns["id"][row]), str(columns["group"][row]))
        out.append(
            Claim(
                row,
                *about,
                kind,
                level,
                concept,
                holds,
                yes_no,
                truth,
                said,
                rivals,
                nouns,
                float(columns["margin"][row]),
                opposite,
            )
        )
    return out


def objects_of(claim: Claim, example: Example) -> tuple[str, ...]:
    """Return the ids of the objects a relation is between, first the first named; empty where they are not both there."""
    by_noun = {f"object:{o.noun}": o.id for o in example.objects}
    found = tuple(by_noun[noun] for noun in claim.nouns if noun in by_noun)
    return found if len(found) == 2 else ()


def opposites_of(examples: Iterable[Example], labels: Iterable[str]) -> dict[str, str]:
    """Return attribute values that are no labels, with the one label that is their only alternative: ``{"small": "big"}``."""
    kinds: dict[str, set[str]] = {}
    for value, kind in values_seen(examples).items():
        kinds.setdefault(kind, set()).add(value)
    labelled = {Concept.parse(c).name for c in labels if c.startswith("attribute:")}
    pairs = (sorted(values, key=lambda v: v in labelled) for values in kinds.values() if len(values) == 2)
    return {a: b for a, b in pairs if a not in labelled and b in labelled}


def values_seen(examples: Iterable[Example]) -> dict[str, str]:
    """Return for each attribute value what kind of attribute it is: ``{"green": "color"}``."""
    return {value: kind for e in examples for o in e.objects for kind, value in o.attributes.items()}


class _Names:
    """Names of concepts, to be found in questions as whole words.

    Parameters
    ----------
    names
        The names.
    numbers
        Whether they are nouns, which count in singular and plural.
    """

    def __init__(self, names: Iterable[str], *, numbers: bool = False) -> None:
        self._numbers = numbers
        self._names = {" ".join(tokenize_words(name)): name for name in names}
        if numbers:
            self._names = {singular(words): name for words, name in self._names.items()} | self._names
        self._longest = max((words.count(" ") + 1 for words in self._names), default=0)

    def find(self, question: str) -> list[str]:
        """Return the names in a question, in order, the longest at each place."""
        words = tokenize_words(question)
        names: list[str] = []
        start = 0
        while start < len(words):
            lengths = range(min(self._longest, len(words) - start), 0, -1)
            found = ((length, self._name(" ".join(words[start : start + length]))) for length in lengths)
            length, name = next(((length, name) for length, name in found if name is not None), (1, None))
            names += [] if name is None else [name]
            start += length
        return names

    def _name(self, words: str) -> str | None:
        name = self._names.get(words)
        return self._names.get(singular(words)) if name is None and self._numbers else name


def _longest(names: _Names | None, question: str) -> str:
    return max(names.find(question) if names else [], key=len, default="")


def _between(names: _Names | None, question: str) -> tuple[str, ...]:
    found = dict.fromkeys(f"object:{name}" for name in names.find(question)) if names else {}
    return tuple(found) if len(found) == 2 else ()
