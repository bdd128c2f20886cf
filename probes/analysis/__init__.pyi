"""Public modules of this wing."""

from . import alignment, logit_lens

__all__ = ["alignment", "logit_lens"]
