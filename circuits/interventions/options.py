"""Option names of interventions, in a module without torch, so that vectors can be read and checked without a model."""

from __future__ import annotations

from typing import Literal

Rule = Literal["all", "last", "image", "suffix", "question", "generated"]
"""Which tokens an intervention changes."""
RULES: tuple[Rule, ...] = ("all", "last", "image", "suffix", "question", "generated")
Norm = Literal["free", "kept", "relative", "away"]
"""Effect on the norm of the changed vector; see `circuits.interventions.transforms.Add`."""
NORMS: tuple[Norm, ...] = ("free", "kept", "relative", "away")
