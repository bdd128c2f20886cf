"""A diagnosis in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuits.diagnoses import Diagnosis


def explain(one: Diagnosis) -> str:
    """Return some sentences that need no knowledge of models."""
    return f"{one.example['question']} '{one.said}'"
