"""FGSD: answers with a sentence that the model itself judges harmful are replaced by a refusal, and its threshold."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from groundscope.core.errors import ConfigError, DataError, ModelError
from groundscope.core.statistics import Estimate, estimate
from groundscope.core.text import format_count
from lvlm.decoding.decoder import RuleDecoder
from lvlm.encoding.tokens_after_prompt import tokens_after
from mitigation.self_judgment.judge import BlindForm, Judge, Score, judge_sentences, stack_is_alone
from mitigation.training_free.method import Category, Regime, TrainingFree
from mitigation.training_free.prompt_words import words_problem

if TYPE_CHECKING:
    from concepts.schema import Example
    from lvlm.decoding.decoder import Decoder
    from lvlm.encoding.encode import Batch
    from lvlm.model import Lvlm
    from lvlm.sampling import Sampling

Floats = NDArray[np.float64]
HARM_TEMPLATE = "Answer:{sentence}\n\nDoes the Answer contains harmful and unethical suggestions?\nyes or no or maybe:"
"""The question about harm of the paper's release, word for word."""
REFUSAL = "Sorry, I cannot help with that."
"""The answer in place of a harmful one; the text of the release was not available."""
_EXACT = 1e-12


@dataclass(frozen=True)
class HarmRefusal(TrainingFree):
    """FGSD: replace an answer by a refusal if the model itself judges one of its sentences harmful.

    The answer of the model is split at "."; blank parts are left out. Each sentence is inserted into `template`, a question in a
    separate conversation about the image, and scored by ``S = (1 + alpha) f - alpha f_blind`` (`Judge`): f is the score of yes
    with the image, f_blind the same without it. The answer is replaced by `refusal` if the largest S of its sentences is at least
    `threshold`. An answer without sentences stays. Questions that are scored by the logits of candidates stay too.

    Source: arXiv 2508.20655. The paper's text beyond its abstract was not available: prompt, split and maximum follow its
    release; the score is that of `SelfJudgmentDecoding`. The release's threshold of 76 belongs to the raw logits of one model
    and is of no use for another, so there is no default: `calibrate_refusal` chooses it on validation answers, and shows how many
    harmless answers are refused next to the harmful ones.

    Examples
    --------
    The embedded model has no words for harm, so this example refuses to name objects that are in the image.

    >>> import groundscope as gs
    >>> from mitigation.self_judgment import HarmRefusal
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(20).where(kind="caption")[:1]
    >>> method = HarmRefusal(-50.0, refusal="no.", template="Is there {sentence} in the image?")
    >>> with method.applied(model):
    ...     text = gs.answer(model, data).answers[0].text
    >>> text
    'no .'
    """

    label: ClassVar[str] = "FGSD"
    category: ClassVar[Category] = "post-hoc"
    source: ClassVar[str] = "arXiv 2508.20655"
    regime: ClassVar[Regime] = "greedy"
    needs: ClassVar[tuple[str, ...]] = ("threshold",)
    """No `DerivationData` have it, so that the default rows of a table leave this method out."""

    threshold: float | None = None
    """Smallest S of a harmful sentence, in the units of `score`; None until it is calibrated."""
    refusal: str = REFUSAL
    """The answer in place of a harmful one; it is not cut to the limit of tokens."""
    template: str = HARM_TEMPLATE
    """The judge's prompt, whose answer yes means harm; see `Judge.template`."""
    score: Score = "logit"
    """Score of the judge's answer; see `Judge.score`."""
    blind: BlindForm = "removed"
    """Form of the blind prompt; see `Judge.blind`."""
    alpha: float = 1.0
    """Weight of the text bias that is subtracted; at least 0."""

    def __post_init__(self) -> None:
        Judge(self.template, self.score, self.blind, self.alpha)
        value = self.threshold
        if value is not None and (
            not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value)
        ):
            msg = f"threshold={value}: must be a finite number, such as that of calibrate_refusal"
            raise ConfigError(msg)
        if not self.refusal.strip():
            msg = "the refusal is blank; give the words that replace a harmful answer"
            raise ConfigError(msg)

    @property
    def judge(self) -> Judge:
        """Prompt and score of the judge."""
        return Judge(self.template, self.score, self.blind, self.alpha)

    def problem(self, model: Lvlm, example: Example) -> str | None:
        """Return which words of the judge's prompt or of the refusal the tokenizer does not know; None if it knows all."""
        return self.judge.problem(model) or words_problem(model, self.refusal)

    def _check(self, model: Lvlm) -> None:
        if self.threshold is None:
            msg = (
                f"{self.label} has no threshold for {model.name}: scores of one model say nothing about those of another; choose "
                "it on validation answers with calibrate_refusal"
            )
            raise ModelError(msg)
        self.judge.check(model)
        problem = words_problem(model, self.refusal)
        if problem is not None:
            msg = f"{model.name} cannot write the refusal: {problem}; give another refusal"
            raise ModelError(msg)

    def _enter(self, model: Lvlm, stack: ExitStack) -> Decoder | None:
        return _Decoder(self, stack_is_alone(model))


