"""The eleven basic color terms (Berlin and Kay 1969): the term of a color, and a typical color of each term."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from types import MappingProxyType

HUES: Mapping[str, float] = MappingProxyType(
    {"red": 0.0, "orange": 0.07, "yellow": 0.15, "green": 0.33, "blue": 0.58, "purple": 0.78, "pink": 0.92}
)
"""Typical hue of each chromatic term, as a share of the color circle."""
PROTOTYPES: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (200, 30, 35),
        "orange": (240, 130, 30),
        "yellow": (240, 215, 40),
        "green": (50, 150, 60),
        "blue": (40, 90, 200),
        "purple": (125, 50, 160),
        "pink": (240, 120, 180),
    }
)
"""Typical RGB value of each chromatic term."""
MIN_SATURATION = 0.15
"""Saturation below which a color is white, gray or black."""


def color_name(color: tuple[float, float, float]) -> str:
    """Return the basic color term of an RGB color with values from 0 to 255.

    Black, gray and white are decided by value and saturation, brown as a dark orange, pink as a pale red, and all other
    terms by the nearest hue of `HUES`.

    Examples
    --------
    >>> from concepts.counterfactuals.photographs.color_names import color_name
    >>> [color_name(c) for c in ((200, 30, 35), (250, 250, 250), (100, 60, 20), (40, 90, 200), (20, 20, 22))]
    ['red', 'white', 'brown', 'blue', 'black']
    """
    hue, saturation, value = colorsys.rgb_to_hsv(*(component / 255 for component in color))
    if value < 0.18:
        return "black"
    if saturation < MIN_SATURATION:
        return "white" if value > 0.8 else "gray"
    name = min(HUES, key=lambda term: hue_distance(hue, HUES[term]))
    if name in {"red", "orange"} and value < 0.6 and hue_distance(hue, 0.06) < 0.06 and 0.02 < hue < 0.12:
        return "brown"
    if name == "red" and saturation < 0.5 and value > 0.75:
        return "pink"
    return name


def hue_distance(first: float, second: float) -> float:
    """Return the distance of two hues on the color circle, from 0 to 0.5."""
    difference = abs(first - second) % 1
    return min(difference, 1 - difference)
