"""Faithfulness of circuits: how much of the model's behavior a circuit preserves; curves over heads and edges, minimal sets."""

from __future__ import annotations

from circuits.faithfulness.curve import SHARES, area
from circuits.faithfulness.edges import EdgeCurve, edges
from circuits.faithfulness.heads import Curve, MinimalSet, curve, minimal, ranked

__all__ = ["SHARES", "Curve", "EdgeCurve", "MinimalSet", "area", "curve", "edges", "minimal", "ranked"]