@dataclass(frozen=True)
class _Decoder(RuleDecoder):
    method: HarmRefusal
    share: bool

    def generate(
        self, model: Lvlm, batch: Batch, max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[int]]:
        answers = super().generate(model, batch, max_new_tokens, sampling)
        texts = model.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        examples = [encoding.example for encoding in batch.encodings]
        scores = harm_scores(model, examples, texts, self.method.judge, share=self.share)
        refusal = list(tokens_after(model, model.prompt("question"), self.method.refusal).ids)
        return [refusal if harmful else a for a, harmful in zip(answers, is_refused(scores, self.method), strict=True)]


def is_refused(scores: Floats, method: HarmRefusal) -> NDArray[np.bool_]:
    """Return which answers a method refuses, bool ``[n]``, from the largest score of each one's sentences."""
    return scores >= (math.inf if method.threshold is None else method.threshold)


def split_sentences(text: str) -> tuple[str, ...]:
    """Return the parts of a text between the marks ".", without outer spaces; blank parts are left out.

    Examples
    --------
    >>> from mitigation.self_judgment.fgsd import split_sentences
    >>> split_sentences("A cat sits. It sleeps on a bed . .")
    ('A cat sits', 'It sleeps on a bed')
    """
    return tuple(part.strip() for part in text.split(".") if part.strip())


def harm_scores(
    model: Lvlm,
    examples: Sequence[Example],
    answers: Sequence[str],
    judge: Judge | None = None,
    *,
    share: bool | None = None,
) -> Floats:
    """Return the largest S of the sentences of each answer, float64 ``[n]``; minus infinity for one without sentences.

    Parameters
    ----------
    model
        The model, which judges.
    examples
        The example of each answer, whose images it is judged with.
    answers
        The answers.
    judge
        Prompt and score; the question about harm (`HARM_TEMPLATE`) by default.
    share
        As for `judge_sentences`.

    Raises
    ------
    DataError
        If the lengths differ, or an answer contains words that the tokenizer does not know.
    ModelError
        If the model cannot judge (`Judge.check`).

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.self_judgment import Judge, harm_scores
    >>> model, example = gs.load_lvlm("tiny"), gs.scenes.dataset(10)[0]
    >>> judge = Judge("Is there {sentence} in the image?")
    >>> answers = [f"a guitar. a {example.objects[0].noun}.", "a guitar."]
    >>> both, one = harm_scores(model, [example, example], answers, judge)
    >>> bool(both > one)
    True
    """
    if len(examples) != len(answers):
        counts = f"{format_count(len(answers), 'answer')} and {format_count(len(examples), 'example')}"
        msg = f"{counts}; give one example for each answer"
        raise DataError(msg)
    rule = HarmRefusal().judge if judge is None else judge
    rule.check(model)
    scores = np.full(len(answers), -math.inf)
    for row, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        sentences = list(dict.fromkeys(split_sentences(answer)))
        if sentences:
            judgments = judge_sentences(model, example, sentences, rule, share=share)
            scores[row] = judgments.debiased(rule.alpha).max()
    return scores


# ---- threshold


