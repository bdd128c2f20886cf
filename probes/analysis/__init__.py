"""Analyze fitted probes, and read activations by the unembedding.

- `permutation`, `baselines`: significance and controls of a grid
- `transfer`, `multiclass`: a grid on other examples; choices among mutually exclusive concepts
- `trajectory`: several grids in the order of the forward pass
- `logit_lens`, `nearest_word`: readings without a fitted probe
- `reproduce_split`: the split of a grid, reproduced on its store
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
