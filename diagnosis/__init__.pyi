"""Public names of `diagnosis`, each with its module."""

from .alignment_ablation import AlignmentAblation, ablate_alignment
from .ceiling import CeilingCell, Ceilings, ceilings_of_readings, representation_ceiling
from .ceiling_regression import CorrectnessRegression, regress_correctness
from .compare_models import compare_models, profile_model
from .comparison import ModelComparison, ModelProfile, compare_profiles
from .fit import DirectionSet, exclude_images, fit_directions, select_evenly, training_rows
from .lost_information import measure_losses
from .pipeline import diagnose
from .preference_pairs import preference_pairs
from .results import Diagnoses, Diagnosis

__all__ = [
    "AlignmentAblation",
    "CeilingCell",
    "Ceilings",
    "CorrectnessRegression",
    "Diagnoses",
    "Diagnosis",
    "DirectionSet",
    "ModelComparison",
    "ModelProfile",
    "ablate_alignment",
    "ceilings_of_readings",
    "compare_models",
    "compare_profiles",
    "diagnose",
    "exclude_images",
    "fit_directions",
    "measure_losses",
    "preference_pairs",
    "profile_model",
    "regress_correctness",
    "representation_ceiling",
    "select_evenly",
    "training_rows",
]
