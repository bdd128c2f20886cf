"""Estimate the effect of patches from gradients: heads, nodes, inputs of heads, edges."""

from __future__ import annotations

# A function has the name of its module: bound here at import, so that it is not hidden by the module later.
from circuits.attribution.edges import edges
from circuits.attribution.estimates import POINTS, Point
from circuits.attribution.heads import heads, nodes
from circuits.attribution.qkv import inputs

__all__ = ["POINTS", "Point", "edges", "heads", "inputs", "nodes"]
