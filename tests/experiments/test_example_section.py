"""The sentence of the report about the places at which probes read a color."""

from __future__ import annotations

import numpy as np

from experiments.report.derived import ColorMargins
from experiments.report.sections.example import summarize_margins


def reading(place: str, tokens: str, red: float, orange: float) -> ColorMargins:
    return ColorMargins(place, tokens, np.array([[red, orange]]), ("red", "orange"))


def test_a_layer_is_named_with_its_tokens() -> None:
    """A layer is read at the object's tokens and at the last token: its number alone would name both."""
    readings = [
        reading("vision 0", "object", -1.0, 2.0),
        reading("decoder 5", "object", -1.0, 2.0),
        reading("decoder 5", "last", 3.0, 1.0),
    ]
    assert summarize_margins(readings, "orange", "red") == (
        "Probes read orange rather than red at 2 of 3 places; they read red at decoder 5 (last token)."
    )
    assert summarize_margins(readings[:2], "orange", "red").endswith("decodable everywhere, yet the answer is red.")
