"""What is causal: which heads carry the image to the answer, and what pushed there changes it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits import derive, export, knockout, planted
    from circuits.ablation import Ablation, ablate
    from circuits.attention import ImageAttention, attention_to_image
    from circuits.correlational import HeadTable, head_scores
    from circuits.head_statistics import Comparison, Stability
    from circuits.heads import HeadScores, compare, random_heads
    from circuits.interventions import Add, Amplify, Intervention, Replace, Zero, intervened
    from circuits.patching import patch_heads
    from circuits.steering import SteeringVector

__all__ = [
    "Ablation",
    "Add",
    "Amplify",
    "Comparison",
    "HeadScores",
    "HeadTable",
    "ImageAttention",
    "Intervention",
    "Replace",
    "Stability",
    "SteeringVector",
    "Zero",
    "ablate",
    "attention_to_image",
    "compare",
    "derive",
    "export",
    "head_scores",
    "intervened",
    "knockout",
    "patch_heads",
    "planted",
    "random_heads",
]

_HOME = {
    "Ablation": "ablation",
    "Add": "interventions",
    "Amplify": "interventions",
    "Comparison": "head_statistics",
    "HeadScores": "heads",
    "HeadTable": "correlational",
    "ImageAttention": "attention",
    "Intervention": "interventions",
    "Replace": "interventions",
    "Stability": "head_statistics",
    "SteeringVector": "steering",
    "Zero": "interventions",
    "ablate": "ablation",
    "attention_to_image": "attention",
    "compare": "heads",
    "head_scores": "correlational",
    "intervened": "interventions",
    "patch_heads": "patching",
    "random_heads": "heads",
}


def __getattr__(name: str) -> Any:
    if name in {"derive", "export", "knockout", "planted"}:
        return import_module(f"circuits.{name}")
    if name not in _HOME:
        msg = f"module 'circuits' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(f"circuits.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
