"""What can be read from activations: linear probes at every layer and head, with the controls that make them believable.

A store is enough: nothing here imports a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.analysis import alignment, logit_lens
    from probes.analysis.baselines import control_task, lexical_control, random_features
    from probes.analysis.permutation import permutation_test
    from probes.analysis.significance import Significance
    from probes.analysis.trajectory import journey, landmarks
    from probes.analysis.transfer import multiclass, transfer
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
    from probes.protocol.inputs import probeable
    from probes.solvers.logistic_reference import LogisticFit, fit_logistic

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
    "lexical_control",
    "logit_lens",
    "multiclass",
    "permutation_test",
    "probeable",
    "random_features",
    "transfer",
]

_HOME = {
    "Cell": "probes.grid",
    "ConceptSubspaceProbe": "probes.estimators",
    "LDAProbe": "probes.estimators",
    "LogisticFit": "probes.solvers.logistic_reference",
    "LogisticProbe": "probes.estimators",
    "MeanDifferenceProbe": "probes.estimators",
    "MultinomialProbe": "probes.estimators",
    "ProbeGrid": "probes.grid",
    "RidgeProbe": "probes.estimators",
    "Significance": "probes.analysis.significance",
    "control_task": "probes.analysis.baselines",
    "fit_grid": "probes.fit",
    "fit_logistic": "probes.solvers.logistic_reference",
    "journey": "probes.analysis.trajectory",
    "landmarks": "probes.analysis.trajectory",
    "lexical_control": "probes.analysis.baselines",
    "multiclass": "probes.analysis.transfer",
    "permutation_test": "probes.analysis.permutation",
    "probeable": "probes.protocol.inputs",
    "random_features": "probes.analysis.baselines",
    "transfer": "probes.analysis.transfer",
}
_MODULES = {
    "alignment": "probes.analysis.alignment",
    "logit_lens": "probes.analysis.logit_lens",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOME:
        msg = f"module 'probes' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
