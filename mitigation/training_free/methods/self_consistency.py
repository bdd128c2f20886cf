"""Self-consistency: remove the sentences about objects that the model itself does not confirm."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from behavior.chair import COCO_CATEGORIES
from concepts.nouns import SYNONYMS, existence_question, singular
from concepts.object_mentions import find_mentions
from concepts.schema import Example
from lvlm.decoding.decoder import AnswerRule, Branch, RuleDecoder
from lvlm.decoding.loop import generate_prompts
from lvlm.sampling import Sampling
from mitigation.protocol import ForwardCost
from mitigation.training_free.method import Category, Regime, TrainingFree, check_count, check_range
from mitigation.training_free.prompt_words import words_problem

if TYPE_CHECKING:
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm

ATTRIBUTES = frozenset(
    """red orange yellow green blue purple pink brown black white gray grey silver golden big large small little tall short
    long round square wooden metal plastic glass""".split()
)
"""Words that, directly before a noun, become the second question."""
_ANSWER_TOKENS = 16
_SENTENCE = re.compile(r"[^.!?]*[.!?]*\s*")


@dataclass(frozen=True)
class SelfConsistency(TrainingFree):
    """Ask the model about each object that its answer names, and remove the sentences that its own answers contradict.

    Objects are found by COCO's categories, the vocabulary of `concepts.nouns` and `nouns`. For each, ``Is there a … in
    the image?`` is asked, and for an object with an attribute of `ATTRIBUTES` before it (``a red apple``) ``Which
    objects are red?``; each is answered `samples` times at `temperature`. An answer counts as yes if it begins with
    yes, or names the object. A sentence is removed if for one of its objects the share of yes is below `threshold`; an
    answer can become empty. Answers without objects, and questions that are scored by the logits of candidates, are
    those of the model.

    This is the simplest form of checking answers by further answers, without the language models and detectors that
    LogicCheckGPT and Woodpecker use to extract claims and to rewrite; it is not a re-implementation of either.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.self_consistency import SelfConsistency
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10).where(kind="caption")
    >>> method = SelfConsistency(samples=2, attributes=False)
    >>> with method.applied(model):
    ...     answers = gs.answer(model, data)
    >>> len(answers), SelfConsistency().problem(model, data[0])
    (1, 'not applicable: 2 prompt words unknown (objects, are)')
    """

    label: ClassVar[str] = "self-consistency"
    category: ClassVar[Category] = "post-hoc"
    source: ClassVar[str] = "this package"
    regime: ClassVar[Regime] = "greedy"
    cost: ClassVar[ForwardCost] = ForwardCost(prompts=10)

    samples: int = 5
    """Number of answers to each question; at least 1."""
    threshold: float = 0.4
    """Share of yes below which a sentence is removed, in [0, 1]; 0 removes none."""
    attributes: bool = True
    """Whether the question about an attribute is asked."""
    temperature: float = 1.0
    """Temperature of the answers; above 0."""
    seed: int = 0
    nouns: tuple[str, ...] = ()
    """Further objects that answers may name."""

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        check_range("threshold", self.threshold, 0, 1)
        check_range("temperature", self.temperature, 0, above=True)

    @property
    def forward_cost(self) -> ForwardCost:
        """One prompt for each of the sampled answers to the questions about one object."""
        return ForwardCost(prompts=float(self.samples * (2 if self.attributes else 1)))

    @property
    def lexicon(self) -> dict[str, str]:
        """Each word for an object, with itself."""
        words = [word for group in SYNONYMS for word in group]
        return {word.lower(): word.lower() for word in (*words, *COCO_CATEGORIES, *self.nouns)}

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return which words of the questions the tokenizer does not know; None if it knows all."""
        return words_problem(model, "Is there a in the image?" + (" Which objects are ?" if self.attributes else ""))

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return _Decoder(self) if self.threshold else None


@dataclass(frozen=True)
class _Decoder(RuleDecoder):
    method: SelfConsistency

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        answers = super().generate(model, batch, max_new_tokens, sampling)
        tokenizer = model.processor.tokenizer
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        examples = [encoding.example for encoding in batch.encodings]
        shares = confirmed_shares(model, self.method, examples, texts)
        corrected: list[list[int]] = []
        for answer, text, share in zip(answers, texts, shares, strict=True):
            spans = removed_sentences(text, share, self.method)
            ends = [len(tokenizer.decode(answer[: k + 1], skip_special_tokens=True)) for k in range(len(answer))]
            corrected.append(
                [t for t, end in zip(answer, ends, strict=True) if not any(a < end <= b for a, b in spans)]
            )
        return corrected


