"""Rules that derive a verdict from the state of each stage; they need no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diagnosis.calibration import MIN_ACCURACY, MIN_EXAMPLES
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

ABSENCE_ACCURACY = 0.75
"""A place shows the absence of a concept only if the upper end of its accuracy interval is below this value. An accuracy of
(1 + c) / 2 corresponds to a concept that is decodable in a share c of the cases; here in less than half of them."""
MIN_CONCEPT_EXAMPLES = 5
"""Smallest number of held-out examples of a concept for which a place at chance accuracy is evidence."""
_SEEN = ("vision", "projector", "image")
_ABSENT = frozenset({"other", "gone", "unclear"})


def state_of(place: Place, odds: float) -> tuple[float, str]:
    """Return the log-odds at a place, NaN if it is not readable, and its state (`Reading.state`)."""
    if not place.readable:
        return math.nan, "unreadable"
    if abs(odds) <= place.threshold:
        return odds, "unclear"
    return odds, "truth" if odds > 0 else "other"


@dataclass(frozen=True)
class ConceptAccuracy:
    """Accuracy of a place on the held-out examples of one concept."""

    n: int
    """Number of examples."""
    accuracy: float
    """Share in which the truth is decoded, with equal weight for both classes. NaN if a class is missing, and for questions
    whose answers are the concepts, because probes that always predict one concept are right about it."""
    effective_n: float
    """Equivalent number of independent examples, at most the number of images."""


def concept_accuracy(read: np.ndarray, sides: np.ndarray, groups: Sequence[str], *, two: bool) -> ConceptAccuracy:
    """Return the accuracy on the held-out examples of one concept.

    Parameters
    ----------
    read
        ``[n]``, for each example the share of rivals against which the truth is decoded.
    sides, groups
        Class and group of each example, as for `diagnosis.calibration.calibrate`.
    two
        Whether questions of the kind have two classes.
    """
    n = len(read)
    parts = [read[sides == side] for side in (1, 0)]
    if not two or not all(len(part) for part in parts):
        return ConceptAccuracy(n, math.nan, 0.0)
    # The mean over classes has the variance of a share of this many examples; n for classes of equal size.
    effective_n = 4 / sum(1 / len(part) for part in parts)
    return ConceptAccuracy(n, float(np.mean([part.mean() for part in parts])), min(effective_n, len(set(groups))))


def place_of_concept(place: Place, concept: ConceptAccuracy) -> Place | None:
    """Return the calibration of a place for one concept, or None if it is no evidence about the concept.

    A place is calibrated on all concepts of a kind of question together. This calibration applies to a concept unless the
    accuracy on the concept's examples differs: if its interval (Wilson) and that of the place do not overlap, it is used.
    """
    if not place.readable and concept.n < MIN_CONCEPT_EXAMPLES:
        return None
    if concept.effective_n < MIN_EXAMPLES or math.isnan(concept.accuracy) or math.isnan(place.accuracy):
        return place
    low, high = wilson(concept.accuracy * concept.effective_n, concept.effective_n)
    if low <= place.high and high >= place.low:
        return place
    readable = place.slope > 0 and low > 0.5 and concept.accuracy >= MIN_ACCURACY
    return replace(place, n=concept.n, accuracy=concept.accuracy, low=low, high=high, readable=readable)


def stage_state(states: Sequence[str], places: Sequence[Place], stage: str) -> str:
    """Return the state of a stage for one example.

    Parameters
    ----------
    states
        States of the chosen places of the stage.
    places
        All places with probes of the concept, calibrated for it (`place_of_concept`).
    stage
        One of `STAGES`.

    Returns
    -------
    str
        ``truth``, ``other`` or ``unclear``; ``gone`` if the chosen places show the absence of the concept (`ABSENCE_ACCURACY`)
        and no later place is readable; ``unknown`` if there is no probe of the concept, the intervals are too wide, or a later
        place is readable, because what is decodable later must have passed this stage.
    """
    for state in ("truth", "unclear", "other"):
        if state in states:
            return state
    later = STAGES[STAGES.index(stage) :]
    judged = _judged_by(places, stage)
    absent = bool(judged) and all(p.high < ABSENCE_ACCURACY for p in judged)
    return "gone" if absent and not any(p.readable for p in places if p.stage in later) else "unknown"


def _judged_by(places: Sequence[Place], stage: str) -> list[Place]:
    """Return the chosen places of a stage that have a calibration."""
    return [p for p in places if p.stage == stage and p.chosen and not math.isnan(p.accuracy)]


def belief(readings: Sequence[Reading], state: str, places: Sequence[Place], stage: str) -> float:
    """Return the probability that the truth is decodable at a stage, from the largest log-odds of its places.

    For the state ``gone``, the probability that the upper end of the interval allows: an accuracy of (1 + c) / 2 corresponds
    to a concept that is decodable in a share c of the cases.
    """
    if state == "gone":
        share = max(2 * p.high - 1 for p in _judged_by(places, stage))
        return min(0.5, max(0.02, share))
    odds = [r.log_odds for r in readings if not math.isnan(r.log_odds)]
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, max(odds))))) if odds else 0.5


def prior_suggests(words: float, log_odds: float) -> bool:
    """Return whether the words alone favor the wrong answer, and more than the image does: evidence of a prior.

    Parameters
    ----------
    words
        Log-odds of the true answer against the model's about blank images: ``lean + form + knowledge``
        (`circuits.input_attribution.split`).
    log_odds
        The same about the image; the image's share is ``log_odds - words``.
    """
    return words < 0 and words < log_odds - words


def judge(
    states: Mapping[str, str], beliefs: Mapping[str, float], *, corrected: bool, prior: bool = True
) -> tuple[str, float, str]:
    """Return verdict, confidence, and the reason of ``other`` or ``not readable``.

    Parameters
    ----------
    states
        State of each of `STAGES` (`stage_state`).
    beliefs
        Probability of each stage that the truth is decodable (`belief`).
    corrected
        Whether the ablation of some heads or MLPs, or the removal of the common offset, makes the answer right.
    prior
        Whether the words alone favor the wrong answer (`prior_suggests`); otherwise an override is ``overridden late``.

    Returns
    -------
    tuple
        The confidence is the probability that the truth is decodable at the last stage that the verdict names, times the
        probability that it is not decodable at the next; for an override, that at the last token; without a cause 0.
    """
    reads = [stage for stage in STAGES if states[stage] == "truth"]
    before = max((beliefs[stage] for stage in reads if stage in _SEEN), default=0.0)
    if states["last"] == "truth":
        if not corrected:
            return (
                OTHER,
                0.0,
                "the last token encodes the truth, but neither a few heads or MLPs nor the common offset correct the answer",
            )
        return OVERRIDDEN if prior else OVERRIDDEN_LATE, beliefs["last"], ""
    if "projector" in reads or "image" in reads:
        if states["last"] == "unknown":
            return NOT_READABLE, 0.0, _unreadable(["last"])
        return NOT_INTEGRATED, before * (1 - beliefs["last"]), ""
    if "vision" in reads:
        lost = next((stage for stage in ("projector", "image") if states[stage] in _ABSENT), None)
        if lost is None:
            return NOT_READABLE, 0.0, _unreadable(["projector", "image"])
        return LOST, before * (1 - beliefs[lost]), ""
    if states["vision"] in _ABSENT:
        return NOT_SEEN, 1 - beliefs["vision"], ""
    return NOT_READABLE, 0.0, _unreadable([stage for stage in _SEEN if states[stage] == "unknown"])


def _unreadable(stages: Sequence[str]) -> str:
    return f"no readable probe of the concept of this question at {named_stages(stages)}"
