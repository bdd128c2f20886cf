"""Answers that change when a question is asked in other words, or in another form of answer: stability of a local model.

Each rule of `REWORDINGS` makes another question with the same fact from an example, or None where it does not apply. Rules
of kind ``paraphrase`` keep the candidates; rules of kind ``format`` change the form of the answer: yes-no, choice, open
(Shu et al., arXiv 2501.01346, 3.2.2 and App. E ask for both). The rules are stated patterns for English questions:

====================  ============  ====================================================================
rule                  kind          question
====================  ============  ====================================================================
``contain``           paraphrase    "Is there a dog in the image?" -> "Does the image contain a dog?"
``see``               paraphrase    "Is there a dog in the image?" -> "Can you see a dog in the image?"
``which``             paraphrase    "What color is the apple?" -> "Which color does the apple have?"
``describe_as``       paraphrase    "Is the apple red?" -> "Would you describe the apple as red?"
``look``              paraphrase    any question -> "Look at the image. <question>"
``as_choice``         format        candidates listed as lettered options; the answer is a letter
``as_open``           format        no candidates: the answer is written, and read by whole words
``as_yes_no``         format        another question than yes-no -> "<question> Is it <true answer>?", true answer yes
====================  ============  ====================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from behavior.benchmarks.rates import share
from behavior.parsing import YES_NO
from behavior.result import BehaviorResult, Cost
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError, GroundscopeError
from groundscope.core.registry import Registry
from groundscope.core.statistics import Estimate
from groundscope.core.text import nearest

if TYPE_CHECKING:
    from behavior.result import Answer
    from lvlm.model import Lvlm

PARAPHRASE, FORMAT = "paraphrase", "format"
KINDS = (PARAPHRASE, FORMAT)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Rewording:
    """A rule that asks for the same fact in another way.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import groundscope as gs
    >>> from behavior.card import REWORDINGS
    >>> example = replace(gs.scenes.dataset(10)[0], question="Is there an umbrella in the image?")
    >>> REWORDINGS["contain"].make(example).question
    'Does the image contain an umbrella?'
    """

    kind: str
    """``paraphrase`` or ``format``."""
    make: Callable[[Example], Example | None]
    """Return the other question with its candidates and true answer; None where the rule does not apply."""
    generate: bool = False
    """Whether the answer is written, and read by whole words (`behavior.parsing.read_answer`)."""
    example: str = ""
    """What the rule does, for tables."""


def _pattern(pattern: str, template: str) -> Callable[[Example], Example | None]:
    compiled = re.compile(pattern, re.IGNORECASE)

    def make(example: Example) -> Example | None:
        match = compiled.fullmatch(example.question.strip())
        return None if match is None else replace(example, question=match.expand(template))

    return make


def _as_choice(example: Example) -> Example | None:
    """List the candidates as lettered options."""
    if not 2 <= len(example.candidates) <= len(_LETTERS):
        return None
    options = " ".join(f"{letter}. {c}" for letter, c in zip(_LETTERS, example.candidates, strict=False))
    letters = tuple(_LETTERS[: len(example.candidates)])
    return replace(
        example,
        question=f"{example.question} {options}",
        suffix="Answer with the letter of the right option.",
        candidates=letters,
        answer=letters[example.candidates.index(example.answer)],
        prior_answer=None,
    )


def _as_open(example: Example) -> Example | None:
    return example if example.candidates else None


def _as_yes_no(example: Example) -> Example | None:
    """Ask whether the true answer is right."""
    if not example.candidates or set(example.candidates) == YES_NO or len(example.answer) < 2:
        return None
    question = f"{example.question} Is it {example.answer}?"
    return replace(example, question=question, candidates=("yes", "no"), answer="yes", prior_answer=None)


def _problem(entry: object) -> str | None:
    if not isinstance(entry, Rewording):
        return "it must be a behavior.card.Rewording"
    return None if entry.kind in KINDS else f"its kind must be {' or '.join(KINDS)}"


REWORDINGS: Registry[Rewording] = Registry(
    "rewording",
    {
        "contain": Rewording(
            PARAPHRASE,
            _pattern(r"Is there (an?|any) (.+) in (?:the|this) image\?", r"Does the image contain \1 \2?"),
            example="Is there a dog in the image? -> Does the image contain a dog?",
        ),
        "see": Rewording(
            PARAPHRASE,
            _pattern(r"Is there (an?|any) (.+) in (?:the|this) image\?", r"Can you see \1 \2 in the image?"),
            example="Is there a dog in the image? -> Can you see a dog in the image?",
        ),
        "which": Rewording(
            PARAPHRASE,
            _pattern(r"What (color|size|shape|material) is the (.+)\?", r"Which \1 does the \2 have?"),
            example="What color is the apple? -> Which color does the apple have?",
        ),
        "describe_as": Rewording(
            PARAPHRASE,
            _pattern(r"Is the ([\w-]+) ([\w-]+)\?", r"Would you describe the \1 as \2?"),
            example="Is the apple red? -> Would you describe the apple as red?",
        ),
        "look": Rewording(
            PARAPHRASE,
            lambda e: replace(e, question=f"Look at the image. {e.question}"),
            example="<question> -> Look at the image. <question>",
        ),
        "as_choice": Rewording(
            FORMAT, _as_choice, example="candidates listed as lettered options; the answer is a letter"
        ),
        "as_open": Rewording(FORMAT, _as_open, generate=True, example="no candidates listed; the answer is written"),
        "as_yes_no": Rewording(
            FORMAT, _as_yes_no, example="What color is the apple? -> What color is the apple? Is it red?"
        ),
    },
    group="groundscope.rewordings",
    check=_problem,
)
"""Rules by name: built-in, registered (``REWORDINGS.register``), and of installed packages."""


@dataclass(frozen=True)
class RewordedAnswers:
    """Answers to reworded questions next to those to the questions of the data; returned by `reword`.

    Examples
    --------
    >>> import groundscope as gs
    >>> from behavior.card import reword
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"])
    >>> reworded = reword(model, data, gs.answer(model, data), rules=["look"])
    >>> reworded.rates["paraphrase"].n == len([e for e in data if e.candidates])
    True
    """

    rates: Mapping[str, Estimate]
    """``paraphrase`` and ``format``: share of questions whose answer changes under at least one rule of the kind; and the
    share of each rule, by its name, over the questions that it applies to. Intervals are clustered by image."""
    answers: Mapping[str, BehaviorResult]
    """Rule to its answers; ids are those of the data. Rules are asked together, so their costs are not known separately."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Rule that this model cannot be asked by, such as letters that its tokenizer does not know, to the reason."""


