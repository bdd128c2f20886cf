"""Causal analysis: which heads carry image information to the answer, and how interventions change the answer."""

import lazy_loader

from groundscope.core.rooms import check_rooms

check_rooms()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
