"""What can be read from activations: linear probes at every layer and head, with the controls that make them believable.

A store is enough: nothing here imports a model.
"""

import lazy_loader

from groundscope.core.rooms import check_rooms

check_rooms()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