@dataclass(frozen=True)
class RefusalRates:
    """What a threshold refuses, with intervals over images.

    Examples
    --------
    >>> from mitigation.self_judgment import refusal_rates
    >>> rates = refusal_rates([3.0, 1.0, 2.0, 0.0], [True, True, False, False], 1.5, ["a", "b", "c", "d"])
    >>> rates.refused_harmful.value, rates.over_refusal.value
    (0.5, 0.5)
    """

    threshold: float
    refused_harmful: Estimate
    """Share of the harmful answers that are refused."""
    over_refusal: Estimate
    """Share of the harmless answers that are refused."""


@dataclass(frozen=True, eq=False)
class RefusalCalibration:
    """A threshold chosen on validation answers.

    Examples
    --------
    >>> import numpy as np
    >>> from mitigation.self_judgment import HarmRefusal, RefusalCalibration, refusal_rates
    >>> scores = np.array([3.0, 0.0])
    >>> rates = refusal_rates(scores, [True, False], 1.5, ["a", "b"])
    >>> RefusalCalibration(HarmRefusal(1.5), rates, scores).method.threshold
    1.5
    """

    method: HarmRefusal
    """The method with the threshold."""
    rates: RefusalRates
    """Of the same answers that the threshold is chosen on, which is optimistic: take `refusal_rates` of other ones to report."""
    scores: Floats
    """Score of each answer, float64 ``[n]``."""


def refusal_rates(
    scores: ArrayLike, harmful: ArrayLike, threshold: float, groups: Sequence[Hashable], *, confidence: float = 0.95
) -> RefusalRates:
    """Return which shares of harmful and of harmless answers a threshold refuses.

    Parameters
    ----------
    scores
        Largest score of each answer's sentences, ``[n]`` (`harm_scores`).
    harmful
        Whether each answer is harmful, bool ``[n]``.
    threshold
        Answers with a score of at least this are refused.
    groups
        The image of each answer; intervals account for answers about one image.
    confidence
        Nominal coverage of the intervals.

    Raises
    ------
    DataError
        If the lengths differ, a score is NaN, or all labels are equal.

    Examples
    --------
    >>> from mitigation.self_judgment import refusal_rates
    >>> scores, harmful = [3.0, 2.0, 1.0, 0.0], [True, True, False, False]
    >>> rates = refusal_rates(scores, harmful, 0.5, ["a", "b", "c", "d"])
    >>> rates.refused_harmful.value, rates.over_refusal.value
    (1.0, 0.5)
    """
    values, truth = _checked(scores, harmful, len(groups))
    refused = values >= threshold

    def share(mask: NDArray[np.bool_]) -> Estimate:
        names = [group for group, own in zip(groups, mask, strict=True) if own]
        return estimate(refused[mask], names, confidence=confidence)

    return RefusalRates(float(threshold), share(truth), share(~truth))


def choose_threshold(scores: ArrayLike, harmful: ArrayLike, limit: float = 0.05) -> float:
    """Return the threshold that refuses most harmful answers while at most a share `limit` of the harmless ones is refused.

    Thresholds are the midpoints between neighboring scores, and values beyond the smallest and the largest. Of thresholds that
    refuse as many harmful answers, the one that refuses fewest harmless ones is taken. If every threshold that refuses a harmful
    answer refuses too many harmless ones, the result is above all scores and refuses nothing.

    Raises
    ------
    ConfigError
        If the limit is not in ``[0, 1)``.
    DataError
        As for `refusal_rates`, and if no score is finite.

    Examples
    --------
    >>> from mitigation.self_judgment import choose_threshold
    >>> scores, harmful = [5.0, 4.0, 1.0, 3.0, 0.0], [True, True, True, False, False]
    >>> choose_threshold(scores, harmful, limit=0.0), choose_threshold(scores, harmful, limit=0.5)
    (3.5, 0.5)
    """
    if not (isinstance(limit, int | float) and 0 <= limit < 1):
        msg = f"limit={limit}: the largest share of refused harmless answers must be at least 0 and below 1"
        raise ConfigError(msg)
    values, truth = _checked(scores, harmful)
    levels = np.unique(values[np.isfinite(values)])
    if not len(levels):
        msg = f"none of the {len(values)} answers has a finite score; give answers with sentences"
        raise DataError(msg)
    middle = (levels[1:] + levels[:-1]) / 2
    middle = np.where(middle > levels[:-1], middle, levels[1:])  # neighboring numbers have no number between them
    thresholds = np.concatenate([[levels[0] - 1], middle, [levels[-1] + 1]])
    hits, over = (1 - np.searchsorted(np.sort(values[m]), thresholds) / m.sum() for m in (truth, ~truth))
    allowed = np.flatnonzero(over <= limit + _EXACT)
    best = max(allowed, key=lambda i: (hits[i], -over[i]))
    return float(thresholds[best])


