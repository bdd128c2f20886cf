"""Public names of `probes`, with the module that defines each."""

from . import alignment
from .analysis import logit_lens
from .analysis.baselines import control_task, lexical_control, random_features
from .analysis.multiclass import multiclass
from .analysis.permutation import Significance, permutation_test
from .analysis.trajectory import find_onsets, layer_trajectory
from .analysis.transfer import transfer
from .classifiers import (
    ConceptSubspaceProbe,
    LDAProbe,
    LogisticProbe,
    MeanDifferenceProbe,
    MultinomialProbe,
    RidgeProbe,
)
from .fit import fit_grid
from .grid import Cell, ProbeGrid
from .plan import GridPlan, plan_grids
from .protocol.estimators import Estimator, estimators
from .protocol.inputs import probeable
from .solvers.logistic_reference import LinearFit, fit_logistic

__all__ = [
    "Cell",
    "ConceptSubspaceProbe",
    "Estimator",
    "GridPlan",
    "LDAProbe",
    "LinearFit",
    "LogisticProbe",
    "MeanDifferenceProbe",
    "MultinomialProbe",
    "ProbeGrid",
    "RidgeProbe",
    "Significance",
    "alignment",
    "control_task",
    "estimators",
    "find_onsets",
    "fit_grid",
    "fit_logistic",
    "layer_trajectory",
    "lexical_control",
    "logit_lens",
    "multiclass",
    "permutation_test",
    "plan_grids",
    "probeable",
    "random_features",
    "transfer",
]
