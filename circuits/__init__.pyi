"""Public names of `circuits`, each with the module that it comes from."""

from . import attention_knockout, attribution, faithfulness, input_attribution
from .ablation import Ablation, ablate
from .execution.conditions import logits_under
from .head_screening.image_attention import ImageAttention, attention_to_image
from .head_screening.table import HeadTable, head_table
from .head_set import HeadSet, all_heads
from .input_attribution.results import Sources, SourceShares
from .input_attribution.shapley_results import ShapleyShares, ShapleySources
from .interventions.intervention import Add, Amplify, Gate, Intervention, Project, Replace, Zero, intervened
from .patching.activation import patch, patch_heads
from .patching.metrics import metrics
from .patching.outcomes import OUTCOMES, PairOutcomes, pair_outcomes
from .patching.path import patch_paths
from .results.graph import Graph
from .results.head_scores import HeadScores, compare, random_heads, top_heads
from .results.patch_scores import PatchScores
from .results.statistics import RankingComparison, Stability

__all__ = [
    "OUTCOMES",
    "Ablation",
    "Add",
    "Amplify",
    "Gate",
    "Graph",
    "HeadScores",
    "HeadSet",
    "HeadTable",
    "ImageAttention",
    "Intervention",
    "PairOutcomes",
    "PatchScores",
    "Project",
    "RankingComparison",
    "Replace",
    "ShapleyShares",
    "ShapleySources",
    "SourceShares",
    "Sources",
    "Stability",
    "Zero",
    "ablate",
    "all_heads",
    "attention_knockout",
    "attention_to_image",
    "attribution",
    "compare",
    "faithfulness",
    "head_table",
    "input_attribution",
    "intervened",
    "logits_under",
    "metrics",
    "pair_outcomes",
    "patch",
    "patch_heads",
    "patch_paths",
    "random_heads",
    "top_heads",
]
