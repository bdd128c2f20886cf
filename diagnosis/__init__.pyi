"""Public names of `diagnosis`, each with its module."""

from .alignment_ablation import AlignmentAblation, ablate_alignment
from .attention_shares import AttentionBalance, attention_balance
from .ceiling import CeilingCell, Ceilings, ceilings_of_readings, representation_ceiling
from .ceiling_regression import CorrectnessRegression, regress_correctness
from .compare_models import compare_models, profile_model
from .comparison import ModelComparison, ModelProfile, compare_profiles
from .debated_explanations import Explanation, compare_explanations, explanation_frame
from .fit import DirectionSet, exclude_images, fit_directions, select_evenly, training_rows
from .level_ability import LevelAbility, ability_frame, ability_gap
from .lost_information import measure_losses
from .pipeline import diagnose
from .preference_pairs import preference_pairs
from .representation import RepresentationStudy, study_representation
from .results import Diagnoses, Diagnosis
from .training_course import TrainingCourse, compare_checkpoints, course_of_profiles

__all__ = [
    "AlignmentAblation",
    "AttentionBalance",
    "CeilingCell",
    "Ceilings",
    "CorrectnessRegression",
    "Diagnoses",
    "Diagnosis",
    "DirectionSet",
    "Explanation",
    "LevelAbility",
    "ModelComparison",
    "ModelProfile",
    "RepresentationStudy",
    "TrainingCourse",
    "ability_frame",
    "ability_gap",
    "ablate_alignment",
    "attention_balance",
    "ceilings_of_readings",
    "compare_checkpoints",
    "compare_explanations",
    "compare_models",
    "compare_profiles",
    "course_of_profiles",
    "diagnose",
    "exclude_images",
    "explanation_frame",
    "fit_directions",
    "measure_losses",
    "preference_pairs",
    "profile_model",
    "regress_correctness",
    "representation_ceiling",
    "select_evenly",
    "study_representation",
    "training_rows",
]
