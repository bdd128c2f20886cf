"""Guards: what a correction must not cost, measured on any data that has it, with a limit for each.

A correction that answers "no" to everything removes every false "yes". So a strength is chosen by its losses, too. `guards` is an
open table: a package adds a guard with ``guards.register(name, Guard(…))`` or an entry point of the group ``groundscope.guards``.
A guard that a dataset cannot have (captions without annotated objects, questions about present objects) is not measured, and the
report states it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from behavior import BehaviorResult, Cost, answer
from behavior.chair import ChairResult
from behavior.comparison import change_estimate
from behavior.metrics import METRICS, score_dataset_captions
from behavior.result import Answer
from circuits import intervened
from concepts.schema import ConceptDataset, Example
from groundscope.core.errors import ConfigError
from groundscope.core.registry import Registry
from groundscope.core.statistics import Estimate, cluster_bootstrap, estimate, group_totals, ratio
from groundscope.core.text import nearest

if TYPE_CHECKING:
    from lvlm.model import Lvlm
    from mitigation.steering.vector import SteeringVector

Worse = Literal["lower", "higher", "farther from 0", "another length"]
MAX_DROP = 0.015
"""Default limit of the guards on answers to questions."""
CAPTIONS = 60
"""Largest number of images that are described to measure a cost."""
TEXTS = 24
"""Largest number of plain texts that are continued."""
CAPTION_TOKENS = 40
TEXT_TOKENS = 12


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a model says in one condition: answers to questions, and its predictions on plain text.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.guard import Outcome
    >>> data = gs.ConceptDataset("two questions", gs.scenes.dataset(10)[:2])
    >>> Outcome(data, gs.answer(gs.load_lvlm("tiny"), data, progress=False)).plain_text is None
    True
    """

    data: ConceptDataset
    """The questions and caption prompts that were asked."""
    answers: BehaviorResult
    plain_text: tuple[np.ndarray, ...] | None = None
    """For each text the token with the largest logit at each position of its continuation; None if not measured."""


Rows = tuple[np.ndarray, Sequence[Hashable]]
"""Numerator and denominator of each row, ``[n, 2]``, and the group of each row (its image)."""


