"""Linear probes of concepts in activations, at every layer and head, with the controls needed to interpret them.

- `fit_grid`, `ProbeGrid`: fit one probe per concept, layer and head; the scores (`fit`, `grid`)
- `plan_grids`, `probeable`: which concepts to probe at which array of a store (`plan`)
- `estimators`, `Estimator`: how a probe is fitted, an open registry (`protocol.estimators`)
- `permutation_test`: significance over the whole grid (`analysis.permutation`)
- `lexical_control`, `control_task`, `random_features`: baselines (`analysis.baselines`)
- `transfer`, `multiclass`: the same probes on other data; choices among concepts (`analysis`)
- `layer_trajectory`, `find_onsets`: where in the model a concept appears and vanishes (`analysis.trajectory`)
- `information_path`, `measure_information`: information in nats along the image's or the text's path (`information`)
- `alignment`: similarity of representations, a subpackage
- `logit_lens`: the unembedding on a store (`analysis.logit_lens`)
- `LogisticProbe`, `RidgeProbe`, …: the same probes as scikit-learn classifiers (`classifiers`)
- `fit_logistic`, `LinearFit`: many logistic regressions, each with a proven bound (`solvers`)

Probes need only a store, or arrays in memory (`activation_store.MemorySource`): nothing here imports a model.
"""

import lazy_loader

from groundscope.core.packages import check_packages

check_packages()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
