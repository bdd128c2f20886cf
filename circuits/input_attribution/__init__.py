"""Split an answer's log-odds into the contributions of image, prompt and language prior (Shapley values)."""

from __future__ import annotations

from circuits.input_attribution.attribute import NEUTRAL_QUESTIONS, sample_texts, split
from circuits.input_attribution.results import Sources, SourceShares

__all__ = ["NEUTRAL_QUESTIONS", "SourceShares", "Sources", "sample_texts", "split"]
