"""Public names of `mitigation`, each with its module."""

from .steering import derive, export
from .steering.placement import ProbeGate
from .steering.vector import SteeringVector, combined
from .strength import answer_under, choose_strength, sweep_strengths

__all__ = [
    "ProbeGate",
    "SteeringVector",
    "answer_under",
    "choose_strength",
    "combined",
    "derive",
    "export",
    "sweep_strengths",
]
