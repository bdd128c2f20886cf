"""Activations of a model on disk: written by a tracer, read with numpy and h5py only.

Heavy packages are imported on first use: ``ActivationStore`` needs no torch; only ``trace`` needs a model.
"""

import lazy_loader

from groundscope.core.rooms import check_rooms

check_rooms()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
