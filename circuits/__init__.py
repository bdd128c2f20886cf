"""What is causal: which heads carry the image to the answer, and what pushed there changes it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits import attribution, derive, export, faithfulness, knockout, planted, sources
    from circuits.ablation import Ablation, ablate
    from circuits.attention import ImageAttention, attention_to_image
    from circuits.conditions import logits_under
    from circuits.correlational import HeadTable, head_scores
    from circuits.diagnosing.diagnoses import Diagnoses, Diagnosis
    from circuits.diagnosis import diagnose
    from circuits.entries import ProbeGate
    from circuits.graph import Graph
    from circuits.head_statistics import Comparison, Stability
    from circuits.heads import HeadScores, compare, random_heads
    from circuits.interventions import Add, Amplify, Gate, Intervention, Project, Replace, Zero, intervened
    from circuits.patch_scores import PatchScores
    from circuits.patching import patch, patch_heads
    from circuits.paths import patch_paths
    from circuits.shares import Sources, SourceShares
    from circuits.steering import SteeringVector, combined

__all__ = [
    "Ablation",
    "Add",
    "Amplify",
    "Comparison",
    "Diagnoses",
    "Diagnosis",
    "Gate",
    "Graph",
    "HeadScores",
    "HeadTable",
    "ImageAttention",
    "Intervention",
    "PatchScores",
    "ProbeGate",
    "Project",
    "Replace",
    "SourceShares",
    "Sources",
    "Stability",
    "SteeringVector",
    "Zero",
    "ablate",
    "attention_to_image",
    "attribution",
    "combined",
    "compare",
    "derive",
    "diagnose",
    "export",
    "faithfulness",
    "head_scores",
    "intervened",
    "knockout",
    "logits_under",
    "patch",
    "patch_heads",
    "patch_paths",
    "planted",
    "random_heads",
    "sources",
]

_HOME = {
    "Ablation": "ablation",
    "Add": "interventions",
    "Amplify": "interventions",
    "Comparison": "head_statistics",
    "Diagnoses": "diagnosing.diagnoses",
    "Diagnosis": "diagnosing.diagnoses",
    "Gate": "interventions",
    "Graph": "graph",
    "HeadScores": "heads",
    "HeadTable": "correlational",
    "ImageAttention": "attention",
    "Intervention": "interventions",
    "PatchScores": "patch_scores",
    "ProbeGate": "entries",
    "Project": "interventions",
    "Replace": "interventions",
    "SourceShares": "shares",
    "Sources": "shares",
    "Stability": "head_statistics",
    "SteeringVector": "steering",
    "Zero": "interventions",
    "ablate": "ablation",
    "attention_to_image": "attention",
    "combined": "steering",
    "compare": "heads",
    "diagnose": "diagnosis",
    "head_scores": "correlational",
    "intervened": "interventions",
    "logits_under": "conditions",
    "patch": "patching",
    "patch_heads": "patching",
    "patch_paths": "paths",
    "random_heads": "heads",
}


def __getattr__(name: str) -> Any:
    if name in {"attribution", "derive", "export", "faithfulness", "knockout", "planted", "sources"}:
        return import_module(f"circuits.{name}")
    if name not in _HOME:
        msg = f"module 'circuits' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(f"circuits.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
