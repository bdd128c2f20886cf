"""What can be read from activations: linear probes at every layer and head, with the controls that make them believable.

A store is enough: nothing here imports a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes import alignment, lens
    from probes.comparisons import control_task, lexical_control, random_features
    from probes.estimators import (
        ConceptSubspaceProbe,
        LDAProbe,
        LogisticProbe,
        MeanDifferenceProbe,
        MultinomialProbe,
        RidgeProbe,
    )
    from probes.fit import fit_grid
    from probes.grid import Cell, ProbeGrid
    from probes.inputs import probeable
    from probes.permutation import permutation_test
    from probes.readout import multiclass, transfer
    from probes.route import journey, landmarks
    from probes.significance import Significance
    from probes.solver import LogisticFit, fit_logistic

__all__ = [
    "Cell",
    "ConceptSubspaceProbe",
    "LDAProbe",
    "LogisticFit",
    "LogisticProbe",
    "MeanDifferenceProbe",
    "MultinomialProbe",
    "ProbeGrid",
    "RidgeProbe",
    "Significance",
    "alignment",
    "control_task",
    "fit_grid",
    "fit_logistic",
    "journey",
    "landmarks",
    "lens",
    "lexical_control",
    "multiclass",
    "permutation_test",
    "probeable",
    "random_features",
    "transfer",
]

_HOME = {
    "Cell": "grid",
    "ConceptSubspaceProbe": "estimators",
    "LDAProbe": "estimators",
    "LogisticFit": "solver",
    "LogisticProbe": "estimators",
    "MeanDifferenceProbe": "estimators",
    "MultinomialProbe": "estimators",
    "ProbeGrid": "grid",
    "RidgeProbe": "estimators",
    "Significance": "significance",
    "control_task": "comparisons",
    "fit_grid": "fit",
    "fit_logistic": "solver",
    "journey": "route",
    "landmarks": "route",
    "lexical_control": "comparisons",
    "multiclass": "readout",
    "permutation_test": "permutation",
    "probeable": "inputs",
    "random_features": "comparisons",
    "transfer": "readout",
}
_MODULES = ("alignment", "lens")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"probes.{name}")
    if name not in _HOME:
        msg = f"module 'probes' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(f"probes.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