@dataclass(frozen=True)
class Guard:
    """A measure with a limit on its loss: an entry of `guards`.

    Examples
    --------
    >>> from mitigation.guard import guards
    >>> guards["recall"].limit
    0.015
    """

    label: str
    """Name in tables."""
    rows: Callable[[Outcome, Outcome], Rows | None]
    """From an outcome and that of the model without correction to the rows of the ratio; None if the data do not have it."""
    worse: Worse
    """Direction of a loss. ``another length`` is the relative change in either direction."""
    limit: float
    """Largest allowed loss: a share, so 0.015 is 1.5 percentage points."""
    needs: str
    """What the data must have, for the message about a guard that was not measured."""

    def loss(self, before: float, after: float) -> float:
        """Return how much worse a value is; negative for an improvement."""
        changes = np.array([before, after])
        return float(self._losses(changes[:1], changes[1:])[0])

    def _losses(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        if self.worse == "lower":
            return before - after
        if self.worse == "higher":
            return after - before
        if self.worse == "farther from 0":
            return np.abs(after) - np.abs(before)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.abs(after - before) / before


@dataclass(frozen=True)
class GuardResult:
    """A guard before and after a correction, with 95 % intervals clustered by image.

    Examples
    --------
    >>> from groundscope.core.statistics import Estimate
    >>> from mitigation.guard import GuardResult
    >>> rate = Estimate(0.9, 0.8, 1.0, 40)
    >>> GuardResult(rate, rate, Estimate(0.0, 0.0, 0.0, 40)).loss.value
    0.0
    """

    before: Estimate
    after: Estimate
    loss: Estimate
    """Paired: both conditions answer the same questions."""


def _rate_of(
    includes: Callable[[Answer], bool], counts: Callable[[Answer], bool]
) -> Callable[[Outcome, Outcome], Rows | None]:
    """Return the rows of a rate over some answers."""

    def rows(outcome: Outcome, _before: Outcome) -> Rows | None:
        answers = [a for a in outcome.answers.answers if includes(a)]
        if not answers:
            return None
        table = np.column_stack([[float(counts(a)) for a in answers], np.ones(len(answers))])
        return table, [a.group for a in answers]

    return rows


def _asks_presence(answer: Answer) -> bool:
    return answer.kind == "existence" and set(answer.candidates) == {"yes", "no"} and answer.answer == "yes"


def _is_other(answer: Answer) -> bool:
    """Whether a question belongs neither to the errors to correct nor to those about present or absent objects."""
    aimed = answer.kind == "existence" or METRICS["conflict: wrong by prior"].applies(answer)
    return answer.correct is not None and not aimed


def _yes_beyond(outcome: Outcome, _before: Outcome) -> Rows | None:
    answers = [a for a in outcome.answers.answers if set(a.candidates) == {"yes", "no"}]
    if not answers:
        return None
    beyond = [float(a.given == "yes") - float(a.answer == "yes") for a in answers]
    return np.column_stack([beyond, np.ones(len(answers))]), [a.group for a in answers]


def _captions(outcome: Outcome) -> list[Answer]:
    return [a for a in outcome.answers.answers if a.kind == "caption" and a.text is not None]


def _scored(outcome: Outcome) -> tuple[ChairResult, Mapping[str, str]] | None:
    """Return the scores of captions and the group of each; None without captions of annotated images."""
    annotated = {e.id for e in outcome.data if e.kind == "caption" and e.objects}
    captions = [a for a in _captions(outcome) if a.id in annotated]
    if not captions:
        return None
    scores = score_dataset_captions(BehaviorResult(tuple(captions), outcome.answers.cost), outcome.data)
    return scores, {a.id: a.group for a in captions}


def _invented(outcome: Outcome, _before: Outcome) -> Rows | None:
    scored = _scored(outcome)
    if scored is None:
        return None
    scores, groups = scored
    table = np.array([[len(c.hallucinated), len(c.mentioned)] for c in scores.captions], float)
    return table, [groups[c.id] for c in scores.captions]


def _named(outcome: Outcome, _before: Outcome) -> Rows | None:
    scored = _scored(outcome)
    if scored is None:
        return None
    scores, groups = scored
    counts = [(len(set(c.mentioned) - set(c.hallucinated)), len(set(c.missed))) for c in scores.captions]
    table = np.array([[named, named + missed] for named, missed in counts], float)
    return table, [groups[c.id] for c in scores.captions]


def _words(outcome: Outcome, _before: Outcome) -> Rows | None:
    captions = _captions(outcome)
    if not captions:
        return None
    table = np.array([[len((a.text or "").split()), 1.0] for a in captions])
    return table, [a.group for a in captions]


def _agreement(outcome: Outcome, before: Outcome) -> Rows | None:
    if outcome.plain_text is None or before.plain_text is None:
        return None
    table = [[float((a == b).sum()), float(len(b))] for a, b in zip(outcome.plain_text, before.plain_text, strict=True)]
    return np.array(table), list(range(len(table)))


def _problem(entry: Guard) -> str | None:
    return None if isinstance(entry, Guard) else "it must be a mitigation.Guard"


guards: Registry[Guard] = Registry(
    "guard",
    {
        "recall": Guard(
            "present objects denied",
            _rate_of(_asks_presence, lambda a: a.given == "no"),
            "higher",
            MAX_DROP,
            "questions about the presence of an object that is in the image",
        ),
        "neutral": Guard(
            "neutral: right",
            _rate_of(METRICS["neutral: right"].applies, METRICS["neutral: right"].counts),
            "lower",
            MAX_DROP,
            "questions of split 'neutral'",
        ),
        "typical": Guard(
            "typical color: right",
            _rate_of(METRICS["typical color: right"].applies, METRICS["typical color: right"].counts),
            "lower",
            MAX_DROP,
            "questions of split 'typical'",
        ),
        "other_questions": Guard(
            "other questions: right",
            _rate_of(_is_other, lambda a: bool(a.correct)),
            "lower",
            MAX_DROP,
            "questions other than those about the presence of objects or against a prior",
        ),
        "yes_ratio": Guard(
            "answers yes beyond the true share",
            _yes_beyond,
            "farther from 0",
            0.03,
            "questions with the answers yes and no",
        ),
        "chair": Guard(
            "captions: invented of named (CHAIR_i)",
            _invented,
            "higher",
            0.01,
            "caption prompts and annotated objects",
        ),
        "caption_recall": Guard(
            "captions: named of shown (recall)", _named, "lower", 0.02, "caption prompts and annotated objects"
        ),
        "caption_length": Guard("captions: words", _words, "another length", 0.1, "a model that describes images"),
        "plain_text": Guard(
            "same next token on plain text", _agreement, "lower", 0.2, "a model that reads text without an image"
        ),
    },
    group="groundscope.guards",
    check=_problem,
)
"""Guards by name, in the order of tables."""
ON_QUESTIONS = ("recall", "neutral", "typical", "other_questions", "yes_ratio")
"""Guards that need only answers to questions, so they are measured for every strength."""
LIMITED_BY_MAX_DROP = ("recall", "neutral", "typical", "other_questions")
"""Guards whose default limit is the option ``steer.max_drop`` of a run."""


def guard_limits(overrides: Mapping[str, float | None], max_drop: float | None = None) -> dict[str, float | None]:
    """Return the limit of each guard: its default, `max_drop` for answers to questions, or an override; None for no limit.

    Raises
    ------
    ConfigError
        For an unknown guard, or a limit below 0.

    Examples
    --------
    >>> from mitigation.guard import guard_limits
    >>> limits = guard_limits({"chair": 0.02, "plain_text": None}, max_drop=0.01)
    >>> limits["chair"], limits["plain_text"], limits["recall"]
    (0.02, None, 0.01)
    """
    limits: dict[str, float | None] = {name: guard.limit for name, guard in guards.usable().items()}
    if max_drop is not None:
        limits |= dict.fromkeys(LIMITED_BY_MAX_DROP, max_drop)
    for name, limit in overrides.items():
        if name not in limits:
            msg = f"unknown guard '{name}'; choose from {', '.join(limits)}{nearest(name, limits)}"
            raise ConfigError(msg)
        if limit is not None and not limit >= 0:
            msg = f"guard '{name}': the limit {limit:g} must be at least 0, or null for no limit"
            raise ConfigError(msg)
        limits[name] = limit
    return limits


def losses(before: Outcome, after: Outcome, names: Sequence[str] | None = None) -> dict[str, float]:
    """Return the loss of each guard that the data have, without intervals.

    Examples
    --------
    >>> from dataclasses import replace
    >>> import groundscope as gs
    >>> from mitigation.guard import Outcome, losses
    >>> data = gs.ConceptDataset("questions", gs.scenes.dataset(10, splits=["neutral"])[:8])
    >>> answers = gs.answer(gs.load_lvlm("tiny"), data, progress=False)
    >>> denied = replace(answers, answers=tuple(replace(a, given="no") for a in answers.answers))
    >>> losses(Outcome(data, answers), Outcome(data, denied), ["recall"])
    {'recall': 1.0}
    """
    result: dict[str, float] = {}
    for name, guard in guards.usable().items():
        if names is None or name in names:
            first, second = guard.rows(before, before), guard.rows(after, before)
            if first is not None and second is not None:
                values = [
                    table[:, 0].sum() / table[:, 1].sum() if table[:, 1].sum() else np.nan
                    for table, _ in (first, second)
                ]
                result[name] = guard.loss(*values)
    return result


def loss_errors(before: Outcome, after: Outcome, names: Sequence[str] | None = None) -> dict[str, float]:
    """Return the standard error of the loss of each guard that the data have: paired, and clustered by image.

    By the delta method: a ratio ``r = sum a / sum b`` depends on row i by ``(a_i - r b_i) / sum b``; the contributions of the
    rows of an image are added (Cochran 1977, Sampling Techniques, ch. 6).

    Examples
    --------
    >>> from dataclasses import replace
    >>> import groundscope as gs
    >>> from mitigation.guard import Outcome, loss_errors
    >>> data = gs.ConceptDataset("questions", gs.scenes.dataset(10, splits=["neutral"])[:24])
    >>> answers = gs.answer(gs.load_lvlm("tiny"), data, progress=False)
    >>> loss_errors(Outcome(data, answers), Outcome(data, answers), ["neutral"])
    {'neutral': 0.0}
    """
    result: dict[str, float] = {}
    for name, guard in guards.usable().items():
        if names is None or name in names:
            first, second = guard.rows(before, before), guard.rows(after, before)
            if first is not None and second is not None:
                (table, groups), (other, _) = first, second
                result[name] = _loss_error(guard, table, other, groups)
    return result


def _loss_error(guard: Guard, table: np.ndarray, other: np.ndarray, groups: Sequence[Hashable]) -> float:
    """Return the standard error of a loss; NaN where a ratio is not defined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        (a, b), (c, d) = table.T, other.T
        change = (c - c.sum() / d.sum() * d) / d.sum() - (a - a.sum() / b.sum() * b) / b.sum()
        if guard.worse == "another length":
            change = change / (a.sum() / b.sum())
    totals = group_totals(change[:, None], groups)[:, 0]
    n = len(totals)
    return float(np.sqrt(n / (n - 1) * (totals**2).sum())) if n > 1 else float("inf")


def excess(values: Mapping[str, float], limits: Mapping[str, float | None]) -> float:
    """Return the largest loss in units of its limit; at most 1 if every guard holds, and at most 0 without any loss.

    A measure that a correction makes undefined (nothing is named any more) exceeds its limit.

    Examples
    --------
    >>> from mitigation.guard import excess
    >>> excess({"recall": 0.003, "chair": 0.02}, {"recall": 0.015, "chair": 0.01})
    2.0
    """
    worst = 0.0
    for name, loss in values.items():
        limit = limits.get(name)
        if limit is not None:
            share = np.inf if np.isnan(loss) else loss / limit if limit else (np.inf if loss > 0 else 0.0)
            worst = max(worst, float(share))
    return worst


def measure_guards(before: Outcome, after: Outcome) -> dict[str, GuardResult]:
    """Return each guard that the data have, before and after a correction, with its loss and 95 % intervals over images.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.guard import Outcome, measure_guards
    >>> data = gs.ConceptDataset("questions", gs.scenes.dataset(20, splits=["neutral"]))
    >>> outcome = Outcome(data, gs.answer(gs.load_lvlm("tiny"), data, progress=False))
    >>> measure_guards(outcome, outcome)["neutral"].loss.value
    0.0
    """
    results: dict[str, GuardResult] = {}
    for name, guard in guards.usable().items():
        first, second = guard.rows(before, before), guard.rows(after, before)
        if first is None or second is None:
            continue
        (table, groups), (other, _) = first, second
        results[name] = GuardResult(
            _rate(table, groups),
            _rate(other, groups),
            _paired(guard, table, other, groups),
        )
    return results


def _rate(table: np.ndarray, groups: Sequence[Hashable]) -> Estimate:
    """Return a ratio with its interval: the one for rates, which is valid near 0 and 1, where it is a rate."""
    if bool(((table[:, 0] >= 0) & (table[:, 0] <= table[:, 1])).all()):
        return estimate(table[:, 0], list(groups), table[:, 1])
    return _bootstrapped(table, groups, ratio)


def _paired(guard: Guard, table: np.ndarray, other: np.ndarray, groups: Sequence[Hashable]) -> Estimate:
    """Return the loss with a paired interval: the one for changes of answers where every row is one answer."""
    sign = {"lower": -1, "higher": 1}.get(guard.worse)
    both = np.concatenate([table, other])
    if sign is not None and bool((both[:, 1] == 1).all()) and bool(np.isin(both[:, 0], (0, 1)).all()):
        return change_estimate((sign * (other[:, 0] - table[:, 0])).astype(int), groups)

    def lost(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return guard._losses(ratio(totals[:, :2], counts), ratio(totals[:, 2:], counts))

    return _bootstrapped(np.column_stack([table, other]), groups, lost)


def _bootstrapped(table: np.ndarray, groups: Sequence[Hashable], statistic: Callable[..., np.ndarray]) -> Estimate:
    value = statistic(table.sum(axis=0)[None], np.array([float(len(table))]))[0]
    low, high = cluster_bootstrap(table, groups, statistic)
    return Estimate(float(value), low, high, int(table[:, 1].sum()))


def not_measured(outcome: Outcome) -> dict[str, str]:
    """Return the guards that an outcome does not have, with what the data would need.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.guard import Outcome, not_measured
    >>> data = gs.ConceptDataset("questions", gs.scenes.dataset(10, splits=["neutral"])[:4])
    >>> not_measured(Outcome(data, gs.answer(gs.load_lvlm("tiny"), data, progress=False)))["typical"]
    "not measured: it needs questions of split 'typical'"
    """
    return {
        name: f"not measured: it needs {guard.needs}"
        for name, guard in guards.usable().items()
        if guard.rows(outcome, outcome) is None
    }


# ---- captions and plain text


def caption_prompts(data: ConceptDataset, limit: int = CAPTIONS) -> ConceptDataset:
    """Return prompts for descriptions of at most `limit` images: the data's own, then the same prompt for other images.

    The images are spread over the data. Prompts for data without caption prompts have no annotation, because objects that
    happen to be annotated are not all objects: of their captions only the length is measured.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.guard import caption_prompts
    >>> prompts = caption_prompts(gs.scenes.dataset(20), limit=5)
    >>> len(prompts), {e.question for e in prompts}
    (5, {'Describe the image.'})
    """
    own = [e for e in data if e.kind == "caption"]
    question = own[0].question if own else "Describe the image."
    described = {e.group for e in own}
    first_of: dict[str, Example] = {}
    for example in data:
        first_of.setdefault(example.group, example)
    others = [e for group, e in first_of.items() if group not in described and e.images]
    count = max(0, limit - len(own))
    chosen = others[:: max(1, len(others) // max(count, 1))][:count]
    added = [
        Example(
            id=f"{e.group}/description", image=e.image, question=question, answer="", candidates=(), level="object",
            kind="caption", split="caption", group=e.group, objects=e.objects if own else (),
        )
        for e in chosen
    ]  # fmt: skip
    return ConceptDataset(f"captions of {data.name}", tuple(own[:limit] + added), data.provenance)


@dataclass(frozen=True)
class PlainText:
    """A text without an image, continued by the model without correction."""

    tokens: torch.Tensor
    """``[1, positions]``."""
    start: int
    """First position of the continuation."""


def plain_texts(model: Lvlm, data: ConceptDataset, limit: int = TEXTS) -> list[PlainText] | None:
    """Return prompts of questions without an image, each continued greedily; None for a model that cannot read them.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.guard import plain_texts
    >>> texts = plain_texts(gs.load_lvlm("tiny"), gs.scenes.dataset(10), limit=2)
    >>> len(texts), texts[0].start < texts[0].tokens.shape[1]
    (2, True)
    """
    if model.encoder_decoder or not model.image_encoding.runs_without_image:
        return None
    questions = list(dict.fromkeys(e.question for e in data))
    chosen = questions[:: max(1, len(questions) // limit)][:limit]
    tokenizer, texts = model.processor.tokenizer, []
    for question in chosen:
        text = model.prompt(question, images=0)
        special = model.spec.special_tokens and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        ids = torch.tensor([tokenizer(text, add_special_tokens=special)["input_ids"]], device=model.device)
        if ids.shape[1]:
            texts.append(PlainText(_continued(model, ids), ids.shape[1]))
    return texts


@torch.no_grad()
def _continued(model: Lvlm, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(TEXT_TOKENS):
        logits = model.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@torch.no_grad()
def predict_text(model: Lvlm, texts: Sequence[PlainText]) -> tuple[np.ndarray, ...]:
    """Return for each text the token with the largest logit at each position of its continuation.

    Changes that are active act on the continuation as they do while it is generated.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.guard import plain_texts, predict_text
    >>> model = gs.load_lvlm("tiny")
    >>> texts = plain_texts(model, gs.scenes.dataset(10), limit=1)
    >>> (predictions,) = predict_text(model, texts)
    >>> bool((predictions == texts[0].tokens[0, texts[0].start :].numpy()).all())
    True
    """
    predictions = []
    for text in texts:
        keep = text.tokens.shape[1] - text.start + 1
        inputs = {"input_ids": text.tokens, "attention_mask": torch.ones_like(text.tokens)}
        with model.reading_answers(text.start):
            logits = model.forward(inputs, keep=keep)
        predictions.append(logits[0, :-1].argmax(-1).cpu().numpy())
    return tuple(predictions)


@dataclass(frozen=True, eq=False)
class TextProbe:
    """Prompts with which the cost of a correction on free text is measured.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.guard import TextProbe
    >>> model = gs.load_lvlm("tiny")
    >>> probe = TextProbe.of(model, gs.scenes.dataset(10), captions=2, texts=1)
    >>> len(probe.captions), len(probe.texts)
    (2, 1)
    """

    captions: ConceptDataset
    texts: list[PlainText] | None

    @classmethod
    def of(cls, model: Lvlm, data: ConceptDataset, *, captions: int = CAPTIONS, texts: int = TEXTS) -> TextProbe:
        """Return the prompts for some data; see `caption_prompts` and `plain_texts`."""
        return cls(caption_prompts(data, captions), plain_texts(model, data, texts))

    def outcome(
        self, model: Lvlm, vector: SteeringVector | None, *, batch_size: int = 64, progress: bool | None = None
    ) -> Outcome:
        """Describe the images and continue the texts under a vector; None is the model without correction."""
        with intervened(model, [] if vector is None else vector.interventions()):
            plain = None if self.texts is None else predict_text(model, self.texts)
            if not len(self.captions):
                return Outcome(self.captions, BehaviorResult((), Cost(None, None, 0)), plain)
            answers = answer(
                model, self.captions, batch_size=batch_size, max_new_tokens=CAPTION_TOKENS, progress=progress
            )
        return Outcome(self.captions, answers, plain)


def joined(questions: Outcome, text: Outcome) -> Outcome:
    """Return one outcome from answers to questions and from free text.

    Examples
    --------
    >>> import groundscope as gs
    >>> from mitigation.guard import Outcome, TextProbe, joined
    >>> model, data = gs.load_lvlm("tiny"), gs.ConceptDataset("two", gs.scenes.dataset(10)[:2])
    >>> text = TextProbe.of(model, data, captions=1, texts=1).outcome(model, None, progress=False)
    >>> len(joined(Outcome(data, gs.answer(model, data, progress=False)), text).answers)
    3
    """
    ids = {e.id for e in text.data}
    own_answers = [a for a in questions.answers.answers if a.id not in ids]
    answers = BehaviorResult((*own_answers, *text.answers.answers), questions.answers.cost)
    data = ConceptDataset(
        questions.data.name, (*(e for e in questions.data if e.id not in ids), *text.data), questions.data.provenance
    )
    return Outcome(data, answers, text.plain_text)
