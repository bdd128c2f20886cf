"""The judge: a prompt that asks a model whether a sentence about an image is true, and scores of its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundscope.core.errors import ConfigError, DataError, ModelError
from lvlm.decoding.shared_prefix import logits_after_each
from lvlm.encoding.encode import Batch
from mitigation.training_free.branches import check_runs_without_image, unknown_image, without_image
from mitigation.training_free.method import check_choice, check_range

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.encoding.encode import Encoding, Inputs
    from lvlm.model import Lvlm

PAPER_TEMPLATE = (
    "Please analyze the provided image and determine if the following description is accurate. Just say 'yes' if it is, 'no' if "
    "it's not, or 'maybe' if you're not sure.\nThe description is: {sentence} "
)
"""The judge's prompt of the paper's release."""
EMBEDDED_TEMPLATE = "Is the {noun} {attribute}?"
"""A judge's prompt for the embedded model, whose vocabulary has about 70 words, and for phrases such as "a red apple"."""
PLACES = ("{sentence}", "{phrase}", "{noun}", "{attribute}")
"""Places of a template."""

Score = Literal["logit", "logprob", "margin", "release"]
BlindForm = Literal["removed", "unknown", "mean"]
SCORES: tuple[Score, ...] = ("logit", "logprob", "margin", "release")
BLIND_FORMS: tuple[BlindForm, ...] = ("removed", "unknown", "mean")
_RELEASE_TOP = 10


@dataclass(frozen=True)
class Judge:
    """How a model judges a sentence, in a separate conversation about the image.

    f is a score of the answer yes after the prompt, f_blind the same score without the image, and the debiased score is
    ``S = (1 + alpha) f - alpha f_blind``. Source: arXiv 2508.20655.

    Raises
    ------
    ConfigError
        For a template without a place for the sentence, an unknown score or blind form, or a negative `alpha`.

    Examples
    --------
    >>> from mitigation.self_judgment import Judge
    >>> Judge("Is there {phrase} in the image?").question("a red apple and", ends=(",", "and"))
    'Is there a red apple in the image?'
    """

    template: str = PAPER_TEMPLATE
    """Text of the user with ``{sentence}``, the sentence as it was written, or ``{phrase}``, without the words and marks at its
    ends that separate sentences; or ``{noun}`` and ``{attribute}``, the last word of the phrase and the word before it."""
    score: Score = "logit"
    """``logit`` (paper): sum of the logits of "Yes" and "yes", which are shifted by any constant that a forward pass adds to its
    logits. ``logprob``: log of the summed probabilities of all tokens that read yes. ``margin``: that minus the same of no.
    ``release``: the largest logit of a token among the first ten that reads yes, 0 without such a token."""
    blind: BlindForm = "removed"
    """The blind prompt: image tokens ``removed``, ``unknown`` for the unknown token in their place, ``mean`` of both."""
    alpha: float = 1.0
    """Weight of the text bias that is subtracted; at least 0. 0 is the score f without debiasing."""

    def __post_init__(self) -> None:
        if not any(place in self.template for place in PLACES[:3]):
            msg = f"template '{self.template}': it has no place for the sentence; write one of {', '.join(PLACES[:3])} into it"
            raise ConfigError(msg)
        check_choice("score", self.score, SCORES)
        check_choice("blind", self.blind, BLIND_FORMS)
        check_range("alpha", self.alpha, 0)

    def question(self, sentence: str, ends: Sequence[str] = (".",)) -> str:
        """Return the user's text that asks about a sentence; `ends` separate sentences."""
        phrase = strip_ends(sentence, ends)
        *before, noun = phrase.split() or [""]
        values = (sentence, phrase, noun, before[-1] if before else "")
        text = self.template
        for place, value in zip(PLACES, values, strict=True):
            text = text.replace(place, value)
        return text

    def check(self, model: Lvlm) -> None:
        """Raise `ModelError` if a model cannot judge: it needs its image, or has no token for unknown words or for yes."""
        check_runs_without_image(model, "self-judgment")
        if self.blind != "removed" and model.processor.tokenizer.unk_token_id is None:
            msg = (
                f"blind='{self.blind}' puts the token for unknown words in place of the image, and the tokenizer of {model.name} "
                "has none; use blind='removed'"
            )
            raise ModelError(msg)
        problem = self.problem(model)
        if problem is not None:
            msg = f"{model.name} cannot read the judge's prompt: {problem}"
            raise ModelError(msg)
        self.score_of(model)

    def problem(self, model: Lvlm) -> str | None:
        """Return which words of the template the tokenizer does not know, as a sentence; None if it knows all."""
        words = unknown_words(model, self.question(""))
        if not words:
            return None
        return (
            f"not applicable: {len(words)} prompt words unknown to the tokenizer ({', '.join(words[:5])}"
            f"{', …' if len(words) > 5 else ''}); give a template with words that it knows"
        )

    def score_of(self, model: Lvlm) -> AnswerScore:
        """Return the score as a function of logits; raises `ModelError` if no token reads yes, or for ``margin`` no."""
        if self.score == "logit":
            return AnswerScore(self.score, word_tokens(model, ("Yes", "yes")))
        return AnswerScore(self.score, reading_tokens(model, "yes"), reading_tokens(model, "no"))


