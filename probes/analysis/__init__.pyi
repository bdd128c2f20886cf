"""Public modules of this wing."""

from . import logit_lens

__all__ = ["logit_lens"]
