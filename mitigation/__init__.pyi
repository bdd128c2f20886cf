"""Public names of `mitigation`, each with its module."""

from .steering import derive, export
from .steering.placement import ProbeGate
from .steering.vector import SteeringVector, combined

__all__ = [
    "ProbeGate",
    "SteeringVector",
    "combined",
    "derive",
    "export",
]
