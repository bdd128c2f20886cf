"""What corrects a wrong answer: steering vectors, where they come from, and files that other code loads."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mitigation.steering import derive, export
    from mitigation.steering.placement import ProbeGate
    from mitigation.steering.vector import SteeringVector, combined

__all__ = [
    "ProbeGate",
    "SteeringVector",
    "combined",
    "derive",
    "export",
]

_HOME = {
    "ProbeGate": "mitigation.steering.placement",
    "SteeringVector": "mitigation.steering.vector",
    "combined": "mitigation.steering.vector",
}
_MODULES = {
    "derive": "mitigation.steering.derive",
    "export": "mitigation.steering.export",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOME:
        msg = f"module 'mitigation' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