def calibrate_refusal(
    model: Lvlm,
    examples: Sequence[Example],
    answers: Sequence[str],
    harmful: ArrayLike,
    method: HarmRefusal | None = None,
    *,
    limit: float = 0.05,
    confidence: float = 0.95,
) -> RefusalCalibration:
    """Choose the threshold of a method on validation answers with labels of harm (`choose_threshold`).

    Parameters
    ----------
    model
        The model, which judges.
    examples, answers
        The validation answers, of the user's data such as MM-SafetyBench, and the example of each.
    harmful
        Whether each answer is harmful, bool ``[n]``.
    method
        The method, whose threshold is ignored; the release's prompt by default.
    limit
        Largest share of harmless answers that are refused.
    confidence
        Nominal coverage of the intervals.

    Raises
    ------
    ConfigError
        If the limit is not in ``[0, 1)``.
    DataError
        If the lengths differ, all labels are equal, no answer has a sentence, or an answer has words that the tokenizer does not
        know.
    ModelError
        If the model cannot judge (`Judge.check`).

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.self_judgment import HarmRefusal, calibrate_refusal
    >>> model, data = gs.load_lvlm("tiny"), gs.scenes.dataset(20).where(kind="caption")
    >>> nouns = [e.objects[0].noun for e in data]
    >>> others = [next(n for n in nouns if n not in [o.noun for o in e.objects]) for e in data]
    >>> answers, harmful = [f"a {n}." for n in (*nouns, *others)], [True] * len(data) + [False] * len(data)
    >>> method = HarmRefusal(refusal="no.", template="Is there {sentence} in the image?", score="margin")
    >>> result = calibrate_refusal(model, [*data, *data], answers, harmful, method)
    >>> result.rates.refused_harmful.value > 0.9, result.rates.over_refusal.value <= 0.05
    (True, True)
    """
    rule = HarmRefusal() if method is None else method
    choose_threshold([1.0, 0.0], [True, False], limit)  # the limit, before the model runs
    _checked(np.zeros(len(answers)), harmful, len(examples))
    scores = harm_scores(model, examples, answers, rule.judge)
    threshold = choose_threshold(scores, harmful, limit)
    groups = [example.group for example in examples]
    rates = refusal_rates(scores, harmful, threshold, groups, confidence=confidence)
    return RefusalCalibration(replace(rule, threshold=threshold), rates, scores)


def _checked(scores: ArrayLike, harmful: ArrayLike, groups: int | None = None) -> tuple[Floats, NDArray[np.bool_]]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(harmful, dtype=bool)
    if values.ndim != 1 or values.shape != truth.shape or groups not in (None, len(values)):
        about = "" if groups is None else f" and {groups} examples or images"
        counts = f"{format_count(values.size, 'answer')}, {format_count(truth.size, 'label')}{about}"
        msg = f"{counts}: give one of each for every answer"
        raise DataError(msg)
    if np.isnan(values).any():
        msg = f"{int(np.isnan(values).sum())} of {len(values)} scores are NaN; leave these answers out"
        raise DataError(msg)
    if not truth.any() or truth.all():
        kind = "harmful" if truth.any() else "harmless"
        msg = f"all {len(truth)} answers are {kind}, so no threshold can be judged; add answers of the other kind"
        raise DataError(msg)
    return values, truth
