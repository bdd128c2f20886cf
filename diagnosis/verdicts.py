"""From what each stage reads to a verdict: pure rules, no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diagnosis.calibration import FEWEST, LEAST
from diagnosis.narrative import named_stages
from diagnosis.results import (
    LOST,
    NOT_INTEGRATED,
    NOT_READABLE,
    NOT_SEEN,
    OTHER,
    OVERRIDDEN,
    OVERRIDDEN_LATE,
    STAGES,
    Place,
    Reading,
)
from groundscope.core.statistics import wilson

ABSENT = 0.75
"""An accuracy of (1 + c) / 2 is that of knowing in a share c of the cases. A place shows that a concept is absent where even the
upper end of its interval is below this: it is then known in less than half of the cases."""
OWN = 5
"""Held-out examples of a concept without which a place of several concepts, at chance on all of them, says nothing of it."""
_SEEN = ("vision", "projector", "image")
_ABSENT = frozenset({"other", "gone", "unclear"})


def state_of(place: Place, odds: float) -> tuple[float, str]:
    """Return the log-odds that a place can be believed to read, and what it reads; see `Reading.state`."""
    if not place.readable:
        return math.nan, "unreadable"
    if abs(odds) <= place.threshold:
        return odds, "unclear"
    return odds, "truth" if odds > 0 else "other"


@dataclass(frozen=True)
class OwnExamples:
    """How well a place reads the held-out examples of one concept."""

    n: int
    """Examples."""
    accuracy: float
    """Share in which the truth is read, both sides counting the same. NaN where a side is missing, and for questions whose
    answers are the concepts themselves: probes that always read the same concept are right of it and wrong of all others."""
    worth: float
    """Number of independent examples that say as much: no more than there are images."""


def own_examples(read: np.ndarray, sides: np.ndarray, groups: Sequence[str], *, two: bool) -> OwnExamples:
    """Count the held-out examples of one concept.

    Parameters
    ----------
    read
        ``[n]``, for each the share of rivals against which the truth is read.
    sides, groups
        Of each, as for `diagnosis.calibration.calibrate`.
    two
        Whether questions of the kind have truths of two sides.
    """
    n = len(read)
    parts = [read[sides == side] for side in (1, 0)]
    if not two or not all(len(part) for part in parts):
        return OwnExamples(n, math.nan, 0.0)
    # The mean of both sides varies as one share of so many examples; n where the sides are equally large.
    worth = 4 / sum(1 / len(part) for part in parts)
    return OwnExamples(n, float(np.mean([part.mean() for part in parts])), min(worth, len(set(groups))))


def place_of_concept(place: Place, own: OwnExamples) -> Place | None:
    """Return a place as it reads one concept, or None where it says nothing of it.

    A place is calibrated on all concepts of a kind of question together. That counts for a concept unless the concept's own
    held-out examples say otherwise: where their interval (Wilson) and that of the place do not overlap, their own counts.
    """
    if not place.readable and own.n < OWN:
        return None
    if own.worth < FEWEST or math.isnan(own.accuracy) or math.isnan(place.accuracy):
        return place
    low, high = wilson(own.accuracy * own.worth, own.worth)
    if low <= place.high and high >= place.low:
        return place
    readable = place.slope > 0 and low > 0.5 and own.accuracy >= LEAST
    return replace(place, n=own.n, accuracy=own.accuracy, low=low, high=high, readable=readable)


def stage_state(states: Sequence[str], places: Sequence[Place], stage: str) -> str:
    """Return what a stage reads of one example.

    Parameters
    ----------
    states
        Of the places the stage is judged by.
    places
        All places that read the concept of the question, as they read it (`place_of_concept`).
    stage
        One of `STAGES`.

    Returns
    -------
    str
        ``truth``, ``other``, ``unclear``; ``gone`` where the places that the stage is judged by show that the concept is absent
        (`ABSENT`), and no later place reads it; ``unknown`` where nothing reads this concept, the intervals are too wide to say
        either, or a later place reads it: what is read later was there before.
    """
    for state in ("truth", "unclear", "other"):
        if state in states:
            return state
    later = STAGES[STAGES.index(stage) :]
    judged = _judged_by(places, stage)
    absent = bool(judged) and all(p.high < ABSENT for p in judged)
    return "gone" if absent and not any(p.readable for p in places if p.stage in later) else "unknown"


def _judged_by(places: Sequence[Place], stage: str) -> list[Place]:
    """Return the places that a stage is judged by and that were tested at all."""
    return [p for p in places if p.stage == stage and p.chosen and not math.isnan(p.accuracy)]


def belief(readings: Sequence[Reading], state: str, places: Sequence[Place], stage: str) -> float:
    """Return how probable it is that the truth is there: of the last token's layers the one that reads it best.

    Where the stage shows that the concept is absent, what the upper end of its interval leaves: an accuracy of (1 + c) / 2 is
    that of knowing in a share c.
    """
    if state == "gone":
        known = max(2 * p.high - 1 for p in _judged_by(places, stage))
        return min(0.5, max(0.02, known))
    odds = [r.log_odds for r in readings if not math.isnan(r.log_odds)]
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, max(odds))))) if odds else 0.5


def suggests(said: str, blank: str, sources: Mapping[str, float]) -> bool:
    """Return whether there is evidence that the words alone suggest an answer: of a prior.

    The answer about a blank picture is that answer; and where its log-odds are split by source, the words (prior and prompt)
    speak for it, and more than the image does.
    """
    words = sources.get("prior", math.nan) + sources.get("prompt", math.nan)
    contradicted = not math.isnan(words) and words <= max(0.0, sources["image"])
    return blank == said and not contradicted


def judge(
    states: Mapping[str, str], sure: Mapping[str, float], *, undone: bool, prior: bool = True
) -> tuple[str, float, str]:
    """Return verdict, confidence and the reason of an ``other`` or a ``not readable``.

    Parameters
    ----------
    states
        Of each of `STAGES`, by `stage_state`.
    sure
        Of each the probability that the truth is there, by `belief`.
    undone
        Whether putting some heads or MLPs to their usual values makes the answer right, or taking away what all such answers
        lean to.
    prior
        Whether there is evidence that the words alone suggest the answer (`suggests`); without, what is overridden at the last
        token is ``overridden late``.

    Returns
    -------
    tuple
        The confidence is the probability that the truth is where the verdict says it still was, times that it is not where
        the verdict says it no longer was; of an override, that the last token has it; without a cause 0.
    """
    reads = [stage for stage in STAGES if states[stage] == "truth"]
    before = max((sure[stage] for stage in reads if stage in _SEEN), default=0.0)
    if states["last"] == "truth":
        if not undone:
            return (
                OTHER,
                0.0,
                "the last token reads the truth, but no few heads or MLPs were found that turn the answer, nor does a lean",
            )
        return OVERRIDDEN if prior else OVERRIDDEN_LATE, sure["last"], ""
    if "projector" in reads or "image" in reads:
        if states["last"] == "unknown":
            return NOT_READABLE, 0.0, _unreadable(["last"])
        return NOT_INTEGRATED, before * (1 - sure["last"]), ""
    if "vision" in reads:
        lost = next((stage for stage in ("projector", "image") if states[stage] in _ABSENT), None)
        if lost is None:
            return NOT_READABLE, 0.0, _unreadable(["projector", "image"])
        return LOST, before * (1 - sure[lost]), ""
    if states["vision"] in _ABSENT:
        return NOT_SEEN, 1 - sure["vision"], ""
    return NOT_READABLE, 0.0, _unreadable([stage for stage in _SEEN if states[stage] == "unknown"])


def _unreadable(stages: Sequence[str]) -> str:
    return f"no probe says what this question is about at {named_stages(stages)}"
