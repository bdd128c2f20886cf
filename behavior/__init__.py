"""What the model says: its answers, how they are read, and how they are scored.

`amber`, `judge_files`, `mme` and `taxonomy` are modules; `chair` and `pope` are functions.
"""

import lazy_loader

from groundscope.core.rooms import check_rooms

check_rooms()
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
