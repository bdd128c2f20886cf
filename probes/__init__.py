"""Linear probes of concepts in activations, at every layer and head, with the controls needed to interpret them.

Probes need only a store: nothing here imports a model.
"""

import lazy_loader

from groundscope.core.rooms import check_rooms

check_rooms()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