@dataclass(frozen=True)
class AnswerScore:
    """A score of the answer yes, from the logits after the judge's prompt.

    Examples
    --------
    >>> import torch
    >>> from mitigation.self_judgment.judge import AnswerScore
    >>> logits = torch.tensor([[2.0, 1.0, 0.5]])
    >>> AnswerScore("logit", (0, 1)).of(logits).tolist()
    [3.0]
    >>> round(float(AnswerScore("margin", (0,), (2,)).of(logits)[0]), 3)
    1.5
    """

    score: Score
    yes: tuple[int, ...]
    """Tokens that mean yes."""
    no: tuple[int, ...] = ()

    def of(self, logits: Tensor) -> NDArray[np.float64]:
        """Return the score of each row of logits ``[n, V]`` -> float64 ``[n]``."""
        wide = logits.double()
        yes = wide[:, list(self.yes)]
        if self.score == "logit":
            values = yes.sum(-1)
        elif self.score == "logprob":
            values = yes.logsumexp(-1) - wide.logsumexp(-1)
        elif self.score == "margin":
            values = yes.logsumexp(-1) - wide[:, list(self.no)].logsumexp(-1)
        else:
            cut = wide.topk(min(_RELEASE_TOP, wide.shape[1])).values[:, -1:]
            largest = yes.masked_fill(yes < cut, -math.inf).amax(-1)
            values = torch.where(largest.isfinite(), largest, 0.0)
        return values.cpu().numpy()


@dataclass(frozen=True)
class Judgments:
    """Scores of sentences, float64 ``[n]`` each.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation.self_judgment import Judgments
    >>> Judgments(np.array([2.0]), np.array([0.5])).debiased(1.0).tolist()
    [3.5]
    """

    image: NDArray[np.float64]
    """f: the score with the image."""
    blind: NDArray[np.float64]
    """f_blind: the score without it."""

    def debiased(self, alpha: float) -> NDArray[np.float64]:
        """Return S = (1 + alpha) f - alpha f_blind."""
        return (1 + alpha) * self.image - alpha * self.blind


def judge_sentences(
    model: Lvlm,
    example: Example,
    sentences: Sequence[str],
    judge: Judge | None = None,
    *,
    ends: Sequence[str] = (".",),
    share: bool | None = None,
) -> Judgments:
    """Judge sentences about the image of an example; the common prefix of all prompts, with the image, runs once.

    Parameters
    ----------
    model
        The model, which judges itself.
    example
        The example whose images, and system prompt, the sentences are judged with.
    sentences
        The sentences.
    judge
        Prompt and scores; the paper's by default.
    ends
        Words and marks that separate sentences, which ``{phrase}`` leaves out.
    share
        Whether all prompts share the run of their common beginning; by default if no intervention is active on the model.

    Raises
    ------
    DataError
        If there are no sentences, or one contains words that the tokenizer does not know.
    ModelError
        If the model cannot judge (`Judge.check`).

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.self_judgment import Judge, judge_sentences
    >>> model, example = gs.load_lvlm("tiny"), gs.scenes.dataset(10)[0]
    >>> noun = example.objects[0].noun
    >>> judge = Judge("Is there {phrase} in the image?")
    >>> scores = judge_sentences(model, example, [f"a {noun}", "a guitar"], judge)
    >>> bool(scores.image[0] > scores.image[1])
    True
    """
    rule = judge or Judge()
    rule.check(model)
    score = rule.score_of(model)
    forms: tuple[BlindForm, ...] = ("removed", "unknown") if rule.blind == "mean" else (rule.blind,)
    image, *blind = judge_logits(model, example, [rule.question(s, ends) for s in sentences], forms, share=share)
    return Judgments(score.of(image), np.mean([score.of(logits) for logits in blind], axis=0))


