"""Public names of `mitigation`, each with the module that it comes from."""

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
