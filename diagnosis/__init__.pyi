"""Public names of `diagnosis`, each with the module that it comes from."""

from .pipeline import diagnose
from .results import Diagnoses, Diagnosis

__all__ = [
    "Diagnoses",
    "Diagnosis",
    "diagnose",
]
