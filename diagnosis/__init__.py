"""Why an answer is wrong: probes and causal checks together, one verdict for each answer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diagnosis.pipeline import diagnose
    from diagnosis.results import Diagnoses, Diagnosis

__all__ = [
    "Diagnoses",
    "Diagnosis",
    "diagnose",
]

_HOME = {
    "Diagnoses": "diagnosis.results",
    "Diagnosis": "diagnosis.results",
    "diagnose": "diagnosis.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        msg = f"module 'diagnosis' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
