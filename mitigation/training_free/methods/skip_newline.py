"""Skip-newline: exclude tokens that are only line breaks, so that a description is one paragraph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from lvlm.decoding.decoder import AnswerRule, RuleDecoder, Step
from mitigation.training_free.method import Category, Regime, check_choice
from mitigation.training_free.prompt_methods import PromptDecoder, PromptMethod
from mitigation.training_free.prompt_words import words_problem

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm

Form = Literal["ban", "paragraph"]
_REQUEST = " in one paragraph"


@dataclass(frozen=True)
class SkipNewline(PromptMethod):
    r"""Skip \\n: exclude tokens that are only line breaks, after which captions name more absent objects; or ask for a paragraph.

    Han et al. 2024, arXiv 2402.01345. ``ban`` excludes every token whose text is white space with a line break; ``paragraph``
    adds "in one paragraph" to the question, before its last punctuation mark.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.skip_newline import SkipNewline
    >>> SkipNewline().problem(gs.load_lvlm("tiny"), gs.scenes.dataset(10)[0])
    'not applicable: the tokenizer has no token that is only a line break'
    """

    label: ClassVar[str] = "Skip newline"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2402.01345"
    regime: ClassVar[Regime] = "greedy"

    form: Form = "ban"
    """Exclude the tokens, or change the prompt."""

    def __post_init__(self) -> None:
        check_choice("form", self.form, ("ban", "paragraph"))

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return that the tokenizer has no newline tokens, or does not know the words of the request."""
        if self.form == "paragraph":
            return words_problem(model, _REQUEST)
        if newline_tokens(model):
            return None
        return "not applicable: the tokenizer has no token that is only a line break"

    def _rewritten(self, model: Lvlm, examples: Sequence[Example]) -> Sequence[Example]:
        return [replace(example, question=in_one_paragraph(example.question)) for example in examples]

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        if self.form == "paragraph":
            return PromptDecoder(self)
        tokens = newline_tokens(model)
        return _Decoder(tokens) if tokens else None


def newline_tokens(model: Lvlm) -> tuple[int, ...]:
    """Return the tokens whose text is white space with a line break."""
    tokenizer = model.processor.tokenizer

    def find() -> tuple[int, ...]:
        texts = ((i, tokenizer.decode([i])) for i in range(len(tokenizer)))
        return tuple(i for i, text in texts if "\n" in text and not text.strip())

    return model.remember(("newline tokens", tokenizer, len(tokenizer)), find)


def in_one_paragraph(question: str) -> str:
    """Return a question with a request for one paragraph.

    Examples
    --------
    >>> from mitigation.training_free.methods.skip_newline import in_one_paragraph
    >>> in_one_paragraph("Describe the image.")
    'Describe the image in one paragraph.'
    """
    words = question.rstrip()
    stem = words.rstrip(".?!")
    return f"{stem}{_REQUEST}{words[len(stem) :] or '.'}"


@dataclass(frozen=True)
class _Decoder(RuleDecoder):
    tokens: tuple[int, ...]

    def start(self, model: Lvlm, batch: Batch) -> AnswerRule:
        return _Rule(self.tokens)


class _Rule(AnswerRule):
    def __init__(self, tokens: tuple[int, ...]) -> None:
        self._tokens = list(tokens)

    def combine(self, step: Step) -> Tensor:
        logits = step.logits.clone()
        logits[:, self._tokens] = -math.inf
        return logits
