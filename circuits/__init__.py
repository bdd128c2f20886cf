"""What is causal: which heads carry the image to the answer, and what pushed there changes it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits import attribution, derive, export, sources
    from circuits.attention import ImageAttention, attention_to_image
    from circuits.heads import HeadScores, random_heads
    from circuits.interventions import Add, Amplify, Intervention, Replace, Zero, intervened
    from circuits.patch_scores import PatchScores
    from circuits.patching import patch, patch_heads
    from circuits.shares import Sources, SourceShares
    from circuits.steering import SteeringVector

__all__ = [
    "Add",
    "Amplify",
    "HeadScores",
    "ImageAttention",
    "Intervention",
    "PatchScores",
    "Replace",
    "SourceShares",
    "Sources",
    "SteeringVector",
    "Zero",
    "attention_to_image",
    "attribution",
    "derive",
    "export",
    "intervened",
    "patch",
    "patch_heads",
    "random_heads",
    "sources",
]

_HOME = {
    "Add": "interventions",
    "Amplify": "interventions",
    "HeadScores": "heads",
    "ImageAttention": "attention",
    "Intervention": "interventions",
    "PatchScores": "patch_scores",
    "Replace": "interventions",
    "SourceShares": "shares",
    "Sources": "shares",
    "SteeringVector": "steering",
    "Zero": "interventions",
    "attention_to_image": "attention",
    "intervened": "interventions",
    "patch": "patching",
    "patch_heads": "patching",
    "random_heads": "heads",
}


def __getattr__(name: str) -> Any:
    if name in {"attribution", "derive", "export", "sources"}:
        return import_module(f"circuits.{name}")
    if name not in _HOME:
        msg = f"module 'circuits' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(f"circuits.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
