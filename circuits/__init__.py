"""What is causal: which heads carry the image to the answer, and what pushed there changes it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits import derive, export
    from circuits.attention import ImageAttention, attention_to_image
    from circuits.entries import ProbeGate
    from circuits.heads import HeadScores, random_heads
    from circuits.interventions import Add, Amplify, Gate, Intervention, Project, Replace, Zero, intervened
    from circuits.patching import patch_heads
    from circuits.steering import SteeringVector, combined

__all__ = [
    "Add",
    "Amplify",
    "Gate",
    "HeadScores",
    "ImageAttention",
    "Intervention",
    "ProbeGate",
    "Project",
    "Replace",
    "SteeringVector",
    "Zero",
    "attention_to_image",
    "combined",
    "derive",
    "export",
    "intervened",
    "patch_heads",
    "random_heads",
]

_HOME = {
    "Add": "interventions",
    "Amplify": "interventions",
    "Gate": "interventions",
    "HeadScores": "heads",
    "ImageAttention": "attention",
    "Intervention": "interventions",
    "ProbeGate": "entries",
    "Project": "interventions",
    "Replace": "interventions",
    "SteeringVector": "steering",
    "Zero": "interventions",
    "attention_to_image": "attention",
    "combined": "steering",
    "intervened": "interventions",
    "patch_heads": "patching",
    "random_heads": "heads",
}


def __getattr__(name: str) -> Any:
    if name in {"derive", "export"}:
        return import_module(f"circuits.{name}")
    if name not in _HOME:
        msg = f"module 'circuits' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(f"circuits.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
