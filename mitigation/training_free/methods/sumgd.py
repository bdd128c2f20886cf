"""SumGD: content words of a caption from its summary, so that the image outweighs the words before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from concepts.nouns import SYNONYMS
from concepts.object_mentions import caption_lexicon, find_mentions
from lvlm.decoding.decoder import AnswerRule, Prompts
from lvlm.decoding.loop import generate_prompts
from lvlm.encoding.continued_inputs import append_tokens
from mitigation.protocol import ForwardCost
from mitigation.training_free.branches import check_runs_without_image
from mitigation.training_free.method import Category, Regime, TrainingFree, check_range
from mitigation.training_free.prompt_methods import text_of
from mitigation.training_free.prompt_words import words_problem
from mitigation.training_free.seeds import seed_of
from mitigation.training_free.word_limit import cut_tokens

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch, Inputs
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling

SUMMARY_PROMPT = "Summarize the following caption briefly.\nCaption: {}"
"""Prompt of the summary, without the image."""
_DRAFT, _LONGEST = 16, 128
"""Tokens of a draft, and the most if they contain too few words."""
Tagger = Callable[[str, int, int], bool]
"""Function of a text and the span of a word in it: whether it is a content word."""


@dataclass(frozen=True)
class SumGD(TrainingFree):
    """Summary-guided decoding: write content words after a summary of the sentences before, and not after all their words.

    The longer a caption, the less its words depend on the image. After the first sentence, the model summarizes what it has
    written (text only). Each next word is drafted after the whole text together with two further words, so that it can be
    tagged in its context; a content word is then written again after the summary and the current sentence only. Min et al. 2025,
    arXiv 2410.13321; the distilled model of the summary (their variant D) is left out. The paper tags parts of speech with
    spaCy; by default a word is a content word here if the shared vocabulary of objects (`concepts.nouns`) contains it, and
    `tagger` takes any function, such as one of spaCy. Sampled words draw by the position of the word. Answers are written one
    by one, with a prefill for each word.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.training_free.methods.sumgd import SumGD
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(10).where(kind="caption")
    >>> with SumGD(summary_prompt="Describe the image: {}").applied(model):
    ...     answers = gs.answer(model, data, max_new_tokens=4)
    >>> len(answers.answers[0].text.split())
    4
    """

    label: ClassVar[str] = "SumGD"
    category: ClassVar[Category] = "decoding"
    source: ClassVar[str] = "arXiv 2410.13321"
    regime: ClassVar[Regime] = "greedy"

    look_ahead: int = 2
    """Number of further words that are drafted before a word is tagged; at least 0."""
    summary_prompt: str = SUMMARY_PROMPT
    """Prompt of the summary; ``{}`` is the text so far."""
    summary_tokens: int = 64
    """Largest number of tokens of a summary; at least 1."""
    tagger: Tagger | None = None
    """Whether a word of a text is a content word; None for the shared vocabulary."""

    def __post_init__(self) -> None:
        check_range("look_ahead", self.look_ahead, 0)
        check_range("summary_tokens", self.summary_tokens, 1)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """All parameters; the tagger by its qualified name."""
        name = None if self.tagger is None else getattr(self.tagger, "__qualname__", type(self.tagger).__qualname__)
        return {**super().parameters, "tagger": name}

    @property
    def forward_cost(self) -> ForwardCost:
        """Forward passes: for each word, its draft and at most one more word; a prefill for each."""
        return ForwardCost(per_token=2 + self.look_ahead, prompts=2)

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return the words of the summary's prompt that the tokenizer does not know, if there are some."""
        return words_problem(model, self.summary_prompt.format(""))

    def _check(self, model: Lvlm) -> None:
        check_runs_without_image(model, self.label)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return _Decoder(self, self.tagger or vocabulary_tagger())


