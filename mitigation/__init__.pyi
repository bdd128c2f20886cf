"""Public names of `mitigation`, each with its module."""

from . import preference, self_judgment
from .arena.result import ArenaResult
from .arena.rows import make_row
from .arena.run import ArenaOptions, run_arena
from .detectors.lure import lure_scores
from .detectors.metatoken import classify_mentions, metatoken_features
from .detectors.scores import MentionScores
from .free_text_prompts import FreeTextPrompts
from .guard import Guard, guard_limits, guards
from .guard_loss import GuardResult, measure_guards
from .method_data import DerivationData
from .methods import CONTROLS, MitigationMethod, mitigations
from .model_outputs import ModelOutputs
from .named import named_mitigation
from .preference import (
    Adapter,
    PreferenceData,
    PreferenceFormat,
    PreferencePair,
    TuneOptions,
    Tuning,
    preference_formats,
    read_preferences,
    tune,
    write_preferences,
)
from .protocol import ForwardCost, Mitigation
from .self_judgment import (
    HarmRefusal,
    RefusalCalibration,
    SentenceTree,
    calibrate_refusal,
    judged_preferences,
)
from .steering import derive, export
from .steering.changes import AddChange, AmplifyChange, ProbeGate, ProjectChange
from .steering.contrast import Contrast
from .steering.controls import match_displacement, move_to_heads
from .steering.export import Capability, Export, exports
from .steering.vector import SteeringVector, combine
from .strength import answer_under, choose_guarded, choose_strength, sweep_strengths
from .training_free.composition import compose
from .training_free.method import TrainingFree
from .training_free.methods.augment import augment
from .training_free.registry import training_free_methods

__all__ = [
    "CONTROLS",
    "Adapter",
    "AddChange",
    "AmplifyChange",
    "ArenaOptions",
    "ArenaResult",
    "Capability",
    "Contrast",
    "DerivationData",
    "Export",
    "ForwardCost",
    "FreeTextPrompts",
    "Guard",
    "GuardResult",
    "HarmRefusal",
    "MentionScores",
    "Mitigation",
    "MitigationMethod",
    "ModelOutputs",
    "PreferenceData",
    "PreferenceFormat",
    "PreferencePair",
    "ProbeGate",
    "ProjectChange",
    "RefusalCalibration",
    "SentenceTree",
    "SteeringVector",
    "TrainingFree",
    "TuneOptions",
    "Tuning",
    "answer_under",
    "augment",
    "calibrate_refusal",
    "choose_guarded",
    "choose_strength",
    "classify_mentions",
    "combine",
    "compose",
    "derive",
    "export",
    "exports",
    "guard_limits",
    "guards",
    "judged_preferences",
    "lure_scores",
    "make_row",
    "match_displacement",
    "measure_guards",
    "metatoken_features",
    "mitigations",
    "move_to_heads",
    "named_mitigation",
    "preference",
    "preference_formats",
    "read_preferences",
    "run_arena",
    "self_judgment",
    "sweep_strengths",
    "training_free_methods",
    "tune",
    "write_preferences",
]
