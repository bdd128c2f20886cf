"""Public modules of this wing."""

from . import logit_lens, nearest_word

__all__ = ["logit_lens", "nearest_word"]
