"""The distributions that scenes are drawn from: a uniform one, and a biased one with regularities that a model can learn.

In the biased distribution, 12 nouns have a typical color (with the given share of all their occurrences), and each noun has
a companion that often appears in the same scene:

===========  =======  =====  ===========
noun         typical  share  companion
===========  =======  =====  ===========
apple        red      .93    banana
heart        red      .85    balloon
banana       yellow   .93    apple
star         yellow   .85    airplane
pear         green    .93    chair
tree         green    .85    bird
fish         blue     .93    boat
bird         blue     .85    tree
butterfly    orange   .93    tulip
cat          orange   .85    dog
tulip        purple   .93    butterfly
umbrella     purple   .85    bus
===========  =======  =====  ===========

The other 12 nouns have no typical color and serve as controls; their further companions are car-bike, key-bell and
guitar-turtle. `POPULAR` nouns appear three times as often as others. No popular noun is the companion of another popular noun,
so that popular absent objects and adversarial absent objects (companions) are different nouns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from concepts.scenes.icons import COLORS, NOUNS

COLOR_NAMES: tuple[str, ...] = tuple(COLORS)

TYPICAL: Mapping[str, tuple[str, float]] = MappingProxyType(
    {
        "apple": ("red", 0.93),
        "heart": ("red", 0.85),
        "banana": ("yellow", 0.93),
        "star": ("yellow", 0.85),
        "pear": ("green", 0.93),
        "tree": ("green", 0.85),
        "fish": ("blue", 0.93),
        "bird": ("blue", 0.85),
        "butterfly": ("orange", 0.93),
        "cat": ("orange", 0.85),
        "tulip": ("purple", 0.93),
        "umbrella": ("purple", 0.85),
    }
)
"""Noun to its typical color and the share of its occurrences in that color, in the biased distribution."""

_COMPANIONS = (
    ("apple", "banana"),
    ("heart", "balloon"),
    ("star", "airplane"),
    ("pear", "chair"),
    ("tree", "bird"),
    ("fish", "boat"),
    ("butterfly", "tulip"),
    ("cat", "dog"),
    ("umbrella", "bus"),
    ("car", "bike"),
    ("key", "bell"),
    ("guitar", "turtle"),
)
COMPANION: Mapping[str, str] = MappingProxyType({a: b for pair in _COMPANIONS for a, b in (pair, pair[::-1])})
"""Noun to its companion in the biased distribution; symmetric."""

POPULAR: tuple[str, ...] = ("car", "star", "tree", "chair")
"""Nouns that the biased distribution draws three times as often as others."""


@dataclass(frozen=True)
class SceneDistribution:
    """Probabilities of nouns and colors in a scene.

    Examples
    --------
    >>> import numpy as np
    >>> from concepts.scenes.distributions import BIASED
    >>> rng = np.random.default_rng(0)
    >>> BIASED.sample_nouns(rng, 2), BIASED.sample_color(rng, "apple")
    (['tree', 'bird'], 'red')
    """

    name: str
    popular_weight: float
    """Weight of a `POPULAR` noun relative to any other."""
    companion_probability: float
    """Probability that the next noun is the companion of a noun already drawn."""
    typical_colors: bool
    """Whether nouns have their typical colors."""

    def sample_nouns(self, rng: np.random.Generator, count: int) -> list[str]:
        """Draw `count` different nouns."""
        nouns: list[str] = []
        while len(nouns) < count:
            if nouns and rng.random() < self.companion_probability:
                missing = [COMPANION[n] for n in nouns if COMPANION[n] not in nouns]
                if missing:
                    nouns.append(missing[int(rng.integers(len(missing)))])
                    continue
            noun = NOUNS[int(rng.integers(len(NOUNS)))]
            # Rejection sampling: accept nouns that are not popular with probability 1 / popular_weight.
            if noun not in nouns and (noun in POPULAR or rng.random() < 1 / self.popular_weight):
                nouns.append(noun)
        return nouns

    def sample_color(self, rng: np.random.Generator, noun: str) -> str:
        """Draw the color of a noun."""
        if self.typical_colors and noun in TYPICAL:
            color, share = TYPICAL[noun]
            if rng.random() < share:
                return color
            others = [c for c in COLOR_NAMES if c != color]
            return others[int(rng.integers(len(others)))]
        return COLOR_NAMES[int(rng.integers(len(COLOR_NAMES)))]


UNIFORM = SceneDistribution("uniform", popular_weight=1.0, companion_probability=0.0, typical_colors=False)
BIASED = SceneDistribution("biased", popular_weight=3.0, companion_probability=0.6, typical_colors=True)
