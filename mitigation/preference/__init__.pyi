"""Public names of `mitigation.preference`, each with its module."""

from .adapter import Adapter
from .data import PreferenceData
from .formats import PreferenceFormat, preference_formats, read_preferences, write_preferences
from .makers import from_answers, from_table, scored_pair
from .pair import PreferencePair
from .train import Tuning, tune
from .trainer import Epoch
from .tuning_options import TuneOptions

__all__ = [
    "Adapter",
    "Epoch",
    "PreferenceData",
    "PreferenceFormat",
    "PreferencePair",
    "TuneOptions",
    "Tuning",
    "from_answers",
    "from_table",
    "preference_formats",
    "read_preferences",
    "scored_pair",
    "tune",
    "write_preferences",
]
