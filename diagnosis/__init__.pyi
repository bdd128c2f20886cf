"""Public names of `diagnosis`, each with its module."""

from .alignment_ablation import AlignmentAblation, ablate_alignment
from .compare_models import compare_models, profile_model
from .comparison import ModelComparison, ModelProfile, compare_profiles
from .fit import DirectionSet, exclude_images, fit_directions, select_evenly, training_rows
from .lost_information import measure_losses
from .pipeline import diagnose
from .preference_pairs import preference_pairs
from .results import Diagnoses, Diagnosis

__all__ = [
    "AlignmentAblation",
    "Diagnoses",
    "Diagnosis",
    "DirectionSet",
    "ModelComparison",
    "ModelProfile",
    "ablate_alignment",
    "compare_models",
    "compare_profiles",
    "diagnose",
    "exclude_images",
    "fit_directions",
    "measure_losses",
    "preference_pairs",
    "profile_model",
    "select_evenly",
    "training_rows",
]
