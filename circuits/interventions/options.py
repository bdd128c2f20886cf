"""Option names of interventions, in a module without torch, so that vectors can be read and checked without a model."""

from __future__ import annotations

from typing import Literal

from lvlm.token_selection import STEERABLE

RULES = STEERABLE
"""Token selections of an intervention, which need no encoded prompt."""
Norm = Literal["free", "kept", "relative", "away"]
"""Effect on the norm of the changed vector; see `circuits.interventions.transforms.Add`."""
NORMS: tuple[Norm, ...] = ("free", "kept", "relative", "away")
