"""Guards: losses that restrict a correction, each with a limit, such as fewer right neutral answers or fewer objects named.

A correction that answers "no" to everything removes every false "yes". So a strength is chosen by its losses, too. `guards` is an
open table: a package adds a guard with ``guards.register(name, Guard(…))`` or an entry point of the group ``groundscope.guards``.
A guard that a dataset cannot have (captions without annotated objects, questions about present objects) is not measured, and the
report states it. `mitigation.guard_loss` measures the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from behavior import BehaviorResult
from behavior.chair import ChairResult
from behavior.metrics import METRICS, score_dataset_captions
from behavior.result import Answer
from groundscope.core.errors import ConfigError
from groundscope.core.registry import Registry
from groundscope.core.text import nearest
from mitigation.model_outputs import ModelOutputs

Worse = Literal["lower", "higher", "farther from 0", "another length"]
MAX_DROP = 0.015
"""Default limit of the guards on answers to questions."""

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
    rows: Callable[[ModelOutputs, ModelOutputs], Rows | None]
    """The rows of the ratio, from the outputs with a correction and those without; None if the data have no such questions."""
    worse: Worse
    """Direction of a loss. ``another length`` is the relative change in either direction."""
    limit: float
    """Largest allowed loss: a share, so 0.015 is 1.5 percentage points."""
    needs: str
    """What the data must have, for the message about a guard that was not measured."""

    def loss(self, before: float, after: float) -> float:
        """Return how much worse a value is; negative for an improvement."""
        changes = np.array([before, after])
        return float(self.losses(changes[:1], changes[1:])[0])

    def losses(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return how much worse each of several values is."""
        if self.worse == "lower":
            return before - after
        if self.worse == "higher":
            return after - before
        if self.worse == "farther from 0":
            return np.abs(after) - np.abs(before)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.abs(after - before) / before


def _rate_of(
    includes: Callable[[Answer], bool], counts: Callable[[Answer], bool]
) -> Callable[[ModelOutputs, ModelOutputs], Rows | None]:
    """Return the rows of a rate over some answers."""

    def rows(outputs: ModelOutputs, _before: ModelOutputs) -> Rows | None:
        answers = [a for a in outputs.answers.answers if includes(a)]
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


def _yes_beyond(outputs: ModelOutputs, _before: ModelOutputs) -> Rows | None:
    answers = [a for a in outputs.answers.answers if set(a.candidates) == {"yes", "no"}]
    if not answers:
        return None
    beyond = [float(a.given == "yes") - float(a.answer == "yes") for a in answers]
    return np.column_stack([beyond, np.ones(len(answers))]), [a.group for a in answers]


def _captions(outputs: ModelOutputs) -> list[Answer]:
    return [a for a in outputs.answers.answers if a.kind == "caption" and a.text is not None]


def _scored(outputs: ModelOutputs) -> tuple[ChairResult, Mapping[str, str]] | None:
    """Return the scores of captions and the group of each; None without captions of annotated images."""
    annotated = {e.id for e in outputs.data if e.kind == "caption" and e.objects}
    captions = [a for a in _captions(outputs) if a.id in annotated]
    if not captions:
        return None
    scores = score_dataset_captions(BehaviorResult(tuple(captions), outputs.answers.cost), outputs.data)
    return scores, {a.id: a.group for a in captions}


def _invented(outputs: ModelOutputs, _before: ModelOutputs) -> Rows | None:
    scored = _scored(outputs)
    if scored is None:
        return None
    scores, groups = scored
    table = np.array([[len(c.hallucinated), len(c.mentioned)] for c in scores.captions], float)
    return table, [groups[c.id] for c in scores.captions]


def _named(outputs: ModelOutputs, _before: ModelOutputs) -> Rows | None:
    scored = _scored(outputs)
    if scored is None:
        return None
    scores, groups = scored
    counts = [(len(set(c.mentioned) - set(c.hallucinated)), len(set(c.missed))) for c in scores.captions]
    table = np.array([[named, named + missed] for named, missed in counts], float)
    return table, [groups[c.id] for c in scores.captions]


def _words(outputs: ModelOutputs, _before: ModelOutputs) -> Rows | None:
    captions = _captions(outputs)
    if not captions:
        return None
    table = np.array([[len((a.text or "").split()), 1.0] for a in captions])
    return table, [a.group for a in captions]


def _agreement(outputs: ModelOutputs, before: ModelOutputs) -> Rows | None:
    if outputs.plain_text is None or before.plain_text is None:
        return None
    table = [[float((a == b).sum()), float(len(b))] for a, b in zip(outputs.plain_text, before.plain_text, strict=True)]
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
    """Return the limit of each guard; None for no limit.

    An override takes precedence over `max_drop`, which replaces the defaults of the guards `LIMITED_BY_MAX_DROP`.

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
