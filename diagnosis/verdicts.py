"""From what each stage reads to a verdict: pure rules, no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from diagnosis.results import LOST, NOT_INTEGRATED, NOT_SEEN, OTHER, OVERRIDDEN, STAGES, Place, Reading

_SEEN = ("vision", "projector", "image")
_ABSENT = frozenset({"other", "gone", "unclear"})


def state_of(place: Place, odds: float) -> tuple[float, str]:
    """Return the log-odds that a place can be believed to read, and what it reads; see `Reading.state`."""
    if not place.readable:
        return math.nan, "unreadable"
    if abs(odds) <= place.threshold:
        return odds, "unclear"
    return odds, "truth" if odds > 0 else "other"


def stage_state(states: Sequence[str], places: Sequence[Place], stage: str) -> str:
    """Return what a stage reads of one example.

    Parameters
    ----------
    states
        Of the places the stage is judged by.
    places
        All places of the kind of question.
    stage
        One of `STAGES`.

    Returns
    -------
    str
        ``truth``, ``other``, ``unclear``; ``gone`` where its probes are at chance, and so are all after it; ``unknown`` where
        nothing was read, or its probes are at chance although later ones are not: what is read later was there before.
    """
    for state in ("truth", "unclear", "other"):
        if state in states:
            return state
    later = STAGES[STAGES.index(stage) :]
    tested = any(p.stage == stage and not math.isnan(p.accuracy) for p in places)
    return "gone" if tested and not any(p.readable for p in places if p.stage in later) else "unknown"


def belief(readings: Sequence[Reading], state: str, places: Sequence[Place], stage: str) -> float:
    """Return how probable it is that the truth is there: of the last token's layers the one that reads it best.

    Where probes are at chance, what their accuracy leaves: an accuracy of (1 + c) / 2 is that of knowing in a share c.
    """
    if state == "gone":
        known = max(2 * p.accuracy - 1 for p in places if p.stage == stage and not math.isnan(p.accuracy))
        return min(0.5, max(0.02, known))
    odds = [r.log_odds for r in readings if not math.isnan(r.log_odds)]
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, max(odds))))) if odds else 0.5


def judge(states: Mapping[str, str], sure: Mapping[str, float], *, undone: bool) -> tuple[str, float, str]:
    """Return verdict, confidence and the reason of an ``other``.

    Parameters
    ----------
    states
        Of each of `STAGES`, by `stage_state`.
    sure
        Of each the probability that the truth is there, by `belief`.
    undone
        Whether putting some heads or MLPs to their usual values makes the answer right, or taking away what all such answers
        lean to.

    Returns
    -------
    tuple
        The confidence is the probability that the truth is where the verdict says it still was, times that it is not where
        the verdict says it no longer was; of an override, that the last token has it; of an ``other`` 0.
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
        return OVERRIDDEN, sure["last"], ""
    if "projector" in reads or "image" in reads:
        if states["last"] == "unknown":
            return OTHER, 0.0, "no probe reads the last token"
        return NOT_INTEGRATED, before * (1 - sure["last"]), ""
    if "vision" in reads:
        lost = next((stage for stage in ("projector", "image") if states[stage] in _ABSENT), None)
        if lost is None:
            return OTHER, 0.0, "no probe reads the projector"
        return LOST, before * (1 - sure[lost]), ""
    if states["vision"] in _ABSENT:
        return NOT_SEEN, 1 - sure["vision"], ""
    return OTHER, 0.0, "no probe reads what this question is about in the image"
