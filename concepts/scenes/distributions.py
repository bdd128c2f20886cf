"""Two worlds scenes are drawn from: a uniform one, and a biased one whose regularities a model can learn by heart.

The table of the biased world (everything else in it is uniform):

===========  =======  ====   ==========================
noun         typical  share  partner
===========  =======  ====   ==========================
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
===========  =======  ====   ==========================

The other twelve nouns have no typical color and serve as controls; car-bike, key-bell, guitar-turtle are partners.
`POPULAR` nouns are drawn three times as often and are nobody's partner among themselves, so that "popular" and
"adversarial" absent objects are different nouns.
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
"""Noun to its typical color and that color's share in the biased world."""

_PAIRS = (
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
PARTNER: Mapping[str, str] = MappingProxyType({a: b for pair in _PAIRS for a, b in (pair, pair[::-1])})
"""Noun to the noun it is usually seen with in the biased world; symmetric."""

POPULAR: tuple[str, ...] = ("car", "star", "tree", "chair")
"""Nouns the biased world shows three times as often as others."""


@dataclass(frozen=True)
class World:
    """What scenes are likely."""

    name: str
    popularity: float
    """Weight of a `POPULAR` noun against 1 for any other."""
    partner_share: float
    """Probability that the next object is the partner of one already there."""
    typical: bool
    """Whether nouns keep to their typical colors."""

    def sample_nouns(self, rng: np.random.Generator, count: int) -> list[str]:
        """Draw `count` different nouns."""
        nouns: list[str] = []
        while len(nouns) < count:
            if nouns and rng.random() < self.partner_share:
                missing = [PARTNER[n] for n in nouns if PARTNER[n] not in nouns]
                if missing:
                    nouns.append(missing[int(rng.integers(len(missing)))])
                    continue
            noun = NOUNS[int(rng.integers(len(NOUNS)))]
            # Thin the unpopular ones instead of weighting the popular: exact, and needs no table.
            if noun not in nouns and (noun in POPULAR or rng.random() < 1 / self.popularity):
                nouns.append(noun)
        return nouns

    def sample_color(self, rng: np.random.Generator, noun: str) -> str:
        """Draw the color of a noun."""
        if self.typical and noun in TYPICAL:
            color, share = TYPICAL[noun]
            if rng.random() < share:
                return color
            others = [c for c in COLOR_NAMES if c != color]
            return others[int(rng.integers(len(others)))]
        return COLOR_NAMES[int(rng.integers(len(COLOR_NAMES)))]


UNIFORM = World("uniform", popularity=1.0, partner_share=0.0, typical=False)
BIASED = World("biased", popularity=3.0, partner_share=0.6, typical=True)
WORLDS: Mapping[str, World] = MappingProxyType({w.name: w for w in (UNIFORM, BIASED)})
