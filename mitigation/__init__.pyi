"""Public names of `mitigation`, each with its module."""

from .methods import CONTROLS, DerivationData, MitigationMethod, mitigations
from .protocol import ForwardCost, Mitigation
from .steering import derive, export
from .steering.changes import AddChange, AmplifyChange, ProbeGate, ProjectChange
from .steering.contrast import Contrast
from .steering.controls import match_displacement, move_to_heads
from .steering.export import Capability, Export, exports
from .steering.vector import SteeringVector, combine
from .strength import answer_under, choose_strength, sweep_strengths

__all__ = [
    "CONTROLS",
    "AddChange",
    "AmplifyChange",
    "Capability",
    "Contrast",
    "DerivationData",
    "Export",
    "ForwardCost",
    "Mitigation",
    "MitigationMethod",
    "ProbeGate",
    "ProjectChange",
    "SteeringVector",
    "answer_under",
    "choose_strength",
    "combine",
    "derive",
    "export",
    "exports",
    "match_displacement",
    "mitigations",
    "move_to_heads",
    "sweep_strengths",
]
