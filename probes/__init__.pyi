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
from .information.families import PredictiveFamily, predictive_families
from .information.infonce import infonce
from .information.measure import measure_information
from .information.path import PathSite, image_sites, information_path
from .information.results import InformationPath
from .plan import GridPlan, plan_grids
from .protocol.estimators import Estimator, estimators
from .protocol.inputs import probeable
from .solvers.logistic_reference import LinearFit, fit_logistic

__all__ = [
    "Cell",
    "ConceptSubspaceProbe",
    "Estimator",
    "GridPlan",
    "InformationPath",
    "LDAProbe",
    "LinearFit",
    "LogisticProbe",
    "MeanDifferenceProbe",
    "MultinomialProbe",
    "PathSite",
    "PredictiveFamily",
    "ProbeGrid",
    "RidgeProbe",
    "Significance",
    "alignment",
    "control_task",
    "estimators",
    "find_onsets",
    "fit_grid",
    "fit_logistic",
    "image_sites",
    "infonce",
    "information_path",
    "layer_trajectory",
    "lexical_control",
    "logit_lens",
    "measure_information",
    "multiclass",
    "permutation_test",
    "plan_grids",
    "predictive_families",
    "probeable",
    "random_features",
    "transfer",
]