def vocabulary_tagger(nouns: Sequence[str] = ()) -> Tagger:
    """Return the tagger of the shared vocabulary of objects and further nouns; plurals count.

    Examples
    --------
    >>> from mitigation.training_free.methods.sumgd import vocabulary_tagger
    >>> tag, text = vocabulary_tagger(["unicorn"]), "two unicorns run"
    >>> [tag(text, 0, 3), tag(text, 4, 12)]
    [False, True]
    """
    words = {word: group[0] for group in SYNONYMS for word in group}
    lexicon = caption_lexicon((*nouns, *words.values()), words)

    def tag(text: str, start: int, stop: int) -> bool:
        return any(a < stop and b > start for _, a, b in find_mentions(text, lexicon))

    return tag


@dataclass(frozen=True)
class _Decoder:
    method: SumGD
    tagger: Tagger

    def first_logits(self, model: Lvlm, batch: Batch) -> Tensor:
        # The first word has no summary before it.
        return model.logits(batch.inputs, batch.images)

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        return [
            _Caption(self, model, model.collate([encoding]), encoding.example.id, sampling).write(max_new_tokens)
            for encoding in batch.encodings
        ]


class _Caption:
    """One answer while it is written."""

    def __init__(self, decoder: _Decoder, model: Lvlm, inputs: Inputs, name: str, sampling: Sampling | None) -> None:
        self.method, self.tagger, self.model = decoder.method, decoder.tagger, model
        self.inputs, self.name, self.sampling = inputs, name, sampling
        self.tokens: list[int] = []
        self.sentence = 0
        self.summary: list[int] = []

    def write(self, count: int) -> list[int]:
        """Return at most `count` tokens."""
        while len(self.tokens) < count:
            word = self._next_word()
            if not word:
                break
            self.tokens += word
            if self._text(self.tokens).endswith((".", "!", "?")):
                self.sentence = len(self.tokens)
                self.summary = self._summarize() if self.sentence < count else []
        return self.tokens[:count]

    def _next_word(self) -> list[int]:
        """Return the tokens of the next word; none at the end of the answer."""
        draft = self._continue(self.tokens, 2 + self.method.look_ahead)
        word = self._first_word(draft)
        if not word or not self.summary or not self._is_content(draft, word):
            return word
        return self._first_word(self._continue([*self.summary, *self.tokens[self.sentence :]], 2)) or word

    def _is_content(self, draft: list[int], word: list[int]) -> bool:
        sentence = self.tokens[self.sentence :]
        before, through, text = (
            self._text(sentence), self._text([*sentence, *word]), self._text([*sentence, *draft]),
        )  # fmt: skip
        return self.tagger(text, len(before), len(through))

    def _first_word(self, tokens: list[int]) -> list[int]:
        return cut_tokens(tokens, 1, self._text)

    def _continue(self, written: Sequence[int], words: int) -> list[int]:
        """Return tokens after written ones that contain the begin of at least `words` words, unless the answer ends."""
        inputs = append_tokens(self.model, self.inputs, [list(written)]) if written else self.inputs
        sampling = self.sampling
        if sampling is not None:
            sampling = replace(sampling, seed=seed_of(sampling.seed, len(self.tokens)))
        count = _DRAFT
        while True:
            prompts = (Prompts((0,), self.model.on_device(dict(inputs))),)
            (tokens,) = generate_prompts(self.model, prompts, AnswerRule(), count, names=[self.name], sampling=sampling)
            if len(tokens) < count or count >= _LONGEST or len(self._text(tokens).split()) >= words:
                return tokens
            count *= 2

    def _summarize(self) -> list[int]:
        """Return the tokens of the model's summary of the text so far, written without the image."""
        text = self.model.prompt(self.method.summary_prompt.format(self._text(self.tokens)), 0)
        inputs, _ = self.model.encode_prompt(text, [])
        prompts = (Prompts((0,), self.model.on_device(inputs)),)
        with torch.no_grad():
            (summary,) = generate_prompts(
                self.model, prompts, AnswerRule(), self.method.summary_tokens, names=[self.name]
            )
        return summary

    def _text(self, tokens: Sequence[int]) -> str:
        return text_of(self.model, tokens)
