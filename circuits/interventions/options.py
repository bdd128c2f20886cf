"""Names of options of an intervention, in a module without torch: vectors are read and checked without a model."""

from __future__ import annotations

from typing import Literal

Rule = Literal["all", "last", "image", "suffix", "question", "generated"]
"""Which tokens an intervention changes."""
RULES: tuple[Rule, ...] = ("all", "last", "image", "suffix", "question", "generated")
Norm = Literal["free", "kept", "relative", "away"]
"""What becomes of the length of what is changed."""
NORMS: tuple[Norm, ...] = ("free", "kept", "relative", "away")
