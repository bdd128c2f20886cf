"""Measure how similar two representations of the same examples are, such as an image and a caption of it.

The measures of representational alignment of Shu et al. (arXiv 2501.01346, appendix C), on paired rows [N, D] and [N, E]:

- `cosine`, `row_cosines`: agreement of each pair in a common space (`row_cosine`)
- `retrieval`, `retrieval_ranks`: is an image's own caption the nearest, and the reverse (`retrieval_ranks`)
- `cka`, `cknna`, `hsic_biased`, `hsic_unbiased`: agreement of kernels (`kernels`)
- `mutual_knn`, `neighbor_overlap`: agreement of neighborhoods (`neighbors`)
- `modality_gap`: distance of the means; does not depend on pairs (`gap`)
- `mir`, `mir_of`, `frechet_distance`: modality integration rate, of image and text tokens of one sequence
  (`integration_rate`)
- `compare`: named measures of two arrays with permutation nulls and intervals (`comparison`)
- `measure_layers`, `LayerAlignment`: measures at every layer or head of two stores, with tests that include the choice of a place
  (`layers`, `layer_scores`)
- `transfer_modalities`: probes of images tested on texts, and the reverse (`modality_transfer`)

`measures` is an open registry: an entry makes a measure available by name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
