"""Activations of a model on disk: written by a tracer, read with numpy and h5py only.

- `trace`: run a model over a dataset and store activations (`tracing.tracer`)
- `ActivationStore`: read them by site, token selection, head and rows (`reading.store`)
- `MemorySource`, `ActivationSource`: arrays in memory, and the interface of any source (`source`)
- `ConceptDirection`: a unit vector at a site that represents a concept (`direction`)
- `verify`, `IntegrityReport`: compare every byte with its digest (`reading.integrity`)
- `merge`, `repack`: one store from several; rewritten layer by layer (`merging`)
- `StoreWriter`, `Schema`, `ArrayInfo`, `Ragged`: write arrays from another source (`writing.writer`, `format`)

The file format is described in `format.schema`. Heavy packages are imported on first use: ``ActivationStore`` needs no
torch; only ``trace`` needs a model. ``python -m activation_store`` inspects, verifies, repacks and merges stores.
"""

import lazy_loader

from groundscope.core.packages import check_packages

check_packages()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
