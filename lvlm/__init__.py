"""The model under study: where its tensors are, which token is what, and how to ask it."""

import lazy_loader

from groundscope.core.rooms import check_rooms

check_rooms()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
