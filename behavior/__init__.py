"""Ask a model questions, parse its answers, and score them.

`amber`, `judge_files`, `metrics`, `mme` and `taxonomy` are modules; `chair` and `pope` are functions.
"""

import lazy_loader

from groundscope.core.rooms import check_rooms

check_rooms()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
