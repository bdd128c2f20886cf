"""Steering vectors as rows of an arena, at the places and with the strength that the stage `steer` of a run would choose.

A row without a strength has the one that a run chooses on its discovery images, so that it is compared as a user would apply it;
strengths are also what a search of parameters tries (`mitigation.arena.search`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from groundscope.core.errors import DataError
from mitigation.free_text_prompts import FreeTextPrompts
from mitigation.guard import guard_limits
from mitigation.methods import CONTROLS, mitigations
from mitigation.steering.vector import SteeringVector
from mitigation.strength import choose_guarded, sweep_strengths

if TYPE_CHECKING:
    from concepts.schema import ConceptDataset
    from mitigation.method_data import DerivationData
    from mitigation.protocol import Mitigation

DOUBT, DECAY, MAX_DROP = 0.5, 0.5, 0.015
"""Defaults of ``steer.doubt``, ``steer.decay`` and ``steer.max_drop`` of a run."""
STRENGTHS = (0.5, 1.0, 1.5, 2.0)
"""Default of ``steer.strengths`` of a run, in units of the derivation (`MitigationMethod.unit`)."""


def derive_mitigation(name: str, data: DerivationData) -> Mitigation:
    """Return what a derivation makes, with the defaults of a run: its doubt, and a strength that halves with each new token.

    Raises
    ------
    DataError
        For a derivation that acts on heads, without heads.
    """
    entry = mitigations[name]
    missing = [option for option in entry.required if option not in data.options]
    if missing:
        msg = f"{name} needs the option {missing[0]}: DerivationData(…, options={{'{missing[0]}': …}})"
        raise DataError(msg)
    if acts_on_heads(name) and not data.heads and data.site is None:
        msg = f"{name} acts on heads, and there are none; pass those that patching ranks highest, or a site"
        raise DataError(msg)
    mitigation = entry.make(_with_defaults(data))
    if isinstance(mitigation, SteeringVector) and mitigation.positions == "last+generated":
        return mitigation.decaying(DECAY)
    return mitigation


def choose_vector(name: str, vector: SteeringVector, data: DerivationData) -> tuple[SteeringVector, float]:
    """Return a vector with the strength that a run chooses on its discovery images, and the strength in units of the derivation.

    The rule is that of the stage `steer`: the fewest errors by prior among `STRENGTHS` at which no guard loses more than its
    limit, measured on the questions of the data, and on captions and texts of half of their images.

    Raises
    ------
    DataError
        If no strength has fewer errors within the guards, so that a run would not steer; and for data without such questions.
    """
    questions = data.examples.filter(lambda e: bool(e.candidates))
    if not len(questions):
        msg = f"the strength of {name} is chosen on questions with candidates, and there are none; give one: {name}(strength=1)"
        raise DataError(msg)
    unit = mitigations[name].unit
    limits = guard_limits({}, MAX_DROP)
    strengths = [unit * s for s in STRENGTHS]
    sweep = sweep_strengths(data.model, questions, {name: (vector, strengths)}, limits=limits, progress=False)[name]
    prompts = FreeTextPrompts.of(data.model, _second_half(data.examples))
    _, row = choose_guarded(data.model, {name: (vector, sweep)}, prompts, limits=limits, progress=False)
    if not row["strength"]:
        msg = (
            f"no strength of {name} has fewer errors than the model alone within the guards, so a run would not steer; "
            f"give one to measure it: {name}(strength=1)"
        )
        raise DataError(msg)
    return vector.scaled(row["strength"]), row["strength"] / unit


def control_of(control: str, name: str, vector: SteeringVector, data: DerivationData) -> SteeringVector:
    """Return a control (an entry of `mitigation.CONTROLS`) of a derivation's vector, with the same displacement at strength 1."""
    return CONTROLS[control](vector, mitigations[name], _with_defaults(data))


def _with_defaults(data: DerivationData) -> DerivationData:
    return replace(data, options={"doubt": DOUBT, **data.options})


def acts_on_heads(name: str) -> bool:
    """Whether a derivation acts on the selected heads of the data.

    Examples
    --------
    >>> from mitigation.arena.steering_rows import acts_on_heads
    >>> acts_on_heads("amplify"), acts_on_heads("vti_vision")
    (True, False)
    """
    return not mitigations[name].own_places and name != "optimize"


def _second_half(examples: ConceptDataset) -> ConceptDataset:
    """Return the examples of every second image, as the stage `steer` does."""
    second = set(list(dict.fromkeys(e.group for e in examples))[1::2])
    return examples.filter(lambda e: e.group in second)
