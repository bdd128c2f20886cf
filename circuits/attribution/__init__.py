"""Attribution patching: estimate patch effects from gradients, for heads, nodes, inputs of heads and edges."""

from __future__ import annotations

# `edges` and `heads` are also module names: import the functions here so that the modules do not shadow them.
from circuits.attribution.edges import edges
from circuits.attribution.estimates import POINTS, Point
from circuits.attribution.heads import heads, nodes
from circuits.attribution.qkv import inputs

__all__ = ["POINTS", "Point", "edges", "heads", "inputs", "nodes"]