def reword(
    model: Lvlm,
    data: ConceptDataset,
    answers: BehaviorResult,
    *,
    rules: Sequence[str] | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: bool | None = None,
) -> RewordedAnswers:
    """Ask the questions of a dataset in other words and other forms, and compare the answers with those to the data.

    An answer changes if the model is right in one form and wrong in the other, or, where the candidates are the same, if it
    chooses another candidate. A text that is no candidate is another answer.

    Parameters
    ----------
    model
        The model; hooks on it act as in any forward pass.
    data
        The questions; those without candidates are left out.
    answers
        The model's answers to them, which are not asked again.
    rules
        Entries of `REWORDINGS`; None for all.
    batch_size, progress
        As for `gs.answer`.
    max_new_tokens
        Largest number of tokens of written answers.

    Raises
    ------
    ConfigError
        For an unknown rule.
    DataError
        As `gs.answer`.

    Examples
    --------
    >>> import groundscope as gs
    >>> from behavior.card import reword
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10, splits=["random"])
    >>> sorted(reword(model, data, gs.answer(model, data), rules=["as_open"]).rates)
    ['as_open', 'format']
    """
    names = list(REWORDINGS.usable()) if rules is None else list(rules)
    check_rules(names)
    first = {a.id: a for a in answers.answers if a.correct is not None}
    questions = [e for e in data if e.candidates and e.id in first]
    reworded: dict[str, tuple[Example, ...]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        rule = REWORDINGS[name]
        examples = tuple(x for e in questions if (x := rule.make(e)) is not None)
        reason = None if rule.generate else _unknown_candidate(model, examples)
        if reason is not None:
            left_out[name] = reason
        elif examples:
            reworded[name] = examples
    results: dict[str, BehaviorResult] = {}
    for generate in (False, True):
        own = {name: examples for name, examples in reworded.items() if REWORDINGS[name].generate == generate}
        if own:
            results |= _ask_together(
                model, own, generate=generate, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
            )
    results = {name: results[name] for name in reworded}
    changed = {name: {a.id: differs(first[a.id], a) for a in result.answers} for name, result in results.items()}
    rates: dict[str, Estimate] = {}
    for kind in KINDS:
        of_kind = [changed[name] for name in changed if REWORDINGS[name].kind == kind]
        ids = [e for e in questions if any(e.id in values for values in of_kind)]
        if ids:
            rates[kind] = share([any(v.get(e.id, False) for v in of_kind) for e in ids], [e.group for e in ids])
    group_of = {e.id: e.group for e in questions}
    rates |= {name: share(list(v.values()), [group_of[i] for i in v]) for name, v in changed.items()}
    return RewordedAnswers(rates, results, left_out)


def _ask_together(model: Lvlm, examples: Mapping[str, Sequence[Example]], **options: Any) -> dict[str, BehaviorResult]:
    """Ask the questions of several rules at once, so that all questions about one image share its prefix."""
    from behavior.answering import answer

    rows = [(name, e) for name, members in examples.items() for e in members]
    data = ConceptDataset("reworded", tuple(replace(e, id=f"{name}/{e.id}") for name, e in rows))
    result = answer(model, data, **options)
    answers: dict[str, list[Answer]] = {name: [] for name in examples}
    for (name, example), row in zip(rows, result.answers, strict=True):
        answers[name].append(replace(row, id=example.id))
    return {
        name: BehaviorResult(tuple(members), Cost(None, None, len(members)), result.provenance)
        for name, members in answers.items()
    }


def _unknown_candidate(model: Lvlm, examples: Sequence[Example]) -> str | None:
    """Return why the tokenizer cannot distinguish the candidates of an example; None if it can for all."""
    from lvlm.answer_keys import answer_key

    try:
        for example in examples:
            answer_key(model, example)
    except GroundscopeError as error:
        return str(error).removesuffix("; use another answer")  # the answers are those of the rule
    return None


def differs(first: Answer, second: Answer) -> bool:
    """Return whether two answers to one fact differ.

    >>> import groundscope as gs
    >>> from behavior.card.rewording import differs
    >>> about = ("q", "image", "neutral", "object", "existence", "Is there a cat?", "yes", ("yes", "no"))
    >>> differs(gs.Answer(*about, "yes", True), gs.Answer(*about, "no", False))
    True
    """
    if set(first.candidates) == set(second.candidates):
        return first.given != second.given
    return bool(first.correct) != bool(second.correct)


def check_rules(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a name that is not in `REWORDINGS`.

    >>> from behavior.card.rewording import check_rules
    >>> check_rules(["contain"])
    """
    unknown = next((name for name in names if name not in REWORDINGS), None)
    if unknown is not None:
        msg = f"unknown rewording '{unknown}'; choose from {', '.join(REWORDINGS)}{nearest(unknown, REWORDINGS)}"
        raise ConfigError(msg)