def named_objects(text: str, lexicon: Mapping[str, str]) -> list[tuple[str, int]]:
    """Return the objects that a text names, with their first characters; "orange" before a noun is an attribute."""
    mentions = find_mentions(text, lexicon)
    starts = {start for _, start, _ in mentions}
    return [(noun, start) for noun, start, stop in mentions if not (noun in ATTRIBUTES and stop + 1 in starts)]


def questions_about(method: SelfConsistency, text: str) -> dict[str, tuple[str, ...]]:
    """Return the questions about each object that a text names.

    Examples
    --------
    >>> from mitigation.training_free.methods.self_consistency import SelfConsistency, questions_about
    >>> questions_about(SelfConsistency(), "A red apple and two dogs.")
    {'apple': ('Is there an apple in the image?', 'Which objects are red?'), 'dog': ('Is there a dog in the image?',)}
    """
    questions: dict[str, dict[str, None]] = {}
    for noun, start in named_objects(text, method.lexicon):
        texts_of_noun = questions.setdefault(noun, {existence_question(noun): None})
        before = text[:start].split()
        if method.attributes and before and before[-1].lower() in ATTRIBUTES:
            texts_of_noun[f"Which objects are {before[-1].lower()}?"] = None
    return {noun: tuple(several) for noun, several in questions.items()}


def confirmed_shares(
    model: Lvlm, method: SelfConsistency, examples: Sequence[Example], texts: Sequence[str]
) -> list[dict[str, float]]:
    """Return for each text the share of sampled answers that confirm each of its objects."""
    items: list[tuple[int, str, Example]] = []
    for row, (example, text) in enumerate(zip(examples, texts, strict=True)):
        for noun, questions in questions_about(method, text).items():
            for question in questions:
                question_example = replace(
                    example,
                    id=f"{example.id}\0{question}\0{noun}",
                    question=question,
                    suffix="",
                    prefix="",
                    mentions=(),
                )
                items.append((row, noun, question_example))
    shares: list[dict[str, float]] = [{} for _ in texts]
    if not items:
        return shares
    votes: dict[tuple[int, str], list[bool]] = {}
    prompts = Branch.of(
        "questions", model, [model.encode(question_example) for _, _, question_example in items]
    ).prompts
    names = [question_example.id for _, _, question_example in items]
    for number in range(method.samples):
        sampling = Sampling(temperature=method.temperature, seed=method.seed + number)
        answers = generate_prompts(model, prompts, AnswerRule(), _ANSWER_TOKENS, names=names, sampling=sampling)
        written = model.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        for (row, noun, question_example), answer in zip(items, written, strict=True):
            votes.setdefault((row, noun), []).append(confirms(answer, noun, question_example.question, method.lexicon))
    for (row, noun), several in votes.items():
        shares[row][noun] = sum(several) / len(several)
    return shares


def confirms(answer: str, noun: str, question: str, lexicon: Mapping[str, str]) -> bool:
    """Whether an answer confirms an object.

    An answer to "Which objects …" confirms the objects that it names; any other answer does if it begins with yes.

    Examples
    --------
    >>> from mitigation.training_free.methods.self_consistency import confirms
    >>> confirms("Yes, there is.", "dog", "Is there a dog in the image?", {})
    True
    >>> confirms("The apple and the car.", "dog", "Which objects are red?", {"apple": "apple", "dog": "dog"})
    False
    """
    if question.startswith("Which objects"):
        return singular(noun) in {singular(named) for named, _ in named_objects(answer, lexicon)}
    return re.match(r"\W*yes\b", answer, re.IGNORECASE) is not None


def removed_sentences(text: str, shares: Mapping[str, float], method: SelfConsistency) -> list[tuple[int, int]]:
    """Return start and end of the sentences that name an object whose share is below the threshold.

    Examples
    --------
    >>> from mitigation.training_free.methods.self_consistency import SelfConsistency, removed_sentences
    >>> text = "There is a dog. A cat sleeps."
    >>> [text[a:b] for a, b in removed_sentences(text, {"dog": 0.2, "cat": 0.4}, SelfConsistency())]
    ['There is a dog. ']
    """
    spans = [match.span() for match in _SENTENCE.finditer(text) if match.group()]
    rejected = [start for noun, start in named_objects(text, method.lexicon) if shares[noun] < method.threshold]
    return [(a, b) for a, b in spans if any(a <= start < b for start in rejected)]
