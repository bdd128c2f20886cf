"""What is causal: which heads carry the image to the answer, and how a change of them changes the answer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuits import attention_knockout, attribution, faithfulness, input_attribution
    from circuits.ablation import Ablation, ablate
    from circuits.execution.conditions import logits_under
    from circuits.head_screening.image_attention import ImageAttention, attention_to_image
    from circuits.head_screening.table import HeadTable, head_scores
    from circuits.input_attribution.results import Sources, SourceShares
    from circuits.interventions.intervention import Add, Amplify, Gate, Intervention, Project, Replace, Zero, intervened
    from circuits.patching.activation import patch, patch_heads
    from circuits.patching.path import patch_paths
    from circuits.results.graph import Graph
    from circuits.results.head_scores import HeadScores, compare, random_heads
    from circuits.results.patch_scores import PatchScores
    from circuits.results.statistics import Comparison, Stability

__all__ = [
    "Ablation",
    "Add",
    "Amplify",
    "Comparison",
    "Gate",
    "Graph",
    "HeadScores",
    "HeadTable",
    "ImageAttention",
    "Intervention",
    "PatchScores",
    "Project",
    "Replace",
    "SourceShares",
    "Sources",
    "Stability",
    "Zero",
    "ablate",
    "attention_knockout",
    "attention_to_image",
    "attribution",
    "compare",
    "faithfulness",
    "head_scores",
    "input_attribution",
    "intervened",
    "logits_under",
    "patch",
    "patch_heads",
    "patch_paths",
    "random_heads",
]

_HOME = {
    "Ablation": "circuits.ablation",
    "Add": "circuits.interventions.intervention",
    "Amplify": "circuits.interventions.intervention",
    "Comparison": "circuits.results.statistics",
    "Gate": "circuits.interventions.intervention",
    "Graph": "circuits.results.graph",
    "HeadScores": "circuits.results.head_scores",
    "HeadTable": "circuits.head_screening.table",
    "ImageAttention": "circuits.head_screening.image_attention",
    "Intervention": "circuits.interventions.intervention",
    "PatchScores": "circuits.results.patch_scores",
    "Project": "circuits.interventions.intervention",
    "Replace": "circuits.interventions.intervention",
    "SourceShares": "circuits.input_attribution.results",
    "Sources": "circuits.input_attribution.results",
    "Stability": "circuits.results.statistics",
    "Zero": "circuits.interventions.intervention",
    "ablate": "circuits.ablation",
    "attention_to_image": "circuits.head_screening.image_attention",
    "compare": "circuits.results.head_scores",
    "head_scores": "circuits.head_screening.table",
    "intervened": "circuits.interventions.intervention",
    "logits_under": "circuits.execution.conditions",
    "patch": "circuits.patching.activation",
    "patch_heads": "circuits.patching.activation",
    "patch_paths": "circuits.patching.path",
    "random_heads": "circuits.results.head_scores",
}
_MODULES = {
    "attention_knockout": "circuits.attention_knockout",
    "attribution": "circuits.attribution",
    "faithfulness": "circuits.faithfulness",
    "input_attribution": "circuits.input_attribution",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOME:
        msg = f"module 'circuits' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
