"""Why an answer is wrong: probes and causal checks together, one verdict for each answer."""

import lazy_loader

from groundscope.core.rooms import check_rooms

check_rooms()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
