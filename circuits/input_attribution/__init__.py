"""Split an answer's log-odds by source: lean, form, knowledge and image; or Shapley values of image, prompt and prior."""

from __future__ import annotations

from circuits.input_attribution.attribute import split
from circuits.input_attribution.matched_texts import matched_prefixes, matched_questions
from circuits.input_attribution.results import Sources, SourceShares
from circuits.input_attribution.shapley_results import ShapleyShares, ShapleySources

__all__ = [
    "ShapleyShares",
    "ShapleySources",
    "SourceShares",
    "Sources",
    "matched_prefixes",
    "matched_questions",
    "split",
]