def judge_logits(
    model: Lvlm, example: Example, questions: Sequence[str], forms: Sequence[BlindForm], *, share: bool | None = None
) -> list[Tensor]:
    """Return the logits after questions about the image of an example: with the image, then in each blind form, ``[n, V]``.

    Parameters
    ----------
    model, example, share
        As for `judge_sentences`.
    questions
        Texts of the user (`Judge.question`).
    forms
        ``removed`` or ``unknown``.

    Raises
    ------
    DataError
        As for `judge_sentences`.
    """
    if not questions:
        msg = "no sentences to judge; give at least one"
        raise DataError(msg)
    prompts = [_prompt(model, example, question) for question in questions]
    sharing = not model.interventions and not model.unregistered_hooks if share is None else share
    rows = [model.on_device(prompt.inputs) for prompt in prompts]
    sides = [rows, *(_blind_rows(model, prompts, form) for form in forms)]
    return [logits_after_each(model, side, share=sharing) for side in sides]


def stack_is_alone(model: Lvlm) -> bool:
    """Whether at most one intervention, the method itself, is active, so that judged prompts may share their beginning."""
    return len(model.interventions) <= 1 and not model.unregistered_hooks


def _prompt(model: Lvlm, example: Example, question: str) -> Encoding:
    fresh = replace(example, question=question, suffix="", prefix="", mentions=(), candidates=(), aliases=())
    words = unknown_words(model, question)
    if words:
        listed = ", ".join(words)
        msg = f"example '{example.id}': the tokenizer of {model.name} does not know words of the judged text ({listed})"
        raise DataError(msg)
    return model.encode(fresh)


def _blind_rows(model: Lvlm, prompts: Sequence[Encoding], form: str) -> list[Inputs]:
    """Return the judge's prompts without their image, one row each, in order."""
    rows: list[Inputs] = []
    for encoding in prompts:
        batch = Batch((0,), (encoding,), model.collate([encoding]))
        branch = without_image(model, batch) if form == "removed" else unknown_image(model, batch)
        rows.append(dict(branch.prompts[0].inputs))
    return rows


# ---- words


def strip_ends(sentence: str, ends: Sequence[str]) -> str:
    """Return a sentence without the words and marks of `ends` at its beginning and its end, and without outer spaces.

    Examples
    --------
    >>> from mitigation.self_judgment.judge import strip_ends
    >>> strip_ends("and a red car .", (",", ".", "and"))
    'a red car'
    """
    words = sentence.strip()
    while True:
        shorter = words
        for end in ends:
            boundary = " " if end.isalnum() else ""
            if end and (shorter == end or shorter.endswith(boundary + end)):
                shorter = shorter[: len(shorter) - len(end)].rstrip()
            if end and (shorter == end or shorter.startswith(end + boundary)):
                shorter = shorter[len(end) :].lstrip()
        if shorter == words:
            return words
        words = shorter


def unknown_words(model: Lvlm, text: str) -> tuple[str, ...]:
    """Return the words of a text that a tokenizer does not know; empty for a tokenizer that knows all."""
    tokenizer = model.processor.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return ()
    words = dict.fromkeys(text.split())
    return tuple(word for word in words if unknown in tokenizer(word, add_special_tokens=False)["input_ids"])


def word_tokens(model: Lvlm, words: Sequence[str]) -> tuple[int, ...]:
    """Return the token of each word that is one token at the beginning of an answer; words of several tokens are left out.

    Raises
    ------
    ModelError
        If no word is one token.
    """
    from lvlm.encoding.tokens_after_prompt import tokens_after

    tokenizer = model.processor.tokenizer
    prompt = model.prompt("question")
    several = (tokens_after(model, prompt, word).ids for word in words)
    ids = dict.fromkeys(one[0] for one in several if len(one) == 1 and one[0] != tokenizer.unk_token_id)
    if not ids:
        msg = f"no word of {', '.join(words)} is one token of {model.name}'s tokenizer; use score='logprob' or 'margin'"
        raise ModelError(msg)
    return tuple(ids)


def reading_tokens(model: Lvlm, word: str) -> tuple[int, ...]:
    """Return all tokens whose text, without spaces and in lower case, is a word.

    Raises
    ------
    ModelError
        If no token reads so.
    """
    tokenizer = model.processor.tokenizer

    def find() -> tuple[int, ...]:
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        return tuple(i for i, text in enumerate(texts) if text.strip().lower() == word)

    ids = model.remember(("tokens that read", word), find)
    if not ids:
        msg = f"no token of {model.name}'s tokenizer reads '{word}', so its answers to the judge cannot be scored"
        raise ModelError(msg)
    return ids
