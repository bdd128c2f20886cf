"""Severity profiles: how much a wrong answer weighs in an application, by kind of question or by level.

The survey names three applications and their dangerous errors (Shu et al., arXiv 2501.01346, H.4): in driving,
objects and relations (an overlooked pedestrian, a misread traffic scene); in medicine, attributes (a wrong clinical
indicator is a misdiagnosis); in assistance for people with impaired vision, objects and relations (a wrong
description of the surroundings). The numbers are an assumption that follows this order; replace them by what an error
costs you.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from behavior.result import Answer
from groundscope.core.errors import ConfigError
from groundscope.core.text import nearest

Profile = Mapping[str, float]
"""Weight from 0 to 1 by kind of question, otherwise by level; ``""`` for questions without a level; 1 for all others."""
PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "uniform": MappingProxyType({}),
        "driving": MappingProxyType({"object": 1.0, "relation": 0.8, "attribute": 0.3, "": 0.3}),
        "medical": MappingProxyType({"attribute": 1.0, "object": 0.6, "relation": 0.4, "": 0.4}),
        "assistive": MappingProxyType({"relation": 1.0, "object": 0.8, "attribute": 0.4, "": 0.3}),
    }
)
"""Profiles by name."""


def weight_of(profile: Profile, answer: Answer) -> float:
    """Return the weight of a wrong answer.

    >>> import groundscope as gs
    >>> from behavior.card import PROFILES, weight_of
    >>> about = ("q", "image", "neutral", "attribute", "color", "Is it red?", "yes", ("yes", "no"))
    >>> weight_of(PROFILES["driving"], gs.Answer(*about, given="no", correct=False))
    0.3
    """
    return float(profile.get(answer.kind, profile.get(answer.level, 1.0)))


def check_profiles(profiles: Mapping[str, Profile] | None) -> dict[str, Profile]:
    """Return the profiles of a card: those of `PROFILES` for None, and always ``uniform``.

    Raises
    ------
    ConfigError
        For a weight that is not a number from 0 to 1, or a profile without weights above 0.
    """
    chosen = dict(PROFILES) if profiles is None else {"uniform": PROFILES["uniform"], **profiles}
    for name, profile in chosen.items():
        for key, weight in profile.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
                msg = f"profile '{name}': the weight of '{key}' is {weight}; give a number from 0 to 1"
                raise ConfigError(msg)
    return chosen


def named_profiles(names: list[str] | None) -> dict[str, Profile] | None:
    """Return profiles by their names, None for None; raises `ConfigError` for an unknown one.

    Examples
    --------
    >>> from behavior.card import named_profiles
    >>> list(named_profiles(["driving", "uniform"]))
    ['driving', 'uniform']
    """
    for name in names or ():
        if name not in PROFILES:
            msg = f"unknown profile '{name}'; choose from {', '.join(PROFILES)}{nearest(name, PROFILES)}"
            raise ConfigError(msg)
    return None if names is None else {name: PROFILES[name] for name in names}
