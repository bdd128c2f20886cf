"""Measure in nats what a diagnosis calls lost: by a linear and by a nonlinear family of readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from diagnosis.narrative import named_stages
from diagnosis.results import LOST, NOT_READABLE, Diagnoses, Diagnosis, Reading
from groundscope.core.errors import GroundscopeError
from lvlm.token_selection import IMAGE_MEAN
from probes import InformationPath, PathSite, information_path

if TYPE_CHECKING:
    from activation_store.source import ActivationSource

REMAINING_SHARE = 0.5
"""If the nonlinear family still reads this share of its nats at the later stage, the concept is not lost there."""


def measure_losses(store: ActivationSource, diagnoses: Diagnoses, *, seed: int = 0) -> Diagnoses:
    """Return the diagnoses with the nats of every verdict ``lost at the projector``, which needs both families.

    For the concept of each such verdict, `probes.information_path` measures its information at the place of the vision tower and
    at the later place that the verdict used, on all examples of the store that have a label of it. `Diagnosis.information` states
    the nats. If the nonlinear family still reads at least `REMAINING_SHARE` of what it reads at the tower, the verdict becomes
    ``not readable``: the concept is less linearly available, not lost. Where it cannot be measured (single image tokens or
    their mean were read, too few images) the diagnosis is unchanged.

    Parameters
    ----------
    store
        Store of the diagnosis.
    diagnoses
        Result of `diagnosis.diagnose`.
    seed
        Seed of folds and draws.

    Examples
    --------
    >>> import numpy as np
    >>> from activation_store import MemorySource
    >>> from diagnosis import Diagnoses, Diagnosis, measure_losses
    >>> store = MemorySource({"resid_post": np.zeros((1, 1, 2))}, {"id": ["a"], "group": ["g"], "level": ["object"]})
    >>> about = {"id": "q1", "group": "g", "level": "object", "split": "neutral", "kind": "existence"}
    >>> about |= {"question": "Is there a cat?", "truth": "no"}
    >>> diagnoses = Diagnoses((Diagnosis(about, "yes", "object:cat", "not seen", 0.8),), (), "m", "c", "w")
    >>> measure_losses(store, diagnoses)[0].verdict
    'not seen'
    """
    measured: dict[tuple[str, ...], InformationPath | None] = {}
    examples = []
    for diagnosis in diagnoses.examples:
        places = _places(diagnosis) if diagnosis.verdict == LOST else None
        if places is None:
            examples.append(diagnosis)
            continue
        earlier, later = places
        level = diagnosis.example["level"]
        key = (level, diagnosis.concept, earlier.site, earlier.tokens, later.site, later.tokens)
        if key not in measured:
            measured[key] = _measure(store, level, diagnosis.concept, places, seed)
        path = measured[key]
        examples.append(diagnosis if path is None else _with_nats(diagnosis, path, later.stage))
    return replace(diagnoses, examples=tuple(examples))


def _places(diagnosis: Diagnosis) -> tuple[Reading, Reading] | None:
    """Return the readings of the tower and of the stage at which the verdict says that the concept is lost."""
    later = next((s for s in ("projector", "image") if diagnosis.stages.get(s) in {"other", "gone", "unclear"}), None)
    used = {reading.stage: reading for reading in diagnosis.readings if reading.used}
    return (used["vision"], used[later]) if later is not None and {"vision", later} <= used.keys() else None


def _measure(
    store: ActivationSource, level: str, concept: str, places: Sequence[Reading], seed: int
) -> InformationPath | None:
    """Return the information at two places; None if it cannot be measured."""
    stored = {(a.stack, str(a.tokens)) for a in store.arrays}
    path = []
    for place in places:
        # Single image tokens have no vector per example, and the mean over all dilutes what a few of them carry.
        if place.tokens == IMAGE_MEAN or (place.site.partition(".")[0], place.tokens) not in stored:
            return None
        path.append(PathSite(store, place.site, place.tokens))
    frame = store.frame()
    if concept not in frame:
        return None
    rows = (frame["level"] == level).to_numpy() & frame[concept].notna().to_numpy()
    for place in path:
        try:
            rows[rows] = ~np.isnan(place.read(rows, frame["id"].to_numpy()[rows])).any(axis=1)
        except GroundscopeError:
            return None
    try:
        return information_path(path, concept, rows=rows, seed=seed, progress=False)
    except GroundscopeError:
        return None


def _with_nats(diagnosis: Diagnosis, path: InformationPath, stage: str) -> Diagnosis:
    linear, nonlinear = path.nats[path.families.index("linear")], path.nats[path.families.index("nonlinear")]
    remaining = float(path.low[path.families.index("nonlinear"), 1])
    available = remaining > 0 and nonlinear[1] >= REMAINING_SHARE * nonlinear[0]
    words = path.changes[0].words or "no significant change over all images"
    name, place = diagnosis.concept.partition(":")[2], named_stages([stage])
    text = (
        f"About '{name}', of {path.entropy:.2f} nats, a linear reader gets {linear[0]:.2f} in the vision tower and "
        f"{linear[1]:.2f} in {place}, a nonlinear one {nonlinear[0]:.2f} and {nonlinear[1]:.2f}: {words}."
    )
    if not available:
        return replace(diagnosis, information=text)
    reason = f"a nonlinear reader still reads '{name}' in {place}, so it is less linearly available, not lost"
    return replace(diagnosis, information=text, verdict=NOT_READABLE, confidence=0.0, reason=reason)
